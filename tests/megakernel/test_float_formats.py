"""Rounding is PyTorch's, to the bit, for every float32 there is a kind of."""

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megakernel.float_formats import (
    float_tensor,
    float_values,
    round_to_bf16,
    round_to_f16_saturating,
)

SPECIAL = [
    *(0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000),  # zeros, subnormals
    *(0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF),  # infinities, NaN
    *(0x7F7FFFFF, 0x7F7F7FFF, 0x7F7F8000, 0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001),  # largest, ties
    *(0x477FE000, 0x477FEFFF, 0x477FF000, 0x47800000, 0xC77FF000),  # 65504, below and at 65520, 65536
    *(0x33800000, 0x33000000, 0x33000001, 0x33C00000, 0x387FC000, 0x387FE000),  # subnormals of float16
]


def floats_of(bits) -> np.ndarray:
    return np.array(bits, dtype=np.uint32).view(np.float32)


def assert_same_bits(actual: np.ndarray, expected: torch.Tensor) -> None:
    """Of NaNs only that they are such: PyTorch's payload depends on the CPU."""
    wanted = expected.float().numpy()
    assert actual.dtype == np.float32
    is_nan = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(actual), is_nan)
    np.testing.assert_array_equal(actual[~is_nan].view(np.uint32), wanted[~is_nan].view(np.uint32))


BITS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40)


@given(BITS)
@example(SPECIAL)
@settings(max_examples=300, deadline=None)
def test_bf16_is_pytorchs(bits):
    values = floats_of(bits)
    assert_same_bits(round_to_bf16(values), torch.from_numpy(values).to(torch.bfloat16))


@given(BITS)
@example(SPECIAL)
@settings(max_examples=300, deadline=None)
def test_f16_is_pytorchs_within_its_range_and_saturates_beyond(bits):
    values = floats_of(bits)
    clamped = torch.from_numpy(values).clamp(-65504, 65504)
    assert_same_bits(round_to_f16_saturating(values), clamped.to(torch.float16))


@given(bits=st.lists(st.integers(0x30000000, 0x48000000), min_size=40, max_size=40))
@settings(max_examples=200, deadline=None)
def test_f16_around_its_subnormals_and_its_largest(bits):
    values = floats_of(bits)
    clamped = torch.from_numpy(values).clamp(-65504, 65504)
    assert_same_bits(round_to_f16_saturating(values), clamped.to(torch.float16))
    assert_same_bits(round_to_f16_saturating(-values), -clamped.to(torch.float16))


def test_a_tensor_to_pack_holds_what_rounding_gives():
    values = floats_of(SPECIAL).reshape(1, -1)
    bf16 = float_tensor(values, "BF16")
    assert (bf16.format, bf16.shape, bf16.data.shape) == ("BF16", values.shape, (1, 2 * values.size))
    np.testing.assert_array_equal(float_values(bf16.data, "BF16"), round_to_bf16(values))
    half = float_values(float_tensor(values, "F16").data, "F16")
    assert_same_bits(half, torch.from_numpy(values).to(torch.float16))
    exact = float_values(float_tensor(values).data, "F32")
    np.testing.assert_array_equal(exact.view(np.uint32), values.view(np.uint32))
