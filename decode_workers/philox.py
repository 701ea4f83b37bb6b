"""Philox4x32-10, the counter-based generator of Salmon et al., "Parallel Random Numbers: As Easy as
1, 2, 3" (SC 2011): random words are a pure function of (key, counter), in any order, with no state."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

UInt32Array = npt.NDArray[np.uint32]
UInt64Array = npt.NDArray[np.uint64]

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10
_CHUNK = 4096
"""Counters worked on at once: the four buffers of a chunk stay in a core's L2 cache."""


def philox4x32(counters: UInt32Array, key: int) -> UInt32Array:
    """[4, n] random words of [4, n] counters under a 64-bit key (its low half first)."""
    round_keys = _round_keys(key)
    words = np.empty(counters.shape, dtype=np.uint32)
    for start in range(0, counters.shape[1], _CHUNK):
        chunk = counters[:, start : start + _CHUNK].astype(np.uint64)
        # Lanes 0 and 2 are multiplied, lanes 1 and 3 are mixed in; each pair is one array of two rows.
        multiplied, mixed = chunk[0::2].copy(), chunk[1::2].copy()
        product, high = np.empty_like(multiplied), np.empty_like(multiplied)
        for round_key in round_keys:
            np.multiply(multiplied, _MULTIPLIERS, out=product)
            np.right_shift(product, _SHIFT, out=high)
            np.bitwise_xor(high[::-1], mixed, out=multiplied)
            np.bitwise_xor(multiplied, round_key, out=multiplied)
            np.bitwise_and(product[::-1], _LOW, out=mixed)
        words[0::2, start : start + _CHUNK] = multiplied
        words[1::2, start : start + _CHUNK] = mixed
    return words


@lru_cache(maxsize=256)
def _round_keys(key: int) -> tuple[UInt64Array, ...]:
    halves = (key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF)
    return tuple(
        np.array(
            [[(half + round_number * weyl) & 0xFFFFFFFF] for half, weyl in zip(halves, _WEYL, strict=True)],
            dtype=np.uint64,
        )
        for round_number in range(_ROUNDS)
    )
