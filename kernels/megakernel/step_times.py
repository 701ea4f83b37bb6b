"""Measures steps on this machine: what a bucket costs at a context, and what the cost model says of it."""

import math
import statistics
import time
from collections.abc import Mapping

import msgspec

from megakernel.artifact import Progress
from megakernel.compiled import Compiled
from megakernel.cost import bandwidth_bound_us, simulate
from megakernel.machine import Machine
from megakernel.model_runtime import ModelRuntime
from megakernel.runtime import Runtime
from megakernel.step import Rows
from megakernel.step_rows import BLOCK_TOKENS, decode_rows, fill_context, num_blocks

CONTEXTS = (64, 512, 2048)
_MOST_REPEATS = 5
_ENOUGH_S = 0.1
"""A cell that has been measured this long is not repeated further."""


class StepTime(msgspec.Struct, frozen=True, kw_only=True):
    """Of a step of `rows` sequences, one row each, after `context_tokens` of each."""

    rows: int
    context_tokens: int
    measured_ms: float
    predicted_ms: float
    bound_ms: float
    """To read every byte once at the machine's bandwidth: no step is faster."""


class StepTable(msgspec.Struct, frozen=True, kw_only=True):
    steps: tuple[StepTime, ...]

    def at(self, rows: int, context_tokens: int) -> StepTime:
        return next(step for step in self.steps if (step.rows, step.context_tokens) == (rows, context_tokens))

    @property
    def contexts(self) -> tuple[int, ...]:
        return tuple(sorted({step.context_tokens for step in self.steps}))


def measure_steps(
    compiled: Compiled, machine: Machine, formats: Mapping[str, str], progress: Progress | None = None
) -> StepTable:
    """Every bucket at every context that the model has, on a runtime of its own. Raises StepError."""
    longest = compiled.shape.max_context_tokens - 1
    contexts = sorted({min(context, longest) for context in CONTEXTS})
    cells = [(program, context) for program in compiled.programs for context in contexts]
    blocks = num_blocks(compiled.buckets[-1], contexts[-1])
    steps = []
    with Runtime(compiled, blocks, BLOCK_TOKENS) as runtime:
        fill_context(runtime, contexts[-1])
        for done, (program, context) in enumerate(cells):
            if progress is not None:
                progress(f"measuring {program.bucket} rows", done / len(cells))
            rows = decode_rows(program.bucket, context)
            trace = simulate(program, machine, formats, context)
            steps.append(
                StepTime(
                    rows=program.bucket,
                    context_tokens=context,
                    measured_ms=round(measured_ms(runtime, rows), 4),
                    predicted_ms=round(trace.makespan_us / 1e3, 4),
                    bound_ms=round(bandwidth_bound_us(program, machine, formats, context) / 1e3, 4),
                )
            )
    return StepTable(steps=tuple(steps))


def measured_ms(runtime: ModelRuntime, rows: Rows) -> float:
    """The median of a few steps, after one that warms up."""
    runtime.step(rows)
    return statistics.median(timed_s(runtime, rows, _MOST_REPEATS, _ENOUGH_S)) * 1e3


def timed_s(runtime: ModelRuntime, rows: Rows, most_steps: int, enough_s: float = math.inf) -> list[float]:
    """Seconds of each of up to `most_steps` steps; none is begun after `enough_s` of them."""
    elapsed_s: list[float] = []
    while len(elapsed_s) < most_steps and sum(elapsed_s) < enough_s:
        started_s = time.perf_counter()
        runtime.step(rows)
        elapsed_s.append(time.perf_counter() - started_s)
    return elapsed_s
