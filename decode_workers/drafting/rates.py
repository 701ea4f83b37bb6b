"""How often guesses come true, by who made them and how much text matched: measured, and soon forgotten.

Every emitted token is compared with what was guessed at its place, whether the guess had a row or not: a
source that was wrong for a while is heard again as soon as it is right, without rows spent on probing.
"""

from collections import OrderedDict

from decode_workers.drafting.place import Source

MOST_LIKELY = 0.98
"""No guess is worth more."""
_BUCKET_OF = (0, 0, 1, 2, 3, 4, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 8)
"""By length of the match; beyond, the last."""
NUM_BUCKETS = _BUCKET_OF[-1] + 1
_PRIORS = {
    Source.NGRAM: (0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9),
    Source.HISTORY: (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.95),
    Source.PHRASES: (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9),
}
"""Before anything is measured."""
_PRIOR_WEIGHT = 4.0
"""Guesses that a prior counts for."""
_KEPT = 0.98
"""Of a measurement's weight with each one after it: some fifty count."""


class Rates:
    """Of one campaign: how often guesses come true, over how often their shares say so."""

    __slots__ = ("_expected", "_right")

    def __init__(self) -> None:
        self._expected = [[_PRIOR_WEIGHT] * NUM_BUCKETS for _ in Source]
        self._right = [[_PRIOR_WEIGHT * rate for rate in _PRIORS[source]] for source in Source]

    def rate(self, source: Source, length: int) -> float:
        """What a guess's share is multiplied by; may be above 1."""
        bucket = _bucket(length)
        return self._right[source][bucket] / self._expected[source][bucket]

    def observe(self, source: Source, length: int, shares: float, *, is_right: bool) -> None:
        """Of the guesses of one place, whose shares add up to `shares`, one was right or none."""
        bucket = _bucket(length)
        expected, right = self._expected[source], self._right[source]
        expected[bucket] = expected[bucket] * _KEPT + shares
        right[bucket] = right[bucket] * _KEPT + is_right


class RateBook:
    """Of the campaigns that were asked for last."""

    def __init__(self, max_campaigns: int = 1024) -> None:
        self._max_campaigns = max_campaigns
        self._rates: OrderedDict[tuple[str, str], Rates] = OrderedDict()

    def of(self, tenant: str, campaign: str) -> Rates:
        key = (tenant, campaign)
        rates = self._rates.get(key)
        if rates is None:
            rates = self._rates[key] = Rates()
            if len(self._rates) > self._max_campaigns:
                self._rates.popitem(last=False)
        else:
            self._rates.move_to_end(key)
        return rates


def _bucket(length: int) -> int:
    return _BUCKET_OF[length] if length < len(_BUCKET_OF) else NUM_BUCKETS - 1
