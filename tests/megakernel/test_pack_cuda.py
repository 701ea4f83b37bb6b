"""Packing for tensor cores keeps every value, and puts it where the lane that multiplies it looks."""

import struct

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.float_formats import float_tensor, float_values
from megakernel.group_formats import GROUP_FORMATS, dequantize_groups, quantize_groups
from megakernel.model.weights import RawTensor
from megakernel.pack_cuda import (
    PACKED_FORMATS,
    common_format,
    group_bytes,
    pack_linear,
    unit_bytes,
    unit_k,
    unpack,
)
from megakernel.packing import PackError

FILE_FORMATS = ("Q4_0", "Q4_1", "Q8_0")
UNIT_BYTES = {
    "Q4_0": 576,
    "Q4_1": 640,
    "Q8_0": 1088,
    "W4G128": 1088,
    "W8G128": 2080,
    "BF16": 2048,
    "F16": 2048,
}


def tensor(format: str, rows: int, columns: int, seed: int = 0) -> RawTensor:
    values = np.random.default_rng(seed).normal(0.002, 0.02, (rows, columns)).astype(np.float32)
    if format in GROUP_FORMATS:
        return quantize_groups(values, format)
    if format not in FILE_FORMATS:
        return float_tensor(values, format)
    data = gguf.quantize(values, gguf.GGMLQuantizationType[format])
    return RawTensor(format=format, shape=(rows, columns), data=data)


def dense(raw: RawTensor) -> np.ndarray:
    if raw.format in GROUP_FORMATS:
        return dequantize_groups(raw)
    if raw.format not in FILE_FORMATS:
        return float_values(raw.data, raw.format)
    return gguf.dequantize(raw.data, gguf.GGMLQuantizationType[raw.format]).reshape(raw.shape)


