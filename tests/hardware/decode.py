"""The decode benchmark as a part of the hardware run."""

import time
from functools import partial

from benchmarks.gpu_builds import BuildMissingError, await_build
from benchmarks.gpu_cells import QUICK, Selection
from benchmarks.gpu_decode import GpuDecode
from benchmarks.gpu_models import GpuModel
from tests.hardware.part import PartResult, Setting

SELECTION = Selection(shapes=("qwen3-1.7b",))
WAITING_SHARE = 0.4


def models(*, is_quick: bool, search_s: float) -> list[GpuModel]:
    return selection(is_quick=is_quick).models(search_s)


def selection(*, is_quick: bool) -> Selection:
    return QUICK if is_quick else SELECTION


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
        selection(is_quick=setting.is_quick),
        is_quick=setting.is_quick,
        search_s=setting.search_s,
    )
    decode.run(lambda: setting.keep(_result_of(decode)))
    print(decode.table(), flush=True)
    return _result_of(decode)


def _result_of(decode: GpuDecode) -> PartResult:
    problems = () if decode.lines else ("nothing of ours was measured",)
    return PartResult(problems=problems, left_out=tuple(decode.left_out), figures=decode.figures)
