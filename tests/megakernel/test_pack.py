"""Packing keeps every value, puts rows where ops expect them, and refuses what kernels cannot read."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.float_formats import float_tensor
from megakernel.model.weights import RawTensor
from megakernel.pack import PACKED_FORMATS, QUANTIZED_FORMATS, pack_linear, unpack
from megakernel.packing import PackError


def tensor(format: str, rows: int, columns: int, seed: int = 0) -> RawTensor:
    values = np.random.default_rng(seed).normal(0, 0.02, (rows, columns)).astype(np.float32)
    if format not in QUANTIZED_FORMATS:
        return float_tensor(values, format)
    data = gguf.quantize(values, gguf.GGMLQuantizationType[format])
    return RawTensor(format=format, shape=(rows, columns), data=data)


def dense(raw: RawTensor) -> np.ndarray:
    return gguf.dequantize(raw.data, gguf.GGMLQuantizationType[raw.format]).reshape(raw.shape)


@pytest.mark.parametrize("format", PACKED_FORMATS)
@given(rows=st.integers(1, 50), blocks=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_values_are_the_files_padded_with_zeros(format, rows, blocks, seed):
    raw = tensor(format, rows, 32 * blocks, seed)
    packed = pack_linear([raw])
    values = unpack(packed)
    assert packed.out_features == -(-rows // 16) * 16
    assert packed.data.ctypes.data % 64 == 0
    np.testing.assert_array_equal(values[:rows], dense(raw))
    assert not values[rows:].any()


@pytest.mark.parametrize("format", PACKED_FORMATS)
def test_query_key_and_value_follow_each_other(format):
    parts = [tensor(format, rows, 64, rows) for rows in (48, 16, 24)]
    values = unpack(pack_linear(parts))
    np.testing.assert_array_equal(values[:88], np.concatenate([dense(part) for part in parts]))


@pytest.mark.parametrize("format", PACKED_FORMATS)
def test_gate_and_up_alternate(format):
    gate, up = tensor(format, 40, 64, 1), tensor(format, 40, 64, 2)
    values = unpack(pack_linear([gate, up], swiglu_group=16)).reshape(3, 2, 16, 64)
    np.testing.assert_array_equal(values[:, 0].reshape(48, 64)[:40], dense(gate))
    np.testing.assert_array_equal(values[:, 1].reshape(48, 64)[:40], dense(up))
    assert not values[2, :, 8:].any()


def test_float_formats_take_any_number_of_columns():
    for format in ("F16", "BF16", "F32"):
        raw = tensor(format, 17, 37)
        np.testing.assert_array_equal(unpack(pack_linear([raw]))[:17], dense(raw))


def test_bf16_rounds_to_nearest_even():
    values = np.array([[1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-20]], np.float32)
    wanted = np.array([[1.0, 1.0, 1 + 2**-6, -1 - 2**-7]], np.float32)
    np.testing.assert_array_equal(unpack(pack_linear([float_tensor(values, "BF16")]))[:1], wanted)


@pytest.mark.parametrize(
    ("parts", "swiglu_group", "complaint"),
    [
        ([], None, "exactly one is wanted"),
        ([("Q4_1", 16, 64), ("Q8_0", 16, 64)], None, "'Q4_1', 'Q8_0'"),
        ([("F32", 16, 64), ("F32", 16, 32)], None, "equal in_features"),
        ([("F32", 16, 64), ("F32", 32, 64)], 16, r"\[16, 32\] rows"),
        ([("F32", 16, 64)], 16, "equal gate and up"),
        ([("F32", 16, 64), ("F32", 16, 64)], 8, "groups of 8"),
    ],
)
def test_what_makes_no_matrix_is_refused(parts, swiglu_group, complaint):
    with pytest.raises(PackError, match=complaint):
        pack_linear([tensor(*part) for part in parts], swiglu_group=swiglu_group)


def test_formats_without_kernels_are_refused():
    raw = RawTensor(format="Q6_K", shape=(16, 256), data=np.zeros((16, 210), np.uint8))
    with pytest.raises(PackError, match="Q6_K"):
        pack_linear([raw])
    with pytest.raises(PackError, match="F64"):
        float_tensor(np.zeros((1, 32), np.float32), "F64")