@st.composite
def shapes(draw, format: str) -> tuple[int, int]:
    """Any rows; any K that the format can have, rarely whole units."""
    step = 32 if format in FILE_FORMATS else 1
    return draw(st.integers(1, 70)), step * draw(st.integers(1, 400 // step))


@pytest.mark.parametrize("format", PACKED_FORMATS)
@given(data=st.data(), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_values_are_those_stored_padded_with_zeros(format, data, seed):
    rows, columns = data.draw(shapes(format))
    raw = tensor(format, rows, columns, seed)
    packed = pack_linear([raw])
    values = unpack(packed)
    assert values.shape == (packed.out_features, columns)
    assert packed.out_features == -(-rows // 16) * 16
    assert len(packed.data) == packed.out_features // 16 * group_bytes(format, columns)
    np.testing.assert_array_equal(values[:rows], dense(raw))
    assert not values[rows:].any()


@pytest.mark.parametrize("format", PACKED_FORMATS)
@given(parts=st.lists(st.integers(1, 40), min_size=2, max_size=4), blocks=st.integers(1, 7))
@settings(max_examples=15, deadline=None)
def test_joined_tensors_follow_each_other(format, parts, blocks):
    tensors = [tensor(format, rows, 32 * blocks, seed) for seed, rows in enumerate(parts)]
    values = unpack(pack_linear(tensors))
    np.testing.assert_array_equal(values[: sum(parts)], np.concatenate([dense(each) for each in tensors]))


@pytest.mark.parametrize("format", PACKED_FORMATS)
@given(rows=st.integers(1, 70), blocks=st.integers(1, 7))
@settings(max_examples=15, deadline=None)
def test_gate_and_up_alternate(format, rows, blocks):
    gate, up = (tensor(format, rows, 32 * blocks, seed) for seed in (1, 2))
    groups = -(-rows // 16)
    values = unpack(pack_linear([gate, up], swiglu_group=16)).reshape(groups, 2, 16, -1)
    for half, raw in enumerate((gate, up)):
        found = values[:, half].reshape(16 * groups, -1)
        np.testing.assert_array_equal(found[:rows], dense(raw))
        assert not found[rows:].any()


def value_in_fragment(format: str, unit: bytes, lane: int, s: int, i: int, e: int, column: int, k: int):
    """Element e of register i of a lane at step s, as the kernels' contract has it, byte by byte."""

    def halves(at: int, count: int = 1) -> list[np.float32]:
        return [np.float32(value) for value in struct.unpack_from(f"<{count}e", unit, at)]

    if format in ("BF16", "F16"):
        raw = unit[512 * s + 16 * lane + 4 * i + 2 * e :][:2]
        return struct.unpack("<f", b"\0\0" + raw)[0] if format == "BF16" else struct.unpack("<e", raw)[0]
    if format in ("Q8_0", "W8G128"):
        number = unit[512 * (s // 2) + 16 * lane + 8 * (s % 2) + 2 * i + e] - 128
        scales = 1024 + 2 * ((column % 8 * 2 + k // 32) * 2 + column // 8)
        if format == "W8G128":
            scales = 2048 + 2 * (column % 8 * 2 + column // 8)
        return halves(scales)[0] * np.float32(number)
    word = struct.unpack_from("<I", unit, 512 * (s // 4) + 16 * lane + 4 * (s % 4))[0]
    number = np.float32(word >> 16 * e + 4 * i & 15)
    if format == "Q4_0":
        return halves(512 + 2 * ((column % 8 * 2 + k // 32) * 2 + column // 8))[0] * (number - 8)
    scales = 512 + 4 * ((column % 8 * 2 + k // 32) * 2 + column // 8)
    if format == "W4G128":
        scales = 1024 + 4 * (column % 8 * 2 + column // 8)
    scale, least = halves(scales, 2)
    return scale * number + least


@pytest.mark.parametrize("format", PACKED_FORMATS)
def test_each_element_is_in_the_register_that_multiplies_it(format):
    size, units, groups = unit_k(format), 2, 2
    raw = tensor(format, 16 * groups, size * units)
    expected, packed = dense(raw), pack_linear([raw]).data.tobytes()
    assert unit_bytes(format) == UNIT_BYTES[format]
    assert len(packed) == groups * units * UNIT_BYTES[format] == groups * group_bytes(format, size * units)
    seen = np.zeros(expected.shape, dtype=int)
    for c in range(groups):
        for u in range(units):
            unit = packed[(c * units + u) * UNIT_BYTES[format] :][: UNIT_BYTES[format]]
            for lane in range(32):
                g, t = lane // 4, lane % 4
                for s, i, e in np.ndindex(size // 16, 4, 2):
                    column = g + 8 * (i & 1)
                    k = 32 * (s // 2) + 8 * t + 4 * (s % 2) + 2 * (i >> 1) + e
                    n, at = 16 * c + column, size * u + k
                    found = value_in_fragment(format, unit, lane, s, i, e, column, k)
                    assert found == expected[n, at], (n, at)
                    seen[n, at] += 1
    assert (seen == 1).all()


def test_padding_is_whole_blocks_of_zeros():
    units = pack_linear([tensor("Q8_0", 16, 32)]).data.reshape(1, UNIT_BYTES["Q8_0"])
    assert (units[0, 512:1024] == 128).all()
    scales = units[0, 1024:].view(np.float16).reshape(8, 2, 2)
    assert scales[:, 0].any()
    assert not scales[:, 1].any()
    floats = pack_linear([tensor("BF16", 16, 16)]).data
    assert floats[:1024].any()
    assert not floats[1024:].any()


@pytest.mark.parametrize(
    ("parts", "swiglu_group", "complaint"),
    [
        ([("Q4_1", 16, 64), ("Q8_0", 16, 64)], None, "'Q4_1', 'Q8_0'"),
        ([("F32", 16, 64)], None, "format F32: one of Q4_0, "),
        ([("BF16", 16, 64), ("BF16", 32, 64)], 16, r"\[16, 32\] rows"),
        ([("BF16", 16, 64), ("BF16", 16, 64)], 8, "groups of 8"),
    ],
)
def test_what_makes_no_matrix_is_refused(parts, swiglu_group, complaint):
    with pytest.raises(PackError, match=complaint):
        pack_linear([tensor(*part) for part in parts], swiglu_group=swiglu_group)


def test_rows_that_end_within_a_block_of_a_file_are_refused():
    raw = RawTensor(format="Q4_0", shape=(16, 48), data=np.zeros((16, 27), np.uint8))
    with pytest.raises(PackError, match="48 input features: a multiple of 32"):
        pack_linear([raw])


@pytest.mark.parametrize(
    ("formats", "in_features", "packed"),
    [
        (["Q4_0"], 64, "Q4_0"),
        (["Q4_0"], 48, "BF16"),
        (["W4G128", "W4G128"], 48, "W4G128"),
        (["F16", "F16", "F16"], 48, "F16"),
        (["F16", "F16", "BF16"], 48, "BF16"),
        (["Q4_1", "Q4_1", "Q8_0"], 64, "BF16"),
        (["F32"], 64, "BF16"),
        (["Q6_K", "Q6_K"], 256, "BF16"),
    ],
)
def test_an_op_is_packed_as_stored_or_as_bf16(formats, in_features, packed):
    assert common_format(formats, in_features) == packed
