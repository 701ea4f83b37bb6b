"""The float formats of weights and activations: how values are rounded to them, and stored."""

import numpy as np
import numpy.typing as npt

from megakernel.model.weights import RawTensor
from megakernel.packing import Bytes, PackError

FLOAT_BYTES = {"F16": 2, "BF16": 2, "F32": 4}

Float32Array = npt.NDArray[np.float32]

_LARGEST_F16 = np.float32(65504)
_BF16_NAN = np.uint16(0x7FFF)
"""What GPUs make of any NaN."""


def bf16_bits(values: Float32Array) -> npt.NDArray[np.uint16]:
    """Rounded to nearest even, beyond the largest to infinity."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), _BF16_NAN, rounded.astype(np.uint16))


def round_to_bf16(values: Float32Array) -> Float32Array:
    return _widened(bf16_bits(values))


def round_to_f16_saturating(values: Float32Array) -> Float32Array:
    """To nearest even; infinities too become the largest finite value, 65504. A NaN stays one."""
    return values.clip(-_LARGEST_F16, _LARGEST_F16).astype(np.float16).astype(np.float32)


def float_tensor(values: Float32Array, format: str = "F32") -> RawTensor:
    """Dense values as a tensor to pack: exact as F32, rounded to nearest even as F16 or BF16."""
    values = np.ascontiguousarray(values, np.float32)
    match format:
        case "F32":
            raw = values.view(np.uint8)
        case "F16":
            with np.errstate(over="ignore"):  # infinity, as IEEE 754 has it
                raw = values.astype(np.float16).view(np.uint8)
        case "BF16":
            raw = np.ascontiguousarray(bf16_bits(values)).view(np.uint8)
        case _:
            raise PackError(f"float format {format!r}: one of {', '.join(FLOAT_BYTES)} is wanted")
    return RawTensor(format=format, shape=values.shape, data=raw.reshape(len(values), -1))


def float_values(raw: Bytes, format: str) -> Float32Array:
    """Of C-contiguous bytes [..., elements * bytes of one]."""
    match format:
        case "F32":
            return raw.view(np.float32)
        case "F16":
            return raw.view(np.float16).astype(np.float32)
        case _:
            return _widened(raw.view(np.uint16))


def _widened(bits: npt.NDArray[np.uint16]) -> Float32Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
