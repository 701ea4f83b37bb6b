"""The KV pool's memory: per layer K and V of every token slot."""

from typing import Literal

import numpy as np
import torch

from megakernel.model.row_batch import IntArray
from megakernel.model.shape import ModelShape

DtypeName = Literal["float32", "float16", "bfloat16"]

TORCH_DTYPES: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class PagedKv:
    """K and V, each `[kv_heads, slots, head_dim]` a layer: one head's keys are one matrix to attention.

    Slots [0, num_slots) belong to the caller; one more, `zero_slot`, stays zero for ever.
    """

    def __init__(self, shape: ModelShape, num_slots: int, dtype: DtypeName, device: torch.device) -> None:
        self.num_slots = num_slots
        self.zero_slot = num_slots
        self.dtype = TORCH_DTYPES[dtype]
        self.device = device
        self._token_shape = (shape.num_kv_heads, shape.head_dim)
        dims = (shape.num_kv_heads, num_slots + 1, shape.head_dim)
        self.keys = [torch.zeros(dims, dtype=self.dtype, device=device) for _ in range(shape.num_layers)]
        self.values = [torch.zeros(dims, dtype=self.dtype, device=device) for _ in range(shape.num_layers)]

    @property
    def bytes_per_token_layer(self) -> int:
        return 2 * self._token_shape[0] * self._token_shape[1] * self.dtype.itemsize

    @torch.inference_mode()
    def copy_slots(self, source: IntArray, destination: IntArray) -> None:
        """All of `source` is read before any of `destination` is written, so the two may overlap."""
        read = self._indices(source)
        written = self._indices(destination)
        for pool in (*self.keys, *self.values):
            pool.index_copy_(1, written, pool.index_select(1, read))

    @torch.inference_mode()
    def write_wire(self, layer: int, slots: IntArray, data: memoryview) -> None:
        """One layer of len(slots) tokens: K then V, each [tokens, kv_heads, head_dim] in C order.

        Raises ValueError where `data` is not exactly that long.
        """
        expected = len(slots) * self.bytes_per_token_layer
        if data.nbytes != expected:
            raise ValueError(f"{len(slots)} tokens of one layer are {expected} bytes, not {data.nbytes}")
        if not len(slots):
            return
        staged = torch.empty(expected, dtype=torch.uint8)
        staged.numpy()[:] = np.frombuffer(data, dtype=np.uint8)
        pair = staged.view(self.dtype).view(2, len(slots), *self._token_shape).to(self.device)
        indices = self._indices(slots)
        self.keys[layer].index_copy_(1, indices, pair[0].transpose(0, 1))
        self.values[layer].index_copy_(1, indices, pair[1].transpose(0, 1))

    @torch.inference_mode()
    def read_wire(self, layer: int, slots: IntArray) -> memoryview:
        """The same bytes back, in memory of their own: valid as long as the view is held."""
        indices = self._indices(slots)
        pair = torch.empty((2, len(slots), *self._token_shape), dtype=self.dtype)
        pair[0] = self.keys[layer].index_select(1, indices).transpose(0, 1)
        pair[1] = self.values[layer].index_select(1, indices).transpose(0, 1)
        return pair.view(-1).view(torch.uint8).numpy().data

    def _indices(self, slots: IntArray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(slots, dtype=np.int64)).to(self.device)
