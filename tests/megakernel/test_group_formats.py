"""Group formats: what is stored is what the module says, and as near to the values as rounding can be."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.group_formats import (
    GROUP_FORMATS,
    GroupQuantizedWeights,
    dequantize_groups,
    quantize_groups,
)
from megakernel.model.weights import StoredWeights
from tests.tiny_model import tiny_weights

BLOCK_BYTES = {"W4G128": 68, "W8G128": 130}


def normal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.003, 0.02, (rows, columns)).astype(np.float32)


def value_at(tensor, row: int, column: int) -> np.float32:
    size = BLOCK_BYTES[tensor.format]
    block = bytes(tensor.data[row, column // 128 * size : (column // 128 + 1) * size])
    at = column % 128
    if tensor.format == "W4G128":
        scale, least = struct.unpack_from("<ee", block)
        number = block[4 + at % 64] >> 4 * (at // 64) & 15
        return np.float32(scale) * np.float32(number) + np.float32(least)
    scale, number = struct.unpack_from("<e", block)[0], struct.unpack_from("b", block, 2 + at)[0]
    return np.float32(scale) * np.float32(number)


@pytest.mark.parametrize("format", GROUP_FORMATS)
@pytest.mark.parametrize("columns", [128, 256, 200, 40])
def test_blocks_are_laid_out_as_said(format, columns):
    tensor = quantize_groups(normal(3, columns), format)
    assert tensor.data.shape == (3, -(-columns // 128) * BLOCK_BYTES[format])
    values = dequantize_groups(tensor)
    assert (values.shape, values.dtype) == ((3, columns), np.float32)
    expected = [[value_at(tensor, row, column) for column in range(columns)] for row in range(3)]
    np.testing.assert_array_equal(values, np.array(expected))


@pytest.mark.parametrize(("format", "num_steps"), [("W4G128", 15), ("W8G128", 254)])
@given(columns=st.integers(1, 300), seed=st.integers(0, 99), scale=st.sampled_from([1e-3, 1.0, 1e3]))
@settings(max_examples=40, deadline=None)
def test_no_value_moves_by_more_than_half_a_step(format, num_steps, columns, seed, scale):
    values = normal(4, columns, seed) * np.float32(scale)
    error = np.abs(dequantize_groups(quantize_groups(values, format)) - values)
    for start in range(0, columns, 128):
        group = values[:, start : start + 128]
        reach = np.ptp(group, axis=1) if format == "W4G128" else 2 * np.abs(group).max(axis=1)
        # Scale and minimum are float16 themselves, the scale's rounding 127 times over.
        allowed = 0.5 * reach / num_steps + 2**-10 * np.abs(group).max(axis=1) + 128 * 2**-25
        assert (error[:, start : start + 128] <= allowed[:, None]).all()


def test_what_a_group_can_stand_for_stays_as_it_is():
    rng = np.random.default_rng(1)
    numbers = rng.integers(0, 16, (5, 256))
    numbers[:, [0, 128]], numbers[:, [1, 129]] = 0, 15
    values = (numbers * 0.25 - 1.75).astype(np.float32)
    np.testing.assert_array_equal(dequantize_groups(quantize_groups(values, "W4G128")), values)
    signed = rng.integers(-127, 128, (5, 256))
    signed[:, [7, 130]] = -127
    values = (signed * 2**-9).astype(np.float32)
    np.testing.assert_array_equal(dequantize_groups(quantize_groups(values, "W8G128")), values)


@pytest.mark.parametrize("format", GROUP_FORMATS)
def test_groups_without_any_range(format):
    flat = np.full((2, 130), 0.5, np.float32)
    np.testing.assert_allclose(dequantize_groups(quantize_groups(flat, format)), flat, rtol=1e-3)
    assert not dequantize_groups(quantize_groups(np.zeros((2, 130), np.float32), format)).any()


def test_of_other_weights_the_named_matrices_are_rounded():
    weights = tiny_weights(1, hidden_size=128)
    quantized = GroupQuantizedWeights(weights, {"layers.0.q": "W4G128", "layers.1.down": "W8G128"})
    assert isinstance(quantized, StoredWeights)
    assert quantized.formats["layers.0.q"] == "W4G128"
    assert quantized.formats["layers.0.k"] == "F32"
    for name in ("layers.0.q", "layers.1.down"):
        np.testing.assert_array_equal(quantized.dense(name), dequantize_groups(quantized.raw(name)))
        assert 0 < np.abs(quantized.dense(name) - weights.dense(name)).max() < 0.1
    np.testing.assert_array_equal(quantized.dense("embed"), weights.dense("embed"))
    assert quantized.raw("embed").format == "F32"
