"""The best items found so far, and the rule of what can still join them."""

import numpy as np

from decode_workers.step_batch import BoolArray
from decode_workers.targeting.scoring import Float64Array
from decode_workers.targeting.wanted import IndexArray, RankArray, WantedTrie


def best_first(scores: Float64Array, ranks: RankArray, count: int) -> IndexArray:
    """Places of the `count` best, best first; of equals, the lower rank."""
    places = None
    if len(scores) > 2 * count:
        edge = np.partition(scores, len(scores) - count)[len(scores) - count]
        places = (scores >= edge).nonzero()[0]
        scores, ranks = scores[places], ranks[places]
    order = np.lexsort((ranks, -scores))[:count]
    return order if places is None else places[order]


class FinishedItems:
    """The k best of what was added, after the penalty of `diversity`.

    With it, an item's score is lowered by so much a better item that begins with the same token. An item
    added moves others of its token down by a place, but takes a place no worse than theirs: so the kth best
    never falls, and what is below it is out for good, whatever is added later.
    """

    def __init__(self, wanted: WantedTrie, k: int, diversity: float) -> None:
        self._wanted = wanted
        self._k = k
        self._diversity = diversity
        self._items = np.zeros(0, dtype=np.intp)
        self._scores = np.zeros(0)
        self._logprobs = np.zeros(0)
        self._edge: tuple[float, int] | None = None
        """Score and rank of the kth best; None while there are fewer."""

    def add(self, items: IndexArray, scores: Float64Array, logprobs: Float64Array) -> None:
        if self._edge is not None and len(items):
            can_join = scores >= self._edge[0]
            items, scores, logprobs = items[can_join], scores[can_join], logprobs[can_join]
        if not len(items):
            return
        items = np.concatenate([self._items, items])
        scores = np.concatenate([self._scores, scores])
        logprobs = np.concatenate([self._logprobs, logprobs])
        ranks = self._wanted.upload_rank[items]
        adjusted = self._adjusted(items, scores, ranks)
        # A penalty may fall on the kth of equals later: they are kept until the end.
        kept = best_first(adjusted, ranks, len(items) if self._diversity else self._k)
        if len(kept) >= self._k:
            last = kept[self._k - 1]
            self._edge = (float(adjusted[last]), int(ranks[last]))
            if self._diversity:
                kept = kept[adjusted[kept] >= adjusted[last]]
        self._items, self._scores, self._logprobs = items[kept], scores[kept], logprobs[kept]

    def best(self) -> tuple[IndexArray, Float64Array]:
        """Sorted items and their log-probabilities, at most k, best first."""
        return self._items[: self._k], self._logprobs[: self._k]

    @property
    def edge_score(self) -> float | None:
        return None if self._edge is None else self._edge[0]

    def is_hopeless(self, scores: Float64Array, least_ranks: RankArray) -> BoolArray:
        """Of paths that scored so far, with the least rank below each: no item there can be of the k best."""
        if self._edge is None:
            return np.zeros(len(scores), dtype=np.bool_)
        score, rank = self._edge
        hopeless: BoolArray = scores < score
        if not self._diversity:
            hopeless |= (scores == score) & (least_ranks > rank)
        return hopeless

    def _adjusted(self, items: IndexArray, scores: Float64Array, ranks: RankArray) -> Float64Array:
        if not self._diversity:
            return scores
        groups = self._wanted.first_tokens(items)
        order = np.lexsort((ranks, -scores, groups))
        sorted_groups = groups[order]
        starts = np.searchsorted(sorted_groups, sorted_groups, side="left")
        adjusted = scores.copy()
        adjusted[order] -= self._diversity * (np.arange(len(items)) - starts)
        return adjusted
