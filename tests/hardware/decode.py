"""The decode benchmark as a part of the hardware run."""

from benchmarks.gpu_builds import BuildMissingError
from benchmarks.gpu_decode import GpuDecode, models, table
from tests.hardware.part import PartResult, Setting

__all__ = ["models", "run"]


def run(setting: Setting) -> PartResult:
    for model in models(is_quick=setting.is_quick, search_s=setting.search_s):
        try:
            setting.await_compiled(model)  # so that no compiler runs beside what is measured
        except BuildMissingError as error:
            print(f"  {error}", flush=True)
    decode = GpuDecode(
        setting.compiled, setting.deadline_s, is_quick=setting.is_quick, search_s=setting.search_s
    )
    decode.run()
    print(table(decode.lines), flush=True)
    problems = () if decode.lines else ("nothing of ours was measured",)
    return PartResult(problems=problems, left_out=tuple(decode.left_out), figures=decode.figures)
