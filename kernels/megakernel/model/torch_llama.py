"""The Llama family in PyTorch over a paged KV pool, with rows that never depend on their company.

Runs a prompt's chunk, a batch of decode rows and trees of rows by one forward pass. A row's result is the
same, bit for bit, alone or in any batch, for any chunking of the prompt, and along any path of a tree.
"""

import math
from collections.abc import Callable

import msgspec
import numpy as np
import torch
from torch.nn import functional

from megakernel.model.attention_plan import plan_attention
from megakernel.model.paged_kv import TORCH_DTYPES, DtypeName, PagedKv
from megakernel.model.rope_table import RopeTable
from megakernel.model.row_batch import IntArray, RowBatch
from megakernel.model.row_invariant import (
    ROW_BUCKETS,
    RowInvariantLinear,
    bucket_for,
    smallest_common_tile,
)
from megakernel.model.tree_attention import to_device, tree_attention, verified_item_counts
from megakernel.model.weights import Weights

OnKvWritten = Callable[[int], None]
"""Called with a layer's number once all rows' KV of that layer is in the pool."""


class _Layer(msgspec.Struct, frozen=True, eq=False):
    attn_norm: torch.Tensor
    qkv: RowInvariantLinear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: RowInvariantLinear
    mlp_norm: torch.Tensor
    gate_up: RowInvariantLinear
    down: RowInvariantLinear


