"""Runs steps in the compiled megakernel on this machine's CPU."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cluster.kv_layout import KvLayout
from cluster.messages import StepCost
from decode_workers.head_answers import handed_out
from decode_workers.step_batch import NO_PARENT, Int32Array, StepBatch, StepResult
from megakernel.artifact import Progress
from megakernel.codegen_cpu import KvFormat
from megakernel.model.weights import Weights
from megakernel.program import Program
from megakernel.runtime import Rows, Runtime
from megakernel.validate import validate

MEASURED_CONTEXT_TOKENS = 256
"""Committed tokens of every sequence in a measured step."""
_MEASURED_REPEATS = 5


class MegaKernelExecutor:
    """`StepExecutor` over one compiled model and its KV pool.

    `programs` ascend by bucket, all for one model and machine. `block_size_tokens` is a multiple of 16.
    Blocks past `num_blocks`, for `measure`, are its own. The constructor compiles, unless cached, and
    packs the weights: it raises BuildError without a compiler, CodegenError for a model no kernel takes,
    and ScheduleError for a program that cannot be proved: none such is ever run.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        weights: Weights,
        fingerprint: str,
        num_blocks: int,
        block_size_tokens: int,
        dtype: KvFormat = "float16",
        library_folder: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        for program in programs:
            validate(program)
        shape = weights.shape
        self._layout = KvLayout(
            model_fingerprint=fingerprint,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=dtype,
            block_size_tokens=block_size_tokens,
        )
        self._num_blocks = num_blocks
        self._vocab_size = shape.vocab_size
        self._buckets = tuple(program.bucket for program in programs)
        self._measured_tokens = min(MEASURED_CONTEXT_TOKENS, shape.max_context_tokens - 1)
        scratch_blocks = self._layout.num_blocks_for(self._measured_tokens)
        scratch_blocks += self._layout.num_blocks_for(self._buckets[-1])
        self._runtime = Runtime(
            programs,
            weights,
            num_blocks + scratch_blocks,
            block_size_tokens,
            kv_format=dtype,
            library_folder=library_folder,
            progress=progress,
        )

    @property
    def layout(self) -> KvLayout:
        return self._layout

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def buckets(self) -> Sequence[int]:
        return self._buckets

    def run(self, batch: StepBatch) -> StepResult:
        """Raises StepError for rows that cannot be, and for good once a worker thread has failed."""
        output = self._runtime.step(_rows(batch))
        return StepResult(
            rows=handed_out(batch),
            logits=output.logits,
            reductions=None if batch.needs_best is None else output.reductions,
            allowed_logits=None if batch.allowed_starts is None else output.allowed_logits,
        )

    def copy_slots(self, source: Int32Array, destination: Int32Array) -> None:
        self._runtime.copy_slots(source, destination)

    def write_kv(self, layer: int, slots: Int32Array, data: memoryview) -> None:
        """Raises ValueError where `data` is not exactly one layer of len(slots) tokens."""
        self._runtime.write_kv(layer, slots, data)

    def measure(self) -> tuple[StepCost, ...]:
        """The median of a few steps a bucket, one row a sequence, after a step that warms up."""
        return tuple(StepCost(rows=rows, ms=self._measured_ms(rows)) for rows in self._buckets)

    def close(self) -> None:
        """Ends the worker threads and frees weights and KV; nothing may be called afterwards."""
        self._runtime.close()

    def _measured_ms(self, num_rows: int) -> float:
        batch = self._scratch_batch(num_rows)
        elapsed_ms = []
        for _ in range(1 + _MEASURED_REPEATS):
            started = time.perf_counter()
            self.run(batch)
            elapsed_ms.append((time.perf_counter() - started) * 1e3)
        return statistics.median(elapsed_ms[1:])

    def _scratch_batch(self, num_rows: int) -> StepBatch:
        """Sequences that share one scratch context and write a scratch slot each."""
        context_blocks = self._layout.num_blocks_for(self._measured_tokens)
        first_block = self._num_blocks
        table = np.arange(first_block, first_block + context_blocks, dtype=np.int32)
        first_slot = (first_block + context_blocks) * self._layout.block_size_tokens
        return StepBatch(
            token_ids=np.zeros(num_rows, dtype=np.int32),
            positions=np.full(num_rows, self._measured_tokens, dtype=np.int32),
            slots=np.arange(first_slot, first_slot + num_rows, dtype=np.int32),
            parents=np.full(num_rows, NO_PARENT, dtype=np.int32),
            sequence_starts=np.arange(num_rows + 1, dtype=np.int32),
            context_lengths=np.full(num_rows, self._measured_tokens, dtype=np.int32),
            block_tables=np.tile(table, (num_rows, 1)),
            needs_logits=np.ones(num_rows, dtype=np.bool_),
        )


def _rows(batch: StepBatch) -> Rows:
    """As the library reads them; what is already so is not copied."""
    return Rows(
        token_ids=_int32(batch.token_ids),
        positions=_int32(batch.positions),
        slots=_int32(batch.slots),
        parents=_int32(batch.parents),
        sequence_starts=_int32(batch.sequence_starts),
        context_lengths=_int32(batch.context_lengths),
        block_tables=_int32(batch.block_tables),
        needs_logits=np.ascontiguousarray(batch.needs_logits, dtype=np.bool_),
        needs_best=None if batch.needs_best is None else np.ascontiguousarray(batch.needs_best, np.bool_),
        top_k=batch.top_k,
        needs_log_sums=batch.needs_log_sums,
        allowed_starts=None if batch.allowed_starts is None else _int32(batch.allowed_starts),
        allowed_token_ids=None if batch.allowed_token_ids is None else _int32(batch.allowed_token_ids),
    )


def _int32(array: Int32Array) -> Int32Array:
    return np.ascontiguousarray(array, dtype=np.int32)
