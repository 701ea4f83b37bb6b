"""What copying a piece of KV costs, and which of two ways that chooses. Measured, not assumed.

*Layerwise*: each layer is copied as soon as it is computed, beside the layers behind it. *Whole*: all layers
are copied at once, behind the forward pass. For a model of L layers and a piece of n tokens, with

    start_us    host time to start a copy, in microseconds, whether of one layer or of all
    token_us    time on the way of one layer's KV of one token, gathered and transferred, in microseconds

the last byte is there

    layerwise   n * token_us        behind the forward pass: the last layer's, the others' are hidden by it
    whole       L * n * token_us    behind it

so layerwise saves (L - 1) * n * token_us. It starts L copies, not one, and does so between layers, where the
host's time is the forward pass's whenever the GPU has nothing else to do: (L - 1) * start_us. What a copy
takes besides, however short it is, comes once behind the forward pass either way. So a piece is copied
layerwise where n * token_us > start_us: where a layer's copy takes longer than to start it.
"""

import math
import time
from collections.abc import Callable

import msgspec

Finish = Callable[[], None]
"""Waits until what was to be copied is in the staging memory."""

_MOST_TOKENS = 4096
"""Of a copy that is measured; a quarter of that is the other size."""
_FEWEST_REPEATS, _MOST_REPEATS = 3, 30
_SIZE_BUDGET_S = 0.05
"""No further repeat of a size begins behind this."""
_NO_PIECE_TOKENS = 1 << 24


class CopyCosts(msgspec.Struct, frozen=True, kw_only=True):
    """Of one rank's share of the KV heads."""

    start_us: float
    token_us: float
    """Of one layer."""

    def layerwise_tokens(self, num_layers: int) -> int | None:
        """The shortest piece that is copied layerwise. None: none is."""
        if num_layers == 1 or self.start_us >= _NO_PIECE_TOKENS * self.token_us:
            return None
        return math.floor(self.start_us / self.token_us) + 1


def measure_copies(
    start: Callable[[int], Finish], longest_tokens: int, clock_s: Callable[[], float] = time.perf_counter
) -> CopyCosts:
    """`start` starts the copy of one layer of so many tokens, of which there may be `longest_tokens`.

    The least of several repeats counts. `token_us` is what more tokens take more, so neither starting a copy
    nor waiting for it is in it.
    """
    long = min(_MOST_TOKENS, longest_tokens)
    short = long // 4
    if short == 0:
        return CopyCosts(start_us=0.0, token_us=0.0)
    start_s, short_s = _least(lambda: start(short), clock_s)
    _, long_s = _least(lambda: start(long), clock_s)
    return CopyCosts(start_us=start_s * 1e6, token_us=max(long_s - short_s, 0.0) * 1e6 / (long - short))


def _least(start: Callable[[], Finish], clock_s: Callable[[], float]) -> tuple[float, float]:
    """To start a copy, and until it is done."""
    start()()  # memory that later ones have again
    start_s, done_s = math.inf, math.inf
    end_s = clock_s() + _SIZE_BUDGET_S
    for repeat in range(_MOST_REPEATS):
        if repeat >= _FEWEST_REPEATS and clock_s() >= end_s:
            break
        begin_s = clock_s()
        finish = start()
        start_s = min(start_s, clock_s() - begin_s)
        finish()
        done_s = min(done_s, clock_s() - begin_s)
    return start_s, done_s
