"""Activations as int8 in blocks, as every executor quantizes them before a product with quantized weights."""

import numpy as np
import numpy.typing as npt

QUANTIZED_FORMATS = frozenset({"Q4_0", "Q4_1", "Q8_0"})
"""Weight formats whose products take quantized activations; with any other, activations stay float32."""

BLOCK = 32
"""Elements along K that share a scale."""

_LARGEST = np.float32(127)


def quantize_rows(x: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Of float32 [..., K]: int8 [..., K] and scales [..., K / 32]; K is a multiple of 32.

    Rounds half to even. A block so small that 127 / its maximum is not a float32 counts as zeros.
    """
    assert x.dtype == np.float32, x.dtype
    if x.shape[-1] % BLOCK:
        raise ValueError(f"rows of {x.shape[-1]} elements are not whole blocks of {BLOCK}")
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    largest = np.abs(blocks).max(axis=-1)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = _LARGEST / largest
    is_zero = ~np.isfinite(inverse)
    scales = np.where(is_zero, np.float32(0), largest / _LARGEST)
    inverse = np.where(is_zero, np.float32(0), inverse)
    rounded = np.rint(blocks * inverse[..., None])
    return rounded.astype(np.int8).reshape(x.shape), scales


def fake_quantize(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """What the int8 values stand for: exact products of scale and value."""
    values, scales = quantize_rows(x)
    blocks = values.reshape(*x.shape[:-1], -1, BLOCK).astype(np.float64)
    return np.asarray((blocks * scales[..., None]).reshape(x.shape), dtype=np.float64)
