"""Runs steps in PyTorch, on a CPU or a CUDA device: the executor every later one is compared with."""

import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch

from cluster.kv_layout import KvDtype, KvLayout
from cluster.messages import StepCost
from decode_workers.head_answers import answer, is_logit_row
from decode_workers.step_batch import NO_PARENT, Int32Array, StepBatch, StepResult
from megakernel.model.row_batch import IntArray, RowBatch, RowSpan
from megakernel.model.torch_llama import TorchLlama
from megakernel.model.weights import Weights
from megakernel.step import StepError, check_held

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
MEASURED_CONTEXT_TOKENS = 256
"""Committed tokens of every sequence in a measured step."""
_MEASURED_REPEATS = 3


class TorchExecutor:
    """`StepExecutor` over one TorchLlama and its KV pool.

    It computes in float32, whatever KV is kept as. `num_threads` sets the process's intra-op threads. Blocks
    past `num_blocks`, for `measure`, are its own.
    """

    def __init__(
        self,
        weights: Weights,
        fingerprint: str,
        num_blocks: int,
        block_size_tokens: int,
        num_threads: int,
        device: str = "cpu",
        kv_dtype: KvDtype = "float32",
    ) -> None:
        torch.set_num_threads(num_threads)
        shape = weights.shape
        self._model = TorchLlama(weights, device, kv_dtype=kv_dtype)
        self._num_blocks = num_blocks
        self._layout = KvLayout(
            model_fingerprint=fingerprint,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=kv_dtype,
            block_size_tokens=block_size_tokens,
        )
        scratch_blocks = self._layout.num_blocks_for(MEASURED_CONTEXT_TOKENS + BUCKETS[-1])
        self._kv = self._model.new_kv((num_blocks + scratch_blocks) * block_size_tokens)

    @property
    def layout(self) -> KvLayout:
        return self._layout

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def vocab_size(self) -> int:
        return self._model.shape.vocab_size

    @property
    def buckets(self) -> Sequence[int]:
        return BUCKETS

    def run(self, batch: StepBatch) -> StepResult:
        """Raises StepError for held ancestors that cannot be."""
        if batch.held_starts is not None:
            _check_held(batch, self._num_blocks * self._layout.block_size_tokens)
        rows = np.flatnonzero(is_logit_row(batch))
        logits = self._model.forward(self._kv, row_batch(batch, self._layout.block_size_tokens), rows)
        return answer(batch, logits.cpu().numpy())

    def copy_slots(self, source: Int32Array, destination: Int32Array) -> None:
        self._kv.copy_slots(source.astype(np.int64), destination.astype(np.int64))

    def write_kv(self, layer: int, slots: Int32Array, data: memoryview) -> None:
        """Raises ValueError where `data` is not exactly one layer of len(slots) tokens."""
        self._kv.write_wire(layer, slots.astype(np.int64), data)

    def measure(self) -> tuple[StepCost, ...]:
        """The median of a few steps a bucket, one row a sequence, after a step that warms up."""
        return tuple(StepCost(rows=rows, ms=self._measured_ms(rows)) for rows in BUCKETS)

    def close(self) -> None:
        """Lets go of weights and KV; nothing may be called afterwards."""
        del self._model, self._kv

    def _measured_ms(self, num_rows: int) -> float:
        batch = _scratch_batch(num_rows, self._num_blocks, self._layout)
        elapsed_ms = []
        for _ in range(1 + _MEASURED_REPEATS):
            started = time.perf_counter()
            self.run(batch)  # ends with the logits on the host, so a device has finished too
            elapsed_ms.append((time.perf_counter() - started) * 1e3)
        return statistics.median(elapsed_ms[1:])


def row_batch(batch: StepBatch, block_size_tokens: int) -> RowBatch:
    """The step's rows with each sequence's block table spelled out as slots."""
    spans = tuple(
        RowSpan(
            int(batch.sequence_starts[index]),
            int(batch.sequence_starts[index + 1]),
            context_slots(batch.block_tables[index], int(batch.context_lengths[index]), block_size_tokens),
        )
        for index in range(batch.num_sequences)
    )
    return RowBatch(
        token_ids=batch.token_ids.astype(np.int64),
        positions=batch.positions.astype(np.int64),
        slots=batch.slots.astype(np.int64),
        parents=batch.parents.astype(np.int64),
        spans=spans,
        held_starts=None if batch.held_starts is None else batch.held_starts.astype(np.int64),
        held_slots=None if batch.held_slots is None else batch.held_slots.astype(np.int64),
    )


def _check_held(batch: StepBatch, num_slots: int) -> None:
    assert batch.held_starts is not None
    assert batch.held_slots is not None, "held_starts without held_slots"
    check_held(batch.held_starts, batch.held_slots, batch.parents, num_slots)
    contexts = np.repeat(batch.context_lengths, np.diff(batch.sequence_starts))
    depths, held = batch.positions - contexts, np.diff(batch.held_starts)
    is_wrong = (batch.parents == NO_PARENT) & (depths != held)
    if is_wrong.any():
        row = int(is_wrong.argmax())
        raise StepError(
            f"row {row}: its position is {batch.positions[row]}, but it has not {depths[row]} ancestors"
            if held[row] < depths[row]
            else f"row {row}: it has more than {depths[row]} ancestors"
        )


def context_slots(block_table: Int32Array, num_tokens: int, block_size_tokens: int) -> IntArray:
    """[num_tokens] KV slot of each committed position."""
    blocks = block_table[: -(-num_tokens // block_size_tokens)].astype(np.int64)
    slots = blocks[:, None] * block_size_tokens + np.arange(block_size_tokens)
    return slots.reshape(-1)[:num_tokens]


def _scratch_batch(num_rows: int, first_block: int, layout: KvLayout) -> StepBatch:
    """Sequences that share one scratch context and write a scratch slot each."""
    context_blocks = layout.num_blocks_for(MEASURED_CONTEXT_TOKENS)
    table = np.arange(first_block, first_block + context_blocks, dtype=np.int32)
    first_slot = (first_block + context_blocks) * layout.block_size_tokens
    return StepBatch(
        token_ids=np.zeros(num_rows, dtype=np.int32),
        positions=np.full(num_rows, MEASURED_CONTEXT_TOKENS, dtype=np.int32),
        slots=np.arange(first_slot, first_slot + num_rows, dtype=np.int32),
        parents=np.full(num_rows, NO_PARENT, dtype=np.int32),
        sequence_starts=np.arange(num_rows + 1, dtype=np.int32),
        context_lengths=np.full(num_rows, MEASURED_CONTEXT_TOKENS, dtype=np.int32),
        block_tables=np.tile(table, (num_rows, 1)),
        needs_logits=np.ones(num_rows, dtype=np.bool_),
    )
