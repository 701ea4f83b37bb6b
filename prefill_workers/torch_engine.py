"""Computes prompts' KV in PyTorch: each layer is exported while later ones are computed."""

from collections.abc import Sequence

import numpy as np
import torch

from cluster.kv_layout import KvDtype, KvLayout
from megakernel.model.row_batch import RowBatch, RowSpan, chain_parents
from megakernel.model.torch_llama import TorchLlama
from megakernel.model.weights import Weights
from prefill_workers.chunked_engine import Chunk, ChunkedPrefillEngine, OnLayer, SlotArray


class TorchPrefillEngine(ChunkedPrefillEngine):
    """`PrefillEngine` over one TorchLlama without its head.

    It computes in float32, whatever KV is kept as. `num_threads` sets the process's intra-op threads.
    """

    def __init__(
        self,
        weights: Weights,
        fingerprint: str,
        num_blocks: int,
        block_size_tokens: int,
        max_tokens_per_step: int,
        num_threads: int,
        device: str = "cpu",
        kv_dtype: KvDtype = "float32",
    ) -> None:
        torch.set_num_threads(num_threads)
        shape = weights.shape
        layout = KvLayout(
            model_fingerprint=fingerprint,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=kv_dtype,
            block_size_tokens=block_size_tokens,
        )
        model = TorchLlama(weights, device, has_head=False, kv_dtype=kv_dtype)
        super().__init__(_TorchKv(model, layout, num_blocks), num_blocks, max_tokens_per_step)


class _TorchKv:
    """`KvCompute` in PyTorch."""

    def __init__(self, model: TorchLlama, layout: KvLayout, num_blocks: int) -> None:
        self.layout = layout
        self._model = model
        self._kv = model.new_kv(num_blocks * layout.block_size_tokens)

    def compute(self, chunks: Sequence[Chunk], on_layer: OnLayer) -> None:
        no_rows = np.empty(0, dtype=np.int64)
        self._model.forward(self._kv, _row_batch(chunks), no_rows, on_kv_written=on_layer)

    def read_layer(self, layer: int, slots: SlotArray) -> memoryview:
        return self._kv.read_wire(layer, slots)


def _row_batch(chunks: Sequence[Chunk]) -> RowBatch:
    spans, parents, num_rows = [], [], 0
    for chunk in chunks:
        count = len(chunk.token_ids)
        spans.append(RowSpan(num_rows, num_rows + count, chunk.slots[: chunk.start]))
        parents.append(chain_parents(num_rows, count))
        num_rows += count
    return RowBatch(
        token_ids=np.concatenate([np.array(chunk.token_ids, dtype=np.int64) for chunk in chunks]),
        positions=np.concatenate([np.arange(chunk.start, chunk.end, dtype=np.int64) for chunk in chunks]),
        slots=np.concatenate([chunk.slots[chunk.start :] for chunk in chunks]),
        parents=np.concatenate(parents),
        spans=tuple(spans),
    )
