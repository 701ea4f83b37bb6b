"""PTPV: when to run every remaining row below the frontier at once, and in which chunks.

What it finds is exact: each wanted item below the frontier is scored, or bounded by a scored ancestor that is
worse than the kth best item found, as log-probabilities only fall.
"""

import math
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from cluster.placement.predict import StepTable, step_ms
from decode_workers.targeting.finished import FinishedItems
from decode_workers.targeting.forest import Forest
from decode_workers.targeting.search_rows import NO_SLOT, Frontier
from decode_workers.targeting.wanted import NO_ROW, IndexArray, Layout, WantedTrie

_LOOSE = 1.05
"""An estimate that is worse than stepwise by more than this is not looked into."""
_WORTH = 0.95
"""Parallel must be predicted below this share of stepwise, which may yet prune rows that it counts."""
_MOST_PRUNED = 4
"""How many times the rows that would pay may remain where most are expected to be pruned."""

_NEARLY = 1.1
"""Rows at this many times the least milliseconds a row are cheap enough: beyond, pruning saves more."""

_FEWEST_AT_ONCE = 8
"""The step table does not count what steps cost beside rows."""
_RUN_IN_VAIN = 0.5
"""A round of all beams at once runs so many more rows than one node at a time does: 157 against 104 over the
sample catalogue, at 20 beams; with 8 and 16 at once 107 and 131."""


@lru_cache(maxsize=256)
def chunk_rows(table: StepTable) -> int:
    """Rows of a chunk: as few as are nearly the cheapest a row, since each chunk may prune the next."""
    best = min(step_ms(table, rows) / rows for rows in table.rows)
    return next(rows for rows in table.rows if step_ms(table, rows) / rows <= _NEARLY * best)


@lru_cache(maxsize=256)
def nodes_at_once(table: StepTable, beams: int) -> int:
    """Nodes that run before the next are chosen: the fewer, the more of the others each may prune."""

    def predicted_ms(count: int) -> float:
        return step_ms(table, count) / count * (1 + _RUN_IN_VAIN * count / beams)

    return min([*(rows for rows in table.rows if _FEWEST_AT_ONCE <= rows < beams), beams], key=predicted_ms)


def plan_parallel(
    wanted: WantedTrie,
    frontier: Frontier,
    finished: FinishedItems,
    *,
    table: StepTable,
    beams: int,
    capacity_slots: int,
) -> Layout | None:
    """All rows below the frontier where running them is predicted faster than going on stepwise, or None."""
    heights = wanted.height[frontier.nodes]
    height, width = int(heights.max()), len(frontier.nodes)
    if height < 2:
        return None
    chunk = chunk_rows(table)
    num_rows = _estimated_rows(wanted, frontier, heights)
    reaching = np.bincount(heights)[:0:-1].cumsum()[::-1]
    """[levels] nodes of the frontier that have rows there. The rest are taken to be spread likewise."""
    widths = np.minimum(reaching * (num_rows / int(reaching.sum())), beams)
    stepwise = _chunks_ms(table, width, table.max_rows)
    stepwise += sum(_chunks_ms(table, math.ceil(below), table.max_rows) for below in widths[1:].tolist())
    if finished.edge_score is None:
        parallel = _chunks_ms(table, num_rows, chunk)
    else:
        parallel = _chunks_ms(table, min(num_rows, max(chunk, width)), chunk)
    chunk_ms = step_ms(table, chunk)
    if parallel > _LOOSE * stepwise or chunk_ms <= 0:
        return None
    most_rows = (int(_LOOSE * stepwise / chunk_ms) + 1) * chunk
    if finished.edge_score is not None:
        most_rows *= _MOST_PRUNED
    layout = wanted.all_below(frontier.nodes, most_rows)
    if layout is None:
        return None
    used = frontier.paths[frontier.paths != NO_SLOT]
    free_slots = capacity_slots - len(np.unique(used)) - layout.num_levels
    chunk = min(chunk, free_slots)
    if chunk < 1:
        return None
    parallel, stepwise = predicted_ms(
        layout,
        frontier,
        finished,
        table=table,
        beams=beams,
        chunk=chunk,
        is_renormalised=wanted.is_renormalised,
    )
    return layout if parallel < _WORTH * stepwise else None


def _estimated_rows(wanted: WantedTrie, frontier: Frontier, heights: npt.NDArray[np.uint8]) -> int:
    """Rows below the frontier: exact for all items in the vocabulary's scoring, else rather too many."""
    most = wanted.num_inner[frontier.nodes]
    if wanted.is_renormalised:
        # Every node with an only child that has ended needs no row: mostly one row a branch is left.
        most = np.minimum(most, wanted.count(frontier.nodes))
    elif wanted.is_filtered:
        most = np.minimum(most, wanted.count(frontier.nodes) * heights.astype(np.int64))
    return max(int(most.sum()), len(frontier.nodes))


