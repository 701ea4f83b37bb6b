"""Several decode steps in one launch, beside one step a launch: the same tokens, and what it saves."""

import random
import statistics
import time
from collections.abc import Sequence

import msgspec
import numpy as np

from benchmarks.gpu_builds import BuildMissingError
from benchmarks.gpu_memory import BLOCK_TOKENS, View, device_view, fill_kv, kv_pool, opened, settle
from benchmarks.gpu_models import GpuModel
from benchmarks.gpu_steps import Pool, num_blocks_of
from megakernel.cuda_runtime import CudaRuntime
from megakernel.draft_automaton import build_automaton
from megakernel.multi_step import HostRun, MultiStep, StepRun, StepTokens
from megakernel.step import IntArray, StepError
from tests.hardware.part import PartResult, Setting

MODEL = GpuModel(shape_name="qwen3-1.7b", format="Q4_0", bucket=4)
CONTEXTS = (500, 1, 127, 64)
STEPS, STEPS_QUICK = 48, 16
ROUNDS = 5
MISTAKEN = 0.15
"""Share of a draft's tokens that are wrong."""


class Timed(msgspec.Struct, frozen=True):
    """A run to its end."""

    steps: list[StepTokens]
    ms: float

    @property
    def num_tokens(self) -> int:
        return sum(int(step.counts.sum()) for step in self.steps)


def models(*, is_quick: bool, search_s: float) -> list[GpuModel]:
    return [msgspec.structs.replace(MODEL, search_s=search_s)]


def run(setting: Setting) -> PartResult:
    try:
        compiled = setting.compiled(models(is_quick=setting.is_quick, search_s=setting.search_s)[0])
    except BuildMissingError as error:
        return PartResult(problems=(str(error),))
    num_steps = STEPS_QUICK if setting.is_quick else STEPS
    try:
        with opened(compiled, num_blocks(num_steps)) as runtime:
            problems, figures = check(runtime, num_steps)
    except StepError as error:
        return PartResult(problems=(f"a step failed: {error}",))
    for name, value in figures.items():
        print(f"  {name} {value:.3f}", flush=True)
    return PartResult(problems=tuple(problems), figures=figures)


def num_blocks(num_steps: int) -> int:
    return sum(num_blocks_of(context, num_steps) for context in CONTEXTS)


def check(
    runtime: CudaRuntime, num_steps: int, view: View = device_view
) -> tuple[list[str], dict[str, float]]:
    """Four sequences, then one with drafts of three tokens: problems, and milliseconds a step and a token."""
    batch = run_of(runtime, len(CONTEXTS), num_steps)
    alone = run_of(runtime, 1, num_steps)
    fill_kv(kv_pool(runtime, view))
    settle()
    text = [token for step in timed(by_host(runtime, alone)).steps for token in step.tokens_of(0)]
    problems: list[str] = []
    figures: dict[str, float] = {}
    for name, asked in (("rows4", batch), ("rows1", alone), ("drafted", with_drafts(alone, text))):
        pairs = [(timed(by_host(runtime, asked)), timed(runtime.start(asked))) for _ in range(ROUNDS)]
        first = pairs[0][0]
        for number, (host, device) in enumerate(pairs):
            for way, found in (("step by step", host), ("in one launch", device)):
                if bits(found.steps) != bits(first.steps):
                    problems.append(f"{name}, round {number}, {way}: other tokens or bits")
        for way, index in (("host", 0), ("launch", 1)):
            each = [pair[index] for pair in pairs]
            figures[f"{name}_{way}_ms_a_step"] = statistics.median(run.ms / len(run.steps) for run in each)
            figures[f"{name}_{way}_ms_a_token"] = statistics.median(run.ms / run.num_tokens for run in each)
        ratios = [host.ms / device.ms for host, device in pairs]
        figures[f"{name}_host_over_launch"] = statistics.median(ratios)
    return problems, figures


def run_of(runtime: CudaRuntime, num_sequences: int, num_steps: int) -> MultiStep:
    pool = Pool(runtime.num_blocks)
    contexts = CONTEXTS[:num_sequences]
    blocks = [pool.take(num_blocks_of(context, num_steps)) for context in contexts]
    tables = np.full((num_sequences, max(map(len, blocks))), -1, dtype=np.int32)
    for line, own in zip(tables, blocks, strict=True):
        line[: len(own)] = own
    return MultiStep(
        num_steps=num_steps,
        token_ids=_int32(range(7, 7 + num_sequences)),
        context_lengths=_int32(contexts),
        block_tables=tables,
        max_new_tokens=_int32([num_steps] * num_sequences),
        stop_starts=_int32([0] * (num_sequences + 1)),
        stop_token_ids=_int32([]),
        needs_log_sums=True,
    )


def with_drafts(run: MultiStep, text: Sequence[int]) -> MultiStep:
    """Of the text that the run will give, with mistakes."""
    rng, pending = random.Random(0), int(run.token_ids[0])
    known = [rng.choice(text) if rng.random() < MISTAKEN else token for token in text]
    drafts = build_automaton([[pending, *known]])
    return msgspec.structs.replace(
        run, drafts=drafts, max_draft_tokens=3, draft_states=_int32([drafts.follow(0, pending)])
    )


def by_host(runtime: CudaRuntime, run: MultiStep) -> StepRun:
    return HostRun(runtime.step, run, BLOCK_TOKENS)


def timed(run: StepRun) -> Timed:
    started_s = time.perf_counter()
    steps = []
    while (step := run.next()) is not None:
        steps.append(step)
    return Timed(steps, (time.perf_counter() - started_s) * 1e3)


def bits(steps: Sequence[StepTokens]) -> bytes:
    """Of all that was emitted."""
    found = []
    for step in steps:
        rows = [row for sequence in range(len(step.counts)) for row in step.rows_of(sequence)]
        arrays = (step.reductions.token_ids, step.reductions.maxima, step.reductions.log_sums)
        found.append(step.counts.tobytes() + b"".join(array[rows].tobytes() for array in arrays))
    return b"".join(found)


def _int32(values: Sequence[int]) -> IntArray:
    return np.array(values, dtype=np.int32)
