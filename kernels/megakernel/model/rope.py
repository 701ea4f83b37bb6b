"""RoPE frequencies: the one place that turns a model's shape into angles a position."""

import numpy as np
import numpy.typing as npt

from megakernel.model.shape import ModelShape, RopeScaling


def base_frequencies(head_dim: int, rope_theta: float) -> npt.NDArray[np.float64]:
    """`[head_dim / 2]` radians a position, before any scaling."""
    return np.asarray(rope_theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim))


def llama3_divisors(scaling: RopeScaling, frequencies: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """What Llama 3 divides each frequency by: 1 for short wavelengths, `factor` for long ones.

    Between the two limits the scaled and the unscaled frequency are blended linearly in
    original_max_position / wavelength.
    """
    turns = scaling.original_max_position * frequencies / (2 * np.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - blend) / scaling.factor + blend))


def rope_frequencies(shape: ModelShape) -> npt.NDArray[np.float64]:
    """`[head_dim / 2]` radians a position, scaled as in training; pair i is (i, i + head_dim / 2)."""
    frequencies = base_frequencies(shape.head_dim, shape.rope_theta)
    if shape.rope_scaling is not None:
        return frequencies / llama3_divisors(shape.rope_scaling, frequencies)
    if shape.rope_divisors is not None:
        return frequencies / np.asarray(shape.rope_divisors, dtype=np.float64)
    return frequencies
