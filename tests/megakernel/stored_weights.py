"""Tiny weights as a file has them: in formats, with the values that these stand for."""

import gguf
import numpy as np

from megakernel.float_formats import float_tensor, float_values
from megakernel.model.weights import RawTensor
from tests.tiny_model import TinyWeights


class StoredAs(TinyWeights):
    """Tiny weights whose matrices a file has in other formats, by name; with what those can stand for."""

    def __init__(self, weights: TinyWeights, formats: dict[str, str]) -> None:
        self.stored = {name: stored_as(weights.dense(name), format) for name, format in formats.items()}
        values = {name: values_of(raw) for name, raw in self.stored.items()}
        super().__init__(weights.shape, weights._tensors | values)

    @property
    def formats(self):
        return super().formats | {name: raw.format for name, raw in self.stored.items()}

    def raw(self, name: str) -> RawTensor:
        return self.stored[name]


def stored_as(values: np.ndarray, format: str) -> RawTensor:
    if format in ("BF16", "F16"):
        return float_tensor(values, format)
    data = gguf.quantize(values, gguf.GGMLQuantizationType[format])
    return RawTensor(format=format, shape=values.shape, data=data)


def values_of(raw: RawTensor) -> np.ndarray:
    if raw.format in ("BF16", "F16"):
        return float_values(raw.data, raw.format)
    return gguf.dequantize(raw.data, gguf.GGMLQuantizationType[raw.format]).reshape(raw.shape)
