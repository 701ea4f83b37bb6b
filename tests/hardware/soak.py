"""A thousand decode steps of a growing context, twice: the same tokens and bits, and no failure on the
way."""

import time

import numpy as np

from benchmarks.gpu_builds import BuildMissingError
from benchmarks.gpu_memory import fill_kv, kv_pool, opened, settle
from benchmarks.gpu_models import GpuModel
from benchmarks.gpu_steps import Group, Pool, chain, num_blocks_of, rows_of
from megakernel.cuda_runtime import CudaRuntime
from megakernel.step import StepError
from tests.hardware.part import PartResult, Setting

MODEL = GpuModel(shape_name="qwen3-1.7b", format="Q4_0", bucket=4)
STEPS, STEPS_QUICK = 1000, 200
REPEATED_EVERY = 20
FIRST_CONTEXTS = (1, 64, 127, 500)


def models(*, is_quick: bool, search_s: float) -> list[GpuModel]:
    return [model_of(search_s)]


def model_of(search_s: float) -> GpuModel:
    return GpuModel(shape_name=MODEL.shape_name, format=MODEL.format, bucket=MODEL.bucket, search_s=search_s)


def run(setting: Setting) -> PartResult:
    steps = STEPS_QUICK if setting.is_quick else STEPS
    try:
        compiled = setting.compiled(model_of(setting.search_s))
    except BuildMissingError as error:
        return PartResult(problems=(str(error),))
    problems: list[str] = []
    figures: dict[str, float] = {}
    num_blocks = sum(num_blocks_of(context + steps) for context in FIRST_CONTEXTS)
    try:
        with opened(compiled, num_blocks) as runtime:
            passes = []
            for _ in range(2):
                fill_kv(kv_pool(runtime))
                settle()
                started_s = time.perf_counter()
                passes.append(generate(runtime, steps))
                figures["soak_ms_a_step"] = (time.perf_counter() - started_s) * 1e3 / steps
            problems += compared(*passes)
    except StepError as error:
        problems.append(f"a step failed: {error}")
        return PartResult(problems=tuple(problems), figures=figures)
    print(f"  {2 * steps} steps, {figures['soak_ms_a_step']:.2f} ms each with the host's part", flush=True)
    return PartResult(problems=tuple(problems), figures=figures)


class Generated:
    """Of one pass: greedy tokens by step, and the logits of steps that were repeated."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = []
        self.logits: list[np.ndarray] = []
        self.problems: list[str] = []


def generate(runtime: CudaRuntime, steps: int) -> Generated:
    found = Generated()
    pool = Pool(runtime.num_blocks)
    blocks = [pool.take(num_blocks_of(context + steps)) for context in FIRST_CONTEXTS]
    tokens = [7, 8, 9, 10]
    for step in range(steps):
        groups = [
            Group(context=context + step, tokens=(token,), parents=chain(1), blocks=own)
            for context, token, own in zip(FIRST_CONTEXTS, tokens, blocks, strict=True)
        ]
        rows = rows_of(groups, needs_logits=step % REPEATED_EVERY == 0)
        output = runtime.step(rows)
        if step % REPEATED_EVERY == 0:
            again = runtime.step(rows)
            if output.logits.tobytes() != again.logits.tobytes():
                found.problems.append(f"step {step} gave other logits when it was repeated")
            if not np.isfinite(output.logits).all():
                found.problems.append(f"step {step} gave logits that are no numbers")
            if (output.logits.argmax(axis=1) != output.reductions.token_ids).any():
                found.problems.append(f"step {step} gave best tokens that are not its logits'")
            found.logits.append(output.logits)
        tokens = output.reductions.token_ids.tolist()
        found.tokens.append(tokens)
    return found


def compared(first: Generated, second: Generated) -> list[str]:
    problems = [*first.problems, *second.problems]
    if first.tokens != second.tokens:
        pairs = enumerate(zip(first.tokens, second.tokens, strict=True))
        at = next(step for step, (one, other) in pairs if one != other)
        problems.append(f"from step {at} on, the second pass went another way")
    elif any(a.tobytes() != b.tobytes() for a, b in zip(first.logits, second.logits, strict=True)):
        problems.append("the second pass gave other logits for the same tokens")
    return problems
