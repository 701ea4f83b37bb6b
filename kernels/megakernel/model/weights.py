"""The weights of a model, by names of our own, whichever file they came from.

Names (L is the layer number): `embed`, `layers.L.attn_norm`, `layers.L.q`, `layers.L.k`, `layers.L.v`,
`layers.L.q_bias`, `layers.L.k_bias`, `layers.L.v_bias`, `layers.L.q_norm`, `layers.L.k_norm`, `layers.L.o`,
`layers.L.mlp_norm`, `layers.L.gate`, `layers.L.up`, `layers.L.down`, `final_norm`, `head` (absent where
tied). Matrices are [out_features, in_features]. Q and K rows are in Hugging Face's half-split ("rotate half")
RoPE order whatever the file: GGUF's Llama architecture stores them interleaved, and is permuted back on load.
"""

import reprlib
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.model.shape import ModelShape


class ModelFormatError(ValueError):
    """A model file that cannot be read: names the file, what is wrong, and what is supported."""


def shown(value: object) -> str:
    """A value from a file, short enough for an error message."""
    return reprlib.repr(value)


class RawTensor(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor as it is stored, its rows in our order."""

    format: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]
    """`[rows, bytes_per_row]`; a vector is one row."""


class Weights(Protocol):
    """Lazily dequantized tensors, so that a model is never twice in memory."""

    @property
    def shape(self) -> ModelShape: ...

    @property
    def names(self) -> frozenset[str]: ...

    @property
    def formats(self) -> Mapping[str, str]:
        """Stored format by name: `Q4_1`, `Q8_0`, `F32`, `BF16`, ..."""
        ...

    def dense(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor as float32, exactly the values the format defines."""
        ...


@runtime_checkable
class StoredWeights(Weights, Protocol):
    """Weights that also give what they store, for who keeps the format."""

    def raw(self, name: str) -> RawTensor: ...
