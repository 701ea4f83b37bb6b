"""Measures steps on this machine: what a bucket costs at a context, and what the cost model says of it."""

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np

from megakernel.artifact import Progress
from megakernel.compiled import Compiled
from megakernel.cost import bandwidth_bound_us, simulate
from megakernel.machine import Machine
from megakernel.runtime import Rows, Runtime

CONTEXTS = (64, 512, 2048)
BLOCK_TOKENS = 16
_MOST_REPEATS = 5
_ENOUGH_S = 0.25
"""A cell that has been measured this long is not repeated further."""
_NO_PARENT = -1


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
    blocks = -(-contexts[-1] // BLOCK_TOKENS)
    rows_blocks = -(-compiled.buckets[-1] // BLOCK_TOKENS)
    steps = []
    with Runtime(compiled, blocks + rows_blocks, BLOCK_TOKENS) as runtime:
        fill_kv(runtime, contexts[-1])
        for done, (program, context) in enumerate(cells):
            if progress is not None:
                progress(f"measuring {program.bucket} rows", done / len(cells))
            rows = scratch_rows(program.bucket, context, first_block=0, block_size_tokens=BLOCK_TOKENS)
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


def fill_kv(runtime: Runtime, num_tokens: int) -> None:
    """Slots [0, num_tokens) of every layer: memory that nobody wrote is one page of zeros, and too fast."""
    shape = runtime.compiled.shape
    dtype = np.float16 if runtime.compiled.kv_format == "float16" else np.float32
    values = np.random.default_rng(0).standard_normal(
        (2, num_tokens, shape.num_kv_heads, shape.head_dim), dtype=np.float32
    )
    wire = values.astype(dtype).tobytes()
    slots = np.arange(num_tokens, dtype=np.int32)
    for layer in range(shape.num_layers):
        runtime.write_kv(layer, slots, wire)


def measured_ms(runtime: Runtime, rows: Rows, most_repeats: int = _MOST_REPEATS) -> float:
    """The median of a few steps, after one that warms up."""
    elapsed_s: list[float] = []
    runtime.run(rows)
    while len(elapsed_s) < most_repeats and sum(elapsed_s) < _ENOUGH_S:
        started_s = time.perf_counter()
        runtime.run(rows)
        elapsed_s.append(time.perf_counter() - started_s)
    return statistics.median(elapsed_s) * 1e3


def scratch_rows(num_rows: int, context_tokens: int, *, first_block: int, block_size_tokens: int) -> Rows:
    """One row a sequence; all share the context in blocks from `first_block` on, and write behind it."""
    context_blocks = -(-context_tokens // block_size_tokens)
    table = _int32(range(first_block, first_block + context_blocks))
    first_slot = (first_block + context_blocks) * block_size_tokens
    return Rows(
        token_ids=np.zeros(num_rows, dtype=np.int32),
        positions=np.full(num_rows, context_tokens, dtype=np.int32),
        slots=_int32(range(first_slot, first_slot + num_rows)),
        parents=np.full(num_rows, _NO_PARENT, dtype=np.int32),
        sequence_starts=_int32(range(num_rows + 1)),
        context_lengths=np.full(num_rows, context_tokens, dtype=np.int32),
        block_tables=np.tile(table, (num_rows, 1)),
        needs_logits=np.ones(num_rows, dtype=np.bool_),
    )


def _int32(values: Iterable[int] | Sequence[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    return np.fromiter(values, dtype=np.int32)
