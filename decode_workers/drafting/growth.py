"""One sequence's draft tree, grown best first over what all sources guess."""

import heapq
from collections.abc import Sequence as SequenceOf

from cluster.messages import Record
from decode_workers.draft_tree import NO_DRAFT, DraftTree
from decode_workers.drafting.place import Place, Source
from decode_workers.drafting.rates import MOST_LIKELY, Rates
from decode_workers.step_batch import NO_PARENT


class Found(Record, frozen=True, gc=False):
    """A place that a source found for the text, or for the text and some nodes of its tree."""

    source: Source
    place: Place


class _Candidate(Record, frozen=True, gc=False):
    token_id: int
    parent: int
    depth: int
    estimate: float
    found: SequenceOf[Found]


class TreeGrowth:
    """Takes the likeliest node next, so that any number of them is the best tree of that many.

    A node's estimate is that of its whole path: the expected tokens that its row brings. Sources that guess
    the same token at the same place share one node; they look at much the same text, so its probability is
    the surest one's, not what independent guesses would come to.
    """

    def __init__(
        self,
        found: SequenceOf[Found],
        rates: Rates,
        *,
        max_nodes: int,
        max_depth: int,
        barred: frozenset[int] = frozenset(),
    ) -> None:
        """`barred` tokens end the sequence: a row behind one brings nothing."""
        self._rates = rates
        self._max_nodes = max_nodes
        self._max_depth = max_depth
        self._barred = barred
        self._open: list[tuple[float, int, _Candidate]] = []
        """A heap, of equals the first pushed first."""
        self._num_pushed = 0
        self._token_ids: list[int] = []
        self._parents: list[int] = []
        self.estimates: list[float] = []
        """[nodes] never rising."""
        self._push_children(found, NO_PARENT, 0, 1.0)

    @property
    def best(self) -> float:
        """The next node's estimate; 0: there is none, or no room."""
        if not self._open or len(self._token_ids) == self._max_nodes:
            return 0.0
        return -self._open[0][0]

    def take(self) -> None:
        """Add the next node."""
        _, _, candidate = heapq.heappop(self._open)
        node = len(self._token_ids)
        self._token_ids.append(candidate.token_id)
        self._parents.append(candidate.parent)
        self.estimates.append(candidate.estimate)
        self._push_children(candidate.found, node, candidate.depth, candidate.estimate)

    def tree(self, num_nodes: int) -> DraftTree:
        """Of the first so many nodes taken."""
        if num_nodes == 0:
            return NO_DRAFT
        return DraftTree(
            token_ids=tuple(self._token_ids[:num_nodes]), parents=tuple(self._parents[:num_nodes])
        )

    def _push_children(self, found: SequenceOf[Found], parent: int, depth: int, estimate: float) -> None:
        if depth == self._max_depth:
            return
        chances: dict[int, float] = {}
        places: dict[int, list[Found]] = {}
        for one in found:
            source, place = one.source, one.place
            rate = self._rates.rate(source, place.length)
            for guess in place.guesses():
                token_id = guess.token_id
                chances[token_id] = max(chances.get(token_id, 0.0), min(guess.share * rate, MOST_LIKELY))
                places.setdefault(token_id, []).append(Found(source, guess.place))
        # One of the siblings at most is right, whatever each source claims for its own.
        scale = estimate / max(1.0, sum(chances.values()))
        for token_id, chance in chances.items():
            if token_id not in self._barred:
                path = chance * scale
                candidate = _Candidate(token_id, parent, depth + 1, path, places[token_id])
                heapq.heappush(self._open, (-path, self._num_pushed, candidate))
                self._num_pushed += 1
