"""A hang, planted in a process of its own: kernels that wait longer than they may give up with a clear error,
and the GPU goes on working."""

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu_builds import BuildMissingError
from benchmarks.gpu_memory import opened
from benchmarks.gpu_models import GpuModel
from benchmarks.gpu_steps import Group, chain, rows_of
from megakernel.cuda_compiled import CompiledCuda
from megakernel.step import Rows, StepError
from tests.hardware.part import PartResult, Setting
from tests.hardware.soak import model_of

WAIT_LIMIT_S = 1e-6
"""Far less than a step takes, most of which each SM spends on waiting for others."""
PROCESS_LIMIT_S = 60.0
NUM_BLOCKS = 32


def models(*, is_quick: bool, search_s: float) -> list[GpuModel]:
    return [model_of(search_s)]


def run(setting: Setting) -> PartResult:
    try:
        compiled = setting.compiled(model_of(setting.search_s))
    except BuildMissingError as error:
        return PartResult(problems=(str(error),))
    return PartResult(problems=(*planted(setting), *still_works(compiled)))


def planted(setting: Setting) -> list[str]:
    """Problems."""
    command = [sys.executable, "-m", "tests.hardware.hang", str(setting.folder), str(setting.search_s)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROCESS_LIMIT_S)
    except subprocess.TimeoutExpired:
        return [f"kernels that may wait {WAIT_LIMIT_S} s had not given up after {PROCESS_LIMIT_S} s"]
    said = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode != 0 or "gave up after" not in said:
        return [f"a planted hang did not end in a clear error: {done.stdout[-500:]}{done.stderr[-1500:]}"]
    print(f"  planted hang: {said}", flush=True)
    return []


def still_works(compiled: CompiledCuda) -> list[str]:
    try:
        with opened(compiled, NUM_BLOCKS) as runtime:
            runtime.step(a_row())
    except RuntimeError as error:
        return [f"after a planted hang the GPU does not work: {error}"]
    return []


def a_row() -> Rows:
    return rows_of([Group(context=300, tokens=(1,), parents=chain(1), blocks=tuple(range(20)))])


def hang(compiled: CompiledCuda) -> list[str]:
    """The errors of a step that may not wait, and of one after it."""
    errors = []
    with opened(compiled, NUM_BLOCKS, wait_limit_s=WAIT_LIMIT_S) as runtime:
        for _ in range(2):
            try:
                runtime.step(a_row())
            except StepError as error:
                errors.append(str(error))
    return errors


def _main() -> int:
    folder, search_s = sys.argv[1:]
    setting = Setting(folder=Path(folder), deadline_s=time.monotonic() + 5.0, search_s=float(search_s))
    errors = hang(setting.compiled(model_of(setting.search_s)))
    if len(errors) != 2 or errors[0] != errors[1]:
        print(f"not two equal errors: {errors}", file=sys.stderr, flush=True)
        return 1
    print(errors[0], flush=True)
    return 0


if __name__ == "__main__":
    status = _main()
    os._exit(status)  # nothing of CUDA is cleaned up after its context has failed