def predicted_ms(
    layout: Layout,
    frontier: Frontier,
    finished: FinishedItems,
    *,
    table: StepTable,
    beams: int,
    chunk: int,
    is_renormalised: bool,
) -> tuple[float, float]:
    """Of running `layout` in chunks of `chunk` rows, and of going on stepwise.

    Once k items are finished, both lose the rows below what cannot be better. Which those are is not known
    yet; paths are taken to fall as slowly as the best of the frontier did, so that too few are counted out.
    """
    survivors = np.ones(layout.num_rows, dtype=np.bool_)
    expected_rows = layout.num_rows
    if finished.edge_score is not None:
        fall = -float(frontier.scores[0]) / (int(frontier.depths[0]) + 1)
        survivors = frontier.scores[layout.owners] - layout.levels * max(fall, 0.0) >= finished.edge_score
        # The first chunk is full before anything of it is known.
        expected_rows = min(layout.num_rows, max(chunk, int(np.count_nonzero(survivors))))
    rounds = _rounds(layout) if is_renormalised else layout.levels
    num_rows = np.bincount(rounds[survivors])
    is_end = survivors
    if is_renormalised:
        is_end = survivors & (layout.edge_starts[1:] - layout.edge_starts[:-1] > 1)
    num_ends = np.bincount(rounds[is_end], minlength=len(num_rows))
    widths = num_rows * np.minimum(1.0, beams / np.maximum(num_ends, 1))
    stepwise = sum(_chunks_ms(table, math.ceil(width), table.max_rows) for width in widths.tolist())
    return _chunks_ms(table, expected_rows, chunk), stepwise


def _rounds(layout: Layout) -> IndexArray:
    """[rows] the stepwise round that runs each, where chains of only children run in one."""
    is_branch = layout.edge_starts[1:] - layout.edge_starts[:-1] > 1
    rounds = np.zeros(layout.num_rows, dtype=np.intp)
    starts = layout.levels.searchsorted(np.arange(1, layout.num_levels + 1))
    for start, end in pairwise(starts):
        parents = layout.parents[start:end]
        rounds[start:end] = rounds[parents] + is_branch[parents]
    return rounds


def _chunks_ms(table: StepTable, rows: int, chunk: int) -> float:
    full, rest = divmod(rows, chunk)
    return full * step_ms(table, chunk) + (step_ms(table, rest) if rest else 0.0)


class ParallelOrder:
    """Which rows of a forest run next, when all of them are to."""

    def __init__(self, wanted: WantedTrie, forest: Forest, table: StepTable) -> None:
        self._wanted = wanted
        self._forest = forest
        levels = forest.layout.levels
        self._num_levels = forest.layout.num_levels
        self._level_starts = np.searchsorted(levels, np.arange(self._num_levels + 1))
        self._chunk_rows = chunk_rows(table)
        self._preorder: IndexArray | None = None

    def wanted_rows(self) -> int:
        forest = self._forest
        return min(forest.num_pending, self._chunk_rows, max(1, len(forest.free_slots())))

    def choose(self, max_rows: int) -> IndexArray:
        """Best bound first, and of one bound level by level, so that what is run first prunes most.

        A row left behind holds its ancestors' slots. So one slot a level stays free; where it would not,
        trees are run to their ends, the deepest one begun first, which holds no more than one path beside.
        """
        forest = self._forest
        max_rows = min(max_rows, self._chunk_rows)
        num_free = len(forest.free_slots())
        pending = forest.is_pending.nonzero()[0]
        if len(pending) <= min(max_rows, num_free):
            return pending
        open_rows = self._open_rows()[pending]
        count = min(max_rows, num_free - self._num_levels)
        if count > 0:
            order = np.argsort(-forest.scores[open_rows], kind="stable")
        else:
            count = max(1, min(max_rows, num_free))
            if self._preorder is None:
                self._preorder = self._in_preorder()
            order = np.lexsort((self._preorder[pending], open_rows, -forest.layout.levels[open_rows]))
        return pending[order[:count]]

    def prune(self, finished: FinishedItems) -> None:
        """Drop rows below which nothing can be of the k best."""
        forest = self._forest
        pending = forest.is_pending.nonzero()[0]
        if len(pending):
            open_rows = self._open_rows()[pending]
            ranks = self._wanted.least_rank[forest.layout.nodes[open_rows]]
            forest.drop(pending[finished.is_hopeless(forest.scores[open_rows], ranks)])
        forest.release()

    def _open_rows(self) -> IndexArray:
        """[rows] of each the nearest row up from it, itself included, that is scored."""
        scores, parents = self._forest.scores, self._forest.layout.parents
        rows = np.arange(len(scores))
        is_scored = ~np.isnan(scores)
        for start, end in zip(self._level_starts[1:-1], self._level_starts[2:], strict=True):
            level = slice(start, end)
            rows[level] = np.where(is_scored[level], rows[level], rows[parents[level]])
        return rows

    def _in_preorder(self) -> IndexArray:
        """[rows] each row's place in an order where every subtree is a range."""
        parents = self._forest.layout.parents
        sizes = np.ones(len(parents), dtype=np.intp)
        bounds = list(zip(self._level_starts[:-1], self._level_starts[1:], strict=True))
        for start, end in reversed(bounds[1:]):
            np.add.at(sizes, parents[start:end], sizes[start:end])
        places = np.zeros(len(parents), dtype=np.intp)
        for start, end in bounds:
            before = np.cumsum(sizes[start:end]) - sizes[start:end]
            above = parents[start:end]
            if above[0] == NO_ROW:
                places[start:end] = before
                continue
            first_sibling = np.searchsorted(above, above, side="left")
            places[start:end] = places[above] + 1 + before - before[first_sibling]
        return places
