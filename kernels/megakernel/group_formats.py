"""Weights quantized in groups of 128 along K, as AWQ and GPTQ keep them: W4G128 and W8G128.

A row is stored as blocks of one group each, of a last, shorter one too:

- W4G128: float16 d, float16 m, 64 bytes of numbers q in 0 .. 15: low halves are the group's first 64, high
  halves its other 64. A value is d * q + m. 68 bytes.
- W8G128: float16 d, 128 int8 q. A value is d * q. 130 bytes.

Numbers past the row's end are 0 and mean nothing.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from megakernel.float_formats import Float32Array, float_tensor
from megakernel.model.shape import ModelShape
from megakernel.model.weights import RawTensor, StoredWeights, Weights

GroupFormat = Literal["W4G128", "W8G128"]
GROUP_FORMATS: tuple[GroupFormat, ...] = ("W4G128", "W8G128")
GROUP_K = 128
"""Elements along K that share a scale."""


def quantize_groups(values: Float32Array, format: GroupFormat) -> RawTensor:
    """A matrix [out_features, in_features], each value rounded to the nearest that its group can stand for.

    A W4G128 group reaches from its minimum to its maximum, a W8G128 group as far to either side as its
    largest magnitude. All values must be finite as float16.
    """
    rows, in_features = values.shape
    missing = -in_features % GROUP_K
    # Repeating the last value leaves a short group's range as it is.
    groups = np.pad(values.astype(np.float32), ((0, 0), (0, missing)), mode="edge").reshape(rows, -1, GROUP_K)
    if format == "W4G128":
        least = groups.min(axis=-1, keepdims=True).astype(np.float16)
        scales = ((groups.max(axis=-1, keepdims=True) - least) / 15).astype(np.float16)
        low, high = np.split(_numbers(groups - least, scales, 0, 15, missing), 2, axis=-1)
        parts = [scales, least, low | high << 4]
    else:
        scales = (np.abs(groups).max(axis=-1, keepdims=True) / 127).astype(np.float16)
        parts = [scales, _numbers(groups, scales, -127, 127, missing)]
    data = np.concatenate([part.view(np.uint8) for part in parts], axis=-1).reshape(rows, -1)
    return RawTensor(format=format, shape=values.shape, data=data)


def dequantize_groups(tensor: RawTensor) -> Float32Array:
    """The values that a tensor's blocks define, in float32."""
    rows, in_features = tensor.shape
    if tensor.format == "W4G128":
        blocks = tensor.data.reshape(rows, -1, 68)
        scales, least = _halves(blocks, 0), _halves(blocks, 2)
        numbers = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=-1)
        values = scales * numbers.astype(np.float32) + least
    else:
        blocks = tensor.data.reshape(rows, -1, 130)
        values = _halves(blocks, 0) * blocks[..., 2:].view(np.int8).astype(np.float32)
    return np.ascontiguousarray(values.reshape(rows, -1)[:, :in_features])


class GroupQuantizedWeights:
    """Other weights, of which some matrices are rounded to a group format whenever they are asked for."""

    def __init__(self, weights: Weights, formats: Mapping[str, GroupFormat]) -> None:
        """`formats`: by name, of those to quantize."""
        self._weights = weights
        self._quantized = formats

    @property
    def shape(self) -> ModelShape:
        return self._weights.shape

    @property
    def names(self) -> frozenset[str]:
        return self._weights.names

    @property
    def formats(self) -> Mapping[str, str]:
        return {**self._weights.formats, **self._quantized}

    def raw(self, name: str) -> RawTensor:
        if name in self._quantized:
            return quantize_groups(self._weights.dense(name), self._quantized[name])
        if isinstance(self._weights, StoredWeights):
            return self._weights.raw(name)
        return float_tensor(self._weights.dense(name), self._weights.formats[name])

    def dense(self, name: str) -> Float32Array:
        return dequantize_groups(self.raw(name)) if name in self._quantized else self._weights.dense(name)


def _numbers(
    offsets: Float32Array, scales: npt.NDArray[np.float16], least: int, largest: int, num_missing: int
) -> npt.NDArray[np.int8]:
    """The nearest multiples of the scales, [rows, groups, 128]; 0 where a scale is, and past a row's end."""
    steps = np.divide(offsets, scales, out=np.zeros_like(offsets), where=scales != 0)
    numbers = np.rint(steps).clip(least, largest).astype(np.int8)
    numbers[:, -1, GROUP_K - num_missing :] = 0
    return numbers


def _halves(blocks: npt.NDArray[np.uint8], at: int) -> Float32Array:
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16).astype(np.float32)
