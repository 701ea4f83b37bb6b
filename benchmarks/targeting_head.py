"""What the head of a step takes: over all tokens with the log of their sum, and over allowed tokens alone.

A head's time is that from the step's call to its return, less that from its first instruction to the end of
its last layer, by the instructions' own stamps: the final norm, the host's work for the head, and what the
host does for any step, on both sides alike. The difference of two steps would not do: a step that asks for
nothing leaves out most of the last layer too, and what layers take varies by more than a restricted head.
"""

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from decode_workers.step_batch import Int32Array
from megakernel.compiled import Compiled
from megakernel.program import Epilogue
from megakernel.runtime import Runtime
from megakernel.step import Rows
from megakernel.step_rows import BLOCK_TOKENS, decode_rows, fill_context, num_blocks

CONTEXT_TOKENS = 16


class HeadTime(NamedTuple):
    """Medians over rounds."""

    head_ms: float
    """All but the layers."""
    step_ms: float

    def __str__(self) -> str:
        return f"{self.head_ms:.3f} of {self.step_ms:.1f} ms"


def head_times(
    compiled: Compiled, allowed: Sequence[Int32Array], num_rounds: int
) -> tuple[HeadTime, HeadTime]:
    """Full and restricted, in turn, of a row for each of `allowed`, its tokens ascending."""
    rows = decode_rows(len(allowed), CONTEXT_TOKENS)
    is_row = np.ones(len(allowed), dtype=np.bool_)
    full = msgspec.structs.replace(rows, needs_logits=~is_row, needs_best=is_row, needs_log_sums=True)
    restricted = msgspec.structs.replace(
        rows,
        allowed_starts=np.cumsum([0, *map(len, allowed)], dtype=np.int32),
        allowed_token_ids=np.concatenate(allowed).astype(np.int32),
    )
    with Runtime(compiled, num_blocks(len(allowed), CONTEXT_TOKENS), BLOCK_TOKENS) as runtime:
        fill_context(runtime, CONTEXT_TOKENS)
        rounds = [(_timed(runtime, full), _timed(runtime, restricted)) for _ in range(1 + num_rounds)][1:]
    both = zip(*rounds, strict=True)
    full_time, restricted_time = (
        HeadTime(*map(statistics.median, zip(*times, strict=True))) for times in both
    )
    return full_time, restricted_time


def _timed(runtime: Runtime, rows: Rows) -> HeadTime:
    num_rows = len(rows.token_ids)
    program = next(program for program in runtime.compiled.programs if program.bucket >= num_rows)
    stamps = runtime.new_stamps(num_rows)
    started_ns = time.perf_counter_ns()  # the stamps' clock
    runtime.step(rows, stamps=stamps)
    ended_ns = time.perf_counter_ns()
    first_ns = min(worker[0, 1] for worker in stamps.workers)
    layers_end_ns = max(
        stamp[2]
        for instructions, worker in zip(program.workers, stamps.workers, strict=True)
        for instruction, stamp in zip(instructions, worker, strict=True)
        if program.ops[instruction.op].epilogue is not Epilogue.LOGITS
    )
    step_ns = ended_ns - started_ns
    return HeadTime((step_ns - int(layers_end_ns - first_ns)) / 1e6, step_ns / 1e6)
