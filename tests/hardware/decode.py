"""The decode benchmark as a part of the hardware run."""

import time
from functools import partial

from benchmarks.gpu_builds import BuildMissingError, await_build
from benchmarks.gpu_decode import GpuDecode, models
from tests.hardware.part import PartResult, Setting

__all__ = ["models", "run"]

WAITING_SHARE = 0.4


def run(setting: Setting) -> PartResult:
    # No compiler is to run beside what is measured; but not all of the time goes into waiting for them.
    until_s = time.monotonic() + WAITING_SHARE * setting.left_s
    for model in models(is_quick=setting.is_quick, search_s=setting.search_s):
        try:
            await_build(setting.folder, model, until_s)
        except BuildMissingError as error:
            print(f"  {error}", flush=True)
    decode = GpuDecode(
        partial(setting.compiled, is_awaited=False),
        setting.deadline_s,
        is_quick=setting.is_quick,
        search_s=setting.search_s,
    )
    decode.run(lambda: setting.keep(_result_of(decode)))
    print(decode.table(), flush=True)
    return _result_of(decode)


def _result_of(decode: GpuDecode) -> PartResult:
    problems = () if decode.lines else ("nothing of ours was measured",)
    return PartResult(problems=problems, left_out=tuple(decode.left_out), figures=decode.figures)
