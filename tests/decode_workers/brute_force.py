"""Targeting by brute force: sets of prefixes for a trie, and all that could come out within rounding."""

import itertools
from collections.abc import Iterable, Sequence

import torch

from tests.decode_workers.plain_model import PlainLlama

Path = tuple[int, ...]
Scored = tuple[float, Path]

TOLERANCE = 2e-4
"""Log-probabilities of float32 arithmetic and of float64 are this near."""
_MOST_RESULTS = 512


class PrefixSets:
    """Of items' paths, each with its end: what may follow every prefix, and how many items are below it."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = sorted(paths)
        self.following: dict[Path, set[int]] = {}
        self.num_below: dict[Path, int] = {}
        for path in self.paths:
            for depth, token in enumerate(path):
                self.following.setdefault(path[:depth], set()).add(token)
                self.num_below[path[:depth]] = self.num_below.get(path[:depth], 0) + 1
            self.num_below[path] = 1


class BruteForce:
    """One context's log-probabilities over one catalogue."""

    def __init__(self, model: PlainLlama, context: Sequence[int], items: PrefixSets, scoring: str) -> None:
        self.model = model
        self.context = tuple(context)
        self.items = items
        self.scoring = scoring
        self._known: dict[Path, dict[int, float]] = {}

    def scores(self, paths: Sequence[Path]) -> list[float]:
        """Of whole items, by running each."""
        found: list[float] = []
        for start in range(0, len(paths), 256):
            part = paths[start : start + 256]
            logits = self.model.logits([self.context + path for path in part])
            for row, path in zip(logits, part, strict=True):
                found.append(
                    sum(
                        self._logprobs(row[len(self.context) - 1 + depth], path[:depth])[token]
                        for depth, token in enumerate(path)
                    )
                )
        return found

    def ranking_of_all(self) -> list[Scored]:
        scores = self.scores(self.items.paths)
        return sorted(zip(scores, self.items.paths, strict=True), reverse=True)

    def beam_search(self, k: int, beams: int) -> list[list[Scored]]:
        """Every ranking that rounding allows: mostly one, more where a beam's last place is nearly a tie.

        One that ends takes a place among the best `beams` of its round; as many others go on, while one of
        them may still become one of the k best. What is ranked behind those may be cut short.
        """
        runs: list[tuple[list[Scored], list[Scored]]] = [([], [(0.0, ())])]
        while any(frontier for _, frontier in runs):
            after: dict[tuple[frozenset[Path], frozenset[Path]], tuple[list[Scored], list[Scored]]] = {}
            for finished, frontier in runs:
                candidates = sorted(self._children(frontier), reverse=True)
                others = [one for one in candidates if not self._has_ended(one[1])]
                for best, going_on in itertools.product(_cuts(candidates, beams), _cuts(others, beams)):
                    all_finished = finished + [(s, self._item(p)) for s, p in best if self._has_ended(p)]
                    if going_on and len(all_finished) >= k:
                        kth = sorted(all_finished, reverse=True)[k - 1][0]
                        going_on = [] if going_on[0][0] < kth - 4 * TOLERANCE else going_on
                    key = frozenset(p for _, p in all_finished), frozenset(p for _, p in going_on)
                    after[key] = all_finished, going_on
            runs = list(after.values())
            assert len(runs) <= _MOST_RESULTS, "too many near-ties to tell apart"
        return [sorted(finished, reverse=True) for finished, _ in runs]

    def _children(self, frontier: list[Scored]) -> list[Scored]:
        """A chain of only children is one step under `catalogue` scoring: it costs no probability."""
        nodes = []
        for score, prefix in frontier:
            while self.scoring == "catalogue" and prefix and len(self.items.following[prefix]) == 1:
                prefix = (*prefix, *self.items.following[prefix])
            nodes.append((score, prefix))
        unknown = [prefix for _, prefix in nodes if prefix not in self._known]
        if unknown:
            logits = self.model.logits([self.context + prefix for prefix in unknown], last_only=True)
            for row, prefix in zip(logits, unknown, strict=True):
                self._known[prefix] = self._logprobs(row, prefix)
        return [
            (score + logprob, (*prefix, token))
            for score, prefix in nodes
            for token, logprob in self._known[prefix].items()
        ]

    def _logprobs(self, logits: torch.Tensor, prefix: Path) -> dict[int, float]:
        tokens = sorted(self.items.following[prefix])
        if self.scoring == "catalogue":
            return dict(zip(tokens, logits[tokens].log_softmax(0).tolist(), strict=True))
        return dict(zip(tokens, logits.log_softmax(0)[tokens].tolist(), strict=True))

    def _has_ended(self, prefix: Path) -> bool:
        if self.scoring == "catalogue":
            return self.items.num_below[prefix] == 1
        return prefix not in self.items.following

    def _item(self, prefix: Path) -> Path:
        """The only one below."""
        while prefix in self.items.following:
            prefix = (*prefix, *self.items.following[prefix])
        return prefix


def _cuts(candidates: list[Scored], count: int) -> list[list[Scored]]:
    """The `count` best of sorted candidates, in every way that rounding allows."""
    if len(candidates) <= count or candidates[count - 1][0] - candidates[count][0] > TOLERANCE:
        return [candidates[:count]]
    edge = (candidates[count - 1][0] + candidates[count][0]) / 2
    sure = [one for one in candidates if one[0] > edge + TOLERANCE]
    doubtful = [one for one in candidates if abs(one[0] - edge) <= TOLERANCE]
    return [[*sure, *some] for some in itertools.combinations(doubtful, count - len(sure))]


def is_same(found: Sequence[Scored], ranking: Sequence[Scored], k: int, tolerance: float = TOLERANCE) -> bool:
    """Whether `found` begins the ranking: scores place by place; and items, but among nearly equal scores."""
    if len(found) != min(k, len(ranking)):
        return False
    for place, ((score, path), (true_score, true_path)) in enumerate(zip(found, ranking, strict=False)):
        if abs(score - true_score) > tolerance:
            return False
        near = [ranking[p][0] for p in (place - 1, place + 1) if 0 <= p < len(ranking)]
        is_alone = all(abs(other - true_score) > 2 * tolerance for other in near)
        if is_alone and path != true_path:
            return False
    return True