class TorchLlama:
    """Weights on a device; the KV pool is the caller's (`new_kv`), so one model may serve several.

    `dtype` is of weights and arithmetic, `kv_dtype` of what is kept of each token (None: the same).

    `has_head=False` leaves the LM head out, for a worker that computes KV alone. On a CPU the head is held
    packed beside the embedding it may be tied to: the one matrix that is twice in memory, for a head three
    times as fast. The process's intra-op threads are the caller's to set, before the first forward.
    """

    def __init__(
        self,
        weights: Weights,
        device: torch.device | str = "cpu",
        dtype: DtypeName = "float32",
        has_head: bool = True,
        kv_dtype: DtypeName | None = None,
    ) -> None:
        self.shape = shape = weights.shape
        self.device = torch.device(device)
        self.dtype_name: DtypeName = dtype
        self._dtype = TORCH_DTYPES[dtype]
        self._kv_dtype_name: DtypeName = kv_dtype or dtype
        self._weights = weights
        self._tiles_by_shape: dict[tuple[int, int, bool], tuple[int, ...]] = {}
        with torch.inference_mode():
            self._rope = RopeTable(shape, self.device)
            self._embed = self._tensor("embed")
            self._layers = [self._load_layer(index) for index in range(shape.num_layers)]
            self._final_norm = self._tensor("final_norm")
            self._head = self._load_head() if has_head else None
            self._item_counts = verified_item_counts(shape, self.device)
        smallest = smallest_common_tile(self._tiles_by_shape.values())
        self._row_buckets = tuple(rows for rows in ROW_BUCKETS if rows >= smallest)
        del self._weights

    def new_kv(self, num_slots: int) -> PagedKv:
        return PagedKv(self.shape, num_slots, self._kv_dtype_name, self.device)

    @torch.inference_mode()
    def forward(
        self,
        kv: PagedKv,
        batch: RowBatch,
        logit_rows: IntArray,
        on_kv_written: OnKvWritten | None = None,
    ) -> torch.Tensor:
        """Float32 logits [len(logit_rows), vocab] of those rows; KV of all rows goes to their slots.

        With no logit rows the pass ends where the last layer's KV is written.
        """
        num_rows = batch.num_rows
        num_padded = self._padded(num_rows)
        plan = to_device(plan_attention(batch, num_padded, kv.zero_slot, self._item_counts), self.device)
        token_ids = self._padded_indices(batch.token_ids, num_padded)
        cos, sin = self._rope.rows(self._padded_indices(batch.positions, num_padded))
        slots = self._indices(batch.slots)
        hidden = self._embed.index_select(0, token_ids)
        last_layer = self.shape.num_layers - 1
        for index, layer in enumerate(self._layers):
            queries = self._write_kv(layer, kv, index, hidden, cos, sin, slots)
            if on_kv_written is not None:
                on_kv_written(index)
            if index == last_layer and not len(logit_rows):
                return torch.empty((0, self.shape.vocab_size))
            attended = tree_attention(queries, kv.keys[index], kv.values[index], plan)
            hidden.add_(layer.o(attended))
            hidden.add_(self._mlp(layer, hidden))
        return self._logits(hidden, logit_rows)

    def _write_kv(
        self,
        layer: _Layer,
        kv: PagedKv,
        index: int,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """K and V of the rows into the pool; returns the rotated, scaled queries [rows, heads, head_dim]."""
        shape, num_rows = self.shape, len(slots)
        normed = functional.rms_norm(hidden, (shape.hidden_size,), layer.attn_norm, shape.rms_norm_eps)
        heads = layer.qkv(normed).view(len(hidden), -1, shape.head_dim)
        num_rotated = shape.num_heads + shape.num_kv_heads
        rotated = heads[:, :num_rotated]
        if layer.q_norm is not None and layer.k_norm is not None:
            queries, keys = torch.split(rotated, [shape.num_heads, shape.num_kv_heads], 1)
            dims = (shape.head_dim,)
            rotated = torch.cat(
                [
                    functional.rms_norm(queries.contiguous(), dims, layer.q_norm, shape.rms_norm_eps),
                    functional.rms_norm(keys.contiguous(), dims, layer.k_norm, shape.rms_norm_eps),
                ],
                1,
            )
        first, second = rotated.chunk(2, -1)
        # Products and sums apart: a multiply-add fused in some lanes only would break row equality.
        turned = torch.cat((second, first), -1).mul_(sin).add_(rotated * cos).to(self._dtype)
        queries, keys = torch.split(turned, [shape.num_heads, shape.num_kv_heads], 1)
        kv.keys[index].index_copy_(1, slots, keys[:num_rows].transpose(0, 1).to(kv.dtype))
        values = heads[:num_rows, num_rotated:].transpose(0, 1)
        kv.values[index].index_copy_(1, slots, values.to(kv.dtype))
        return queries * (1.0 / math.sqrt(shape.head_dim))

    def _mlp(self, layer: _Layer, hidden: torch.Tensor) -> torch.Tensor:
        shape = self.shape
        normed = functional.rms_norm(hidden, (shape.hidden_size,), layer.mlp_norm, shape.rms_norm_eps)
        gate, up = layer.gate_up(normed).chunk(2, -1)
        # Not functional.silu: its vector and scalar lanes round differently. exp's do not.
        denominator = gate.neg().exp_().add_(1.0)
        return layer.down(torch.div(gate, denominator).mul_(up))

    def _logits(self, hidden: torch.Tensor, logit_rows: IntArray) -> torch.Tensor:
        assert self._head is not None, "this model was loaded without its head"
        num_padded = self._padded(len(logit_rows))
        chosen = hidden.index_select(0, self._padded_indices(logit_rows, num_padded))
        eps = self.shape.rms_norm_eps
        normed = functional.rms_norm(chosen, (self.shape.hidden_size,), self._final_norm, eps)
        return self._head(normed)[: len(logit_rows)].float()

    def _padded(self, num_rows: int) -> int:
        largest = self._row_buckets[-1]
        if num_rows > largest:
            return -(-num_rows // largest) * largest
        return bucket_for(num_rows, self._row_buckets)

    def _indices(self, array: IntArray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(array, dtype=np.int64)).to(self.device)

    def _padded_indices(self, array: IntArray, length: int) -> torch.Tensor:
        padded = np.zeros(length, dtype=np.int64)
        padded[: len(array)] = array
        return self._indices(padded)

    def _tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self._weights.dense(name)).to(self.device, self._dtype)

    def _joined(self, *names: str) -> torch.Tensor:
        return torch.cat([self._tensor(name) for name in names])

    def _linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> RowInvariantLinear:
        return RowInvariantLinear(weight, bias, self._tiles_by_shape)

    def _load_layer(self, index: int) -> _Layer:
        shape, at = self.shape, f"layers.{index}."
        has_qk_norm = shape.has_qk_norm
        bias = self._joined(at + "q_bias", at + "k_bias", at + "v_bias") if shape.has_qkv_bias else None
        return _Layer(
            attn_norm=self._tensor(at + "attn_norm"),
            qkv=self._linear(self._joined(at + "q", at + "k", at + "v"), bias),
            q_norm=self._tensor(at + "q_norm") if has_qk_norm else None,
            k_norm=self._tensor(at + "k_norm") if has_qk_norm else None,
            o=self._linear(self._tensor(at + "o")),
            mlp_norm=self._tensor(at + "mlp_norm"),
            gate_up=self._linear(self._joined(at + "gate", at + "up")),
            down=self._linear(self._tensor(at + "down")),
        )

    def _load_head(self) -> RowInvariantLinear:
        return self._linear(self._embed if self.shape.has_tied_head else self._tensor("head"))
