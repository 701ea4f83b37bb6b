"""Computes prompts' KV in the compiled megakernel: chunks are chains of rows that want no logits."""

from collections.abc import Sequence

import numpy as np

from cluster.kv_layout import KvLayout
from megakernel.model.row_batch import chain_parents
from megakernel.runtime import Runtime
from megakernel.step import IntArray, Rows
from prefill_workers.chunked_engine import Chunk, ChunkedPrefillEngine, OnLayer, SlotArray


class MegaKernelPrefillEngine(ChunkedPrefillEngine):
    """`PrefillEngine` over a Runtime that is the engine's until its caller closes it.

    A step has at most `max_tokens_per_step` rows, and no more than the largest bucket. Raises ValueError
    where the runtime's pool has other blocks, or fewer.
    """

    def __init__(
        self,
        runtime: Runtime,
        fingerprint: str,
        num_blocks: int,
        block_size_tokens: int,
        max_tokens_per_step: int,
    ) -> None:
        if block_size_tokens != runtime.block_size_tokens or num_blocks > runtime.num_blocks:
            raise ValueError(
                f"{num_blocks} blocks of {block_size_tokens} tokens are not in a pool of "
                f"{runtime.num_blocks} blocks of {runtime.block_size_tokens}"
            )
        layout = KvLayout(
            model_fingerprint=fingerprint,
            num_layers=runtime.shape.num_layers,
            num_kv_heads=runtime.shape.num_kv_heads,
            head_dim=runtime.shape.head_dim,
            dtype=runtime.kv_format,
            block_size_tokens=block_size_tokens,
        )
        super().__init__(
            _MegaKernelKv(runtime, layout), num_blocks, min(max_tokens_per_step, runtime.max_rows)
        )


class _MegaKernelKv:
    """`KvCompute` in the megakernel.

    A chunk is exported after its step, and sent while the next one runs. Exporting layers beside their own
    step ended hand-offs later where all cores compute: the other workers wait for the one that is disturbed.
    """

    def __init__(self, runtime: Runtime, layout: KvLayout) -> None:
        self.layout = layout
        self._runtime = runtime

    def compute(self, chunks: Sequence[Chunk], on_layer: OnLayer) -> None:
        """Raises StepError for rows that cannot be, and for good once a worker thread has failed."""
        self._runtime.run(_rows(chunks))
        for layer in range(self.layout.num_layers):
            on_layer(layer)

    def read_layer(self, layer: int, slots: SlotArray) -> memoryview:
        return self._runtime.read_kv(layer, slots.astype(np.int32))


def _rows(chunks: Sequence[Chunk]) -> Rows:
    """A sequence of rows a chunk, in the slots where its block table has them: attention gathers none."""
    counts = [len(chunk.token_ids) for chunk in chunks]
    starts = np.cumsum([0, *counts])
    tables = np.full((len(chunks), max(len(chunk.block_ids) for chunk in chunks)), -1, dtype=np.int32)
    for table, chunk in zip(tables, chunks, strict=True):
        table[: len(chunk.block_ids)] = chunk.block_ids
    return Rows(
        token_ids=_int32([np.array(chunk.token_ids) for chunk in chunks]),
        positions=_int32([np.arange(chunk.start, chunk.end) for chunk in chunks]),
        slots=_int32([chunk.slots[chunk.start :] for chunk in chunks]),
        parents=_int32([chain_parents(start, count) for start, count in zip(starts, counts, strict=False)]),
        sequence_starts=starts.astype(np.int32),
        context_lengths=np.array([chunk.start for chunk in chunks], dtype=np.int32),
        block_tables=tables,
        needs_logits=np.zeros(starts[-1], dtype=np.bool_),
    )


def _int32(parts: Sequence[np.ndarray]) -> IntArray:
    return np.concatenate(parts).astype(np.int32)
