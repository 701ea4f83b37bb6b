"""A model whose logits depend on the path alone, a driver that checks what rows see, and slow references."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cluster.messages import CatalogueRef, TargetingParams
from decode_workers.step_batch import NO_PARENT
from decode_workers.targeting.search import TargetingSearch
from decode_workers.targeting.search_rows import SearchRows
from tests.decode_workers.tries import Path, build_trie

END = 0
CATALOGUE = CatalogueRef(name="test", version=1, checksum="", num_bytes=0, path="")


def params_of(**fields) -> TargetingParams:
    return TargetingParams(catalogue=CATALOGUE, **fields)


@dataclass
class Model:
    """`resolution` makes ties: 0 gives every token the same logit."""

    seed: int
    vocab: int = 24
    resolution: int | None = None
    rows: dict[Path, tuple[np.ndarray, np.float32]] = field(default_factory=dict)

    def row(self, path: Path) -> tuple[np.ndarray, np.float32]:
        if path not in self.rows:
            digest = hashlib.sha256(repr((self.seed, path)).encode()).digest()
            words = np.frombuffer(digest * (-(-self.vocab // 8)), dtype="<u4")[: self.vocab].astype(np.uint64)
            mixed = (words * np.arange(1, 2 * self.vocab, 2, dtype=np.uint64) * 2654435761) >> np.uint64(7)
            logits = ((mixed & np.uint64(0xFFFFF)) / 2.0**18).astype(np.float32)
            if self.resolution is not None:
                logits = np.floor(logits * self.resolution).astype(np.float32)
            wide = logits.astype(np.float64)
            self.rows[path] = logits, np.float32(wide.max() + math.log(np.exp(wide - wide.max()).sum()))
        return self.rows[path]


@dataclass
class Case:
    """Items in upload order, each path with its end; which are wanted; what they are scored by."""

    paths: Sequence[Path]
    model: Model
    scoring: str
    is_wanted: Sequence[bool] | None = None

    def __post_init__(self) -> None:
        self.trie = build_trie(self.paths)
        self.sorted_paths = sorted(self.paths)
        self.rank = {path: rank for rank, path in enumerate(self.paths)}
        wanted = self.paths
        if self.is_wanted is not None:
            wanted = [path for path, is_wanted in zip(self.paths, self.is_wanted, strict=True) if is_wanted]
        self.wanted = wanted
        self.below: dict[Path, set[Path]] = {}
        self.kids: dict[Path, set[int]] = {}
        for path in wanted:
            for depth in range(len(path) + 1):
                self.below.setdefault(path[:depth], set()).add(path)
                if depth < len(path):
                    self.kids.setdefault(path[:depth], set()).add(path[depth])
        self.least_rank: dict[Path, int] = {}
        for path in self.paths:
            for depth in range(len(path) + 1):
                least = self.least_rank.get(path[:depth], len(self.paths))
                self.least_rank[path[:depth]] = min(least, self.rank[path])

    @property
    def mask(self) -> np.ndarray | None:
        """Over sorted items."""
        if self.is_wanted is None:
            return None
        wanted = set(self.wanted)
        return np.array([path in wanted for path in self.sorted_paths], dtype=np.bool_)

    def logprobs(self, prefix: Path) -> dict[int, float]:
        logits, log_sum = self.model.row(prefix)
        kids = sorted(self.kids[prefix])
        if self.scoring == "vocabulary":
            return {kid: min(0.0, float(logits[kid]) - float(log_sum)) for kid in kids}
        largest = max(float(logits[kid]) for kid in kids)
        shifted = [float(logits[kid]) - largest for kid in kids]
        log_total = math.log(math.fsum(math.exp(value) for value in shifted))
        return {kid: min(0.0, value - log_total) for kid, value in zip(kids, shifted, strict=True)}

    def is_ended(self, prefix: Path) -> bool:
        return prefix in self.rank if self.scoring == "vocabulary" else len(self.below[prefix]) == 1

    def path_score(self, path: Path) -> float:
        score = 0.0
        for depth, token in enumerate(path):
            score += self.logprobs(path[:depth])[token]
        return score

    def best(self, found: dict[Path, float], k: int, diversity: float = 0.0) -> list[tuple[Path, float]]:
        ranked = sorted(found, key=lambda path: (-found[path], self.rank[path]))
        if diversity:
            adjusted = {}
            for place, path in enumerate(ranked):
                better = sum(other[0] == path[0] for other in ranked[:place])
                adjusted[path] = found[path] - diversity * better
            ranked.sort(key=lambda path: (-adjusted[path], self.rank[path]))
        return [(path, found[path]) for path in ranked[:k]]

    def exhaustive(self, k: int, diversity: float = 0.0) -> list[tuple[Path, float]]:
        return self.best({path: self.path_score(path) for path in self.wanted}, k, diversity)

    def beam_search(self, beams: int) -> list[tuple[dict[Path, float], list[tuple[float, Path]]]]:
        """After each round: all that is finished, and the frontier. None dropped, no early stop."""
        if not self.wanted:
            return [({}, [])]
        if self.is_ended(()):
            return [({self.wanted[0]: 0.0}, [])]
        finished: dict[Path, float] = {}
        frontier: list[tuple[float, Path]] = [(0.0, ())]
        rounds = []
        while frontier:
            candidates = []
            for score, node in frontier:
                prefix = node
                while self.scoring == "catalogue" and prefix and len(self.kids[prefix]) == 1:
                    prefix = (*prefix, *self.kids[prefix])
                for kid, logprob in self.logprobs(prefix).items():
                    candidates.append((score + logprob, (*prefix, kid)))
            candidates.sort(key=lambda candidate: (-candidate[0], self.least_rank[candidate[1]]))
            for score, prefix in candidates[:beams]:
                if self.is_ended(prefix):
                    (path,) = self.below[prefix]
                    finished[path] = score
            frontier = [candidate for candidate in candidates if not self.is_ended(candidate[1])][:beams]
            rounds.append((dict(finished), frontier))
        return rounds

    def found(self, search: TargetingSearch) -> list[tuple[Path, float]]:
        result = search.result()
        return [
            (self.sorted_paths[item], logprob)
            for item, logprob in zip(result.items.tolist(), result.logprobs.tolist(), strict=True)
        ]


class Driver:
    """Runs a search's rows on the model, and checks of each that it sees exactly its node's path."""

    def __init__(self, case: Case, search: TargetingSearch, capacity_slots: int) -> None:
        self.case = case
        self.search = search
        self.capacity_slots = capacity_slots
        self.written: dict[int, Path] = {}
        self.gives = 0
        paths: list[Path] = [()]
        for node in range(case.trie.num_nodes):
            first, end = case.trie.first_child[node : node + 2]
            paths.extend((*paths[node], int(case.trie.token[child])) for child in range(first, end))
        self.path_of = paths

    def run(self, max_rows: Callable[[], int], max_gives: int = 10**9) -> None:
        search = self.search
        if search.num_steps == 0 and not search.is_done and max_gives > 0:
            assert search.wanted_rows() == 0
            rows = search.root_ask()
            assert rows.num_rows == 1
            assert rows.slots.tolist() == rows.depths.tolist() == [-1]
            self.give(rows, [()])
        while not search.is_done and self.gives < max_gives:
            limit = max_rows()
            assert search.wanted_rows() > 0
            rows = search.take(limit)
            assert 0 < rows.num_rows <= limit
            assert search.wanted_rows() == 0
            self.give(rows, self.visible_paths(rows))

    def visible_paths(self, rows: SearchRows) -> list[Path]:
        slots = rows.slots.tolist()
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < self.capacity_slots for slot in slots)
        assert not set(slots) & set(rows.held_slots.tolist()), "a row overwrites what another reads"
        visible: list[Path] = []
        for row in range(rows.num_rows):
            held = rows.held_slots[rows.held_starts[row] : rows.held_starts[row + 1]].tolist()
            parent = int(rows.parents[row])
            assert NO_PARENT <= parent < row
            if parent == NO_PARENT:
                above: Path = tuple(self.written[slot][-1] for slot in held)
                for depth, slot in enumerate(held):
                    assert self.written[slot] == above[: depth + 1], "KV of another path"
            else:
                assert held == []
                above = visible[parent]
            visible.append((*above, int(rows.token_ids[row])))
            assert visible[row] == self.path_of[rows.nodes[row]]
            assert int(rows.depths[row]) == len(above)
        self.written.update(zip(slots, visible, strict=True))
        return visible

    def give(self, rows: SearchRows, paths: list[Path]) -> None:
        case = self.case
        logits: list[np.float32] = []
        for row, path in enumerate(paths):
            allowed = rows.allowed_token_ids[rows.allowed_starts[row] : rows.allowed_starts[row + 1]].tolist()
            wanted = sorted(case.kids[path])
            is_silent = case.scoring == "catalogue" and path and len(wanted) == 1
            assert allowed == ([] if is_silent else wanted)
            logits.extend(case.model.row(path)[0][allowed])
        log_sums = None
        assert rows.needs_log_sums.tolist() == [case.scoring == "vocabulary"] * rows.num_rows
        if case.scoring == "vocabulary":
            log_sums = np.array([case.model.row(path)[1] for path in paths], dtype=np.float32)
        self.gives += 1
        self.search.give(rows, np.array(logits, dtype=np.float32), log_sums)
