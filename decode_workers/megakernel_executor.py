"""Runs steps in the compiled megakernel, on this machine's CPU or GPU."""

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from cluster.kv_layout import KvLayout
from cluster.messages import StepCost
from decode_workers.head_answers import handed_out
from decode_workers.step_batch import Int32Array, StepBatch, StepResult
from megakernel.buckets import MAX_DECODE_ROWS
from megakernel.compiled import Compiled
from megakernel.cuda_compiled import CompiledCuda
from megakernel.model_runtime import ModelRuntime, open_runtime
from megakernel.multi_step import MAX_STEPS, MultiStep, StepRun
from megakernel.step import Rows
from megakernel.step_rows import decode_rows, fill_context
from megakernel.step_times import measured_ms

MEASURED_CONTEXT_TOKENS = 256
"""Committed tokens of every sequence in a measured step."""


class MegaKernelExecutor:
    """`MultiStepExecutor` over one compiled model and its KV pool.

    `block_size_tokens` is a multiple of 16 on a CPU. Blocks past `num_blocks`, for `measure`, are its own.
    Raises what opening the runtime raises: ArtifactDamagedError, LibraryError; on a GPU CudaUnavailableError,
    CudaError, ResidencyError.
    """

    def __init__(
        self,
        compiled: Compiled | CompiledCuda,
        fingerprint: str,
        num_blocks: int,
        block_size_tokens: int,
        *,
        opener: Callable[..., ModelRuntime] = open_runtime,
    ) -> None:
        """`opener` is called with `compiled`, a number of blocks and their size."""
        shape = compiled.shape
        self._layout = KvLayout(
            model_fingerprint=fingerprint,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=compiled.kv_format,
            block_size_tokens=block_size_tokens,
        )
        self._num_blocks = num_blocks
        self._vocab_size = shape.vocab_size
        self._buckets = tuple(bucket for bucket in compiled.buckets if bucket <= MAX_DECODE_ROWS)
        self._measured_tokens = min(MEASURED_CONTEXT_TOKENS, shape.max_context_tokens - 1)
        scratch_blocks = self._layout.num_blocks_for(self._measured_tokens)
        scratch_blocks += self._layout.num_blocks_for(self._buckets[-1])
        self._runtime = opener(compiled, num_blocks + scratch_blocks, block_size_tokens)
        # On a CPU the host's work is done by the cores that steps run on: a run would win nothing.
        self._max_steps = MAX_STEPS if isinstance(compiled, CompiledCuda) else 1

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

    @property
    def max_steps_per_launch(self) -> int:
        return self._max_steps

    def run(self, batch: StepBatch) -> StepResult:
        """Raises StepError for rows that cannot be, and for good once a worker has failed."""
        output = self._runtime.step(_rows(batch))
        return StepResult(
            rows=handed_out(batch) if len(output.logits) else np.empty(0, dtype=np.int32),
            logits=output.logits,
            reductions=None if batch.needs_best is None else output.reductions,
            allowed_logits=None if batch.allowed_starts is None else output.allowed_logits,
        )

    def start(self, run: MultiStep) -> StepRun:
        """Raises StepError as `run` does."""
        return self._runtime.start(run)

    def copy_slots(self, source: Int32Array, destination: Int32Array) -> None:
        self._runtime.copy_slots(source, destination)

    def write_kv(self, layer: int, slots: Int32Array, data: memoryview) -> None:
        """Raises ValueError where `data` is not exactly one layer of len(slots) tokens."""
        self._runtime.write_kv(layer, slots, data)

    def measure(self) -> tuple[StepCost, ...]:
        """The median of a few steps a bucket, one row a sequence, after a step that warms up."""
        first_slot = self._num_blocks * self._layout.block_size_tokens
        fill_context(self._runtime, self._measured_tokens, first_slot)
        return tuple(StepCost(rows=rows, ms=self._measured_ms(rows)) for rows in self._buckets)

    def close(self) -> None:
        """Ends the workers and frees weights and KV; nothing may be called afterwards."""
        self._runtime.close()

    def _measured_ms(self, num_rows: int) -> float:
        rows = decode_rows(
            num_rows,
            self._measured_tokens,
            first_block=self._num_blocks,
            block_size_tokens=self._layout.block_size_tokens,
        )
        # As greedy sequences ask: whole rows of logits would be timed on their way from a GPU too.
        needs_best = np.ones(num_rows, dtype=np.bool_)
        rows = msgspec.structs.replace(rows, needs_logits=~needs_best, needs_best=needs_best)
        return measured_ms(self._runtime, rows)


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
        held_starts=None if batch.held_starts is None else _int32(batch.held_starts),
        held_slots=None if batch.held_slots is None else _int32(batch.held_slots),
    )


def _int32(array: Int32Array) -> Int32Array:
    return np.ascontiguousarray(array, dtype=np.int32)
