import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megakernel.quantize import fake_quantize, quantize_rows

ROWS = arrays(np.float32, (2, 64), elements=st.floats(-1e6, 1e6, width=32))


@given(ROWS)
def test_each_element_is_off_by_at_most_half_a_step(x):
    values, scales = quantize_rows(x)
    assert values.dtype == np.int8
    assert scales.shape == (2, 2)
    assert np.abs(values.astype(int)).max() <= 127
    step = np.repeat(scales, 32, axis=1).astype(np.float64)
    assert (np.abs(fake_quantize(x) - x) <= step * 0.5001 + 1e-30).all()


@given(ROWS)
def test_rows_and_blocks_are_independent(x):
    values, scales = quantize_rows(x)
    alone = quantize_rows(x[1:, 32:])
    np.testing.assert_array_equal(values[1:, 32:], alone[0])
    np.testing.assert_array_equal(scales[1:, 1:], alone[1])


def test_halves_round_to_even_and_the_maximum_to_127():
    x = np.zeros(32, dtype=np.float32)
    x[:6] = [127, 0.5, 1.5, 2.5, -0.5, -1.5]
    values, scales = quantize_rows(x)
    assert values[:6].tolist() == [127, 0, 2, 2, 0, -2]
    assert scales.tolist() == [1.0]


@pytest.mark.parametrize("value", [0.0, 1e-44, 1e-38])
def test_blocks_of_nothing_are_zeros(value):
    x = np.full(32, value, dtype=np.float32)
    values, scales = quantize_rows(x)
    assert not values.any()
    assert not scales.any()


def test_rows_of_part_blocks_are_refused():
    with pytest.raises(ValueError, match="33 elements are not whole blocks of 32"):
        quantize_rows(np.zeros(33, dtype=np.float32))
