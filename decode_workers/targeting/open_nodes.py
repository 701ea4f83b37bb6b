"""The open list of a beam search that runs its best nodes first, of whatever round they are.

Round by round, `beams` nodes run before anything below them is known. Best first, items are finished early,
and what scores below the kth best of them never runs. The beams are the same: of a round, the best `beams`
children of the beams of the round before. That round may be incomplete, so they are found anew each time,
from what is known by then; a node that loses its place to one that is found later has run in vain.
"""

import numpy as np

from decode_workers.step_batch import BoolArray
from decode_workers.targeting.finished import FinishedItems, best_first
from decode_workers.targeting.scoring import Float64Array
from decode_workers.targeting.search_rows import NO_SLOT, Frontier
from decode_workers.targeting.wanted import IndexArray, RankArray, WantedTrie

_NO_PARENT = -1


class OpenNodes:
    def __init__(self, wanted: WantedTrie, beams: int, first: Frontier) -> None:
        """`first`: the first round's nodes."""
        self.first = first
        self._wanted = wanted
        self._beams = beams
        self._known = first
        """Every node that was scored."""
        num_nodes = len(first.nodes)
        self._ranks = wanted.least_rank[first.nodes]
        self._rounds = np.zeros(num_nodes, dtype=np.intp)
        self._parents = np.full(num_nodes, _NO_PARENT)
        self._is_open = np.ones(num_nodes, dtype=np.bool_)
        self._taken = np.zeros(0, dtype=np.intp)

    @property
    def num_open(self) -> int:
        return int(np.count_nonzero(self._is_open))

    def add(self, children: Frontier, parents: IndexArray) -> None:
        """What the nodes last taken lead to; `parents`: which of them each is below."""
        ranks = self._wanted.least_rank[children.nodes]
        if len(parents) > self._beams:
            kept = _best_of_each(parents, children.scores, ranks, self._beams)
            children, parents, ranks = children.some(kept), parents[kept], ranks[kept]
        above = self._taken[parents]
        self._known = self._known.joined(children)
        self._ranks = np.concatenate([self._ranks, ranks])
        self._rounds = np.concatenate([self._rounds, self._rounds[above] + 1])
        self._parents = np.concatenate([self._parents, above])
        self._is_open = np.concatenate([self._is_open, np.ones(len(above), dtype=np.bool_)])

    def close(self, finished: FinishedItems) -> None:
        """Nodes below which no item can be of the k best need not run."""
        places = self._is_open.nonzero()[0]
        self._is_open[places[finished.is_hopeless(self._known.scores[places], self._ranks[places])]] = False

    def take(self, count: int) -> Frontier:
        """The best open beams; none where the search is done."""
        places = (self._is_open & self._is_beam()).nonzero()[0]
        self._taken = places[best_first(self._known.scores[places], self._ranks[places], count)]
        self._is_open[self._taken] = False
        return self._known.some(self._taken)

    def put_back(self) -> None:
        """What was last taken does not run."""
        self._is_open[self._taken] = True

    def all_open(self) -> Frontier:
        """Best first. With those that are no beams now: they are some if a beam's children are."""
        places = self._is_open.nonzero()[0]
        order = best_first(self._known.scores[places], self._ranks[places], len(places))
        return self._known.some(places[order])

    def held_slots(self) -> IndexArray:
        """Where the KV of open nodes' ancestors is."""
        slots = self._known.paths[self._is_open]
        held: IndexArray = slots[slots != NO_SLOT]
        return held

    def _is_beam(self) -> BoolArray:
        is_beam = np.zeros(len(self._ranks), dtype=np.bool_)
        for number in range(int(self._rounds.max()) + 1):
            places = (self._rounds == number).nonzero()[0]
            if number > 0:
                places = places[is_beam[self._parents[places]]]
            if len(places) > self._beams:
                places = places[best_first(self._known.scores[places], self._ranks[places], self._beams)]
            is_beam[places] = True
        return is_beam


def _best_of_each(parents: IndexArray, scores: Float64Array, ranks: RankArray, count: int) -> IndexArray:
    """Places of the `count` best children of each parent."""
    order = np.lexsort((ranks, -scores, parents))
    sorted_parents = parents[order]
    place = np.arange(len(order)) - np.searchsorted(sorted_parents, sorted_parents, side="left")
    return order[place < count]
