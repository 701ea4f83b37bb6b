"""The part of a trie that a request wants: its items after the filter, and the rows that score them."""

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from cluster.catalogue.trie import ROOT, Trie
from decode_workers.step_batch import BoolArray, Int32Array

IndexArray = npt.NDArray[np.intp]
RankArray = npt.NDArray[np.int32]

NO_ROW = -1
_NONE = np.full(4096, NO_ROW, dtype=np.intp)
_NONE.flags.writeable = False


class Layout(Struct, frozen=True, kw_only=True, eq=False):
    """Rows below some nodes, level by level, siblings side by side; and edges to their wanted children."""

    nodes: IndexArray
    """[rows]"""
    parents: IndexArray
    """[rows] the parent's row, or NO_ROW for one of the nodes that the layout hangs on."""
    owners: IndexArray
    """[rows] which of those nodes a row is below, or is."""
    levels: IndexArray
    """[rows] 0 for those nodes."""
    num_levels: int
    is_scored: bool
    """Whether a row below another is its only child, under `catalogue` scoring: of the same score."""
    edge_starts: IndexArray
    """[rows + 1] at least one edge a row."""
    edge_nodes: IndexArray
    """[edges] wanted children, ascending."""
    edge_rows: IndexArray
    """[edges] the child's row, or NO_ROW where it is not in the layout."""

    @property
    def num_rows(self) -> int:
        return len(self.nodes)

    @property
    def is_flat(self) -> bool:
        return self.num_levels == 1


class WantedTrie:
    """A trie under a filter and a scoring: every question takes nodes, and answers for all of them at once.

    A node is *wanted* where an item below passes. It has *ended* where its score is an item's: at a leaf, and
    under `catalogue` scoring wherever one wanted item is left, since an only child's log-probability is 0.
    """

    def __init__(self, trie: Trie, mask: BoolArray | None, *, is_renormalised: bool) -> None:
        """`mask` is over sorted items; None wants all. Raises ValueError where its length is another."""
        if mask is not None and mask.shape != (trie.count_items,):
            raise ValueError(f"the filter has shape {mask.shape}, the catalogue {trie.count_items} items")
        self.is_renormalised = is_renormalised
        # A memory-mapped subclass of ndarray pays for itself at every index.
        self.first_child = np.asarray(trie.first_child)
        self.token = np.asarray(trie.token)
        self.least_rank = np.asarray(trie.least_rank)
        self.upload_rank = np.asarray(trie.upload_rank)
        self.num_inner = np.asarray(trie.num_inner)
        self.height = np.asarray(trie.height)
        self._first_item = np.asarray(trie.first_item)
        self._num_items = np.asarray(trie.num_items)
        self._leaf_item = np.asarray(trie.leaf_item)
        self._before: IndexArray | None = None
        """[items + 1] wanted items before each sorted item."""
        self._wanted_items: IndexArray | None = None
        if mask is not None and not mask.all():
            self._wanted_items = mask.nonzero()[0]
            self._before = np.zeros(len(mask) + 1, dtype=np.intp)
            mask.cumsum(out=self._before[1:])

    @property
    def num_wanted(self) -> int:
        return len(self.upload_rank) if self._wanted_items is None else len(self._wanted_items)

    @property
    def is_filtered(self) -> bool:
        return self._wanted_items is not None

    def count(self, nodes: IndexArray) -> RankArray | IndexArray:
        """Wanted items below each."""
        num_items: RankArray = self._num_items[nodes]
        if self._before is None:
            return num_items
        first = self._first_item[nodes]
        wanted: IndexArray = self._before[first + num_items] - self._before[first]
        return wanted

    def first_item(self, nodes: IndexArray) -> IndexArray:
        """The first wanted item below each: of a node that has ended, its item."""
        first: IndexArray = self._first_item[nodes].astype(np.intp)
        if self._before is None or self._wanted_items is None:
            return first
        return self._wanted_items[self._before[first]]

    def is_ended(self, nodes: IndexArray) -> BoolArray:
        """Of wanted nodes."""
        ended: BoolArray
        ended = self.count(nodes) == 1 if self.is_renormalised else self._leaf_item[nodes] >= 0
        return ended

    def first_tokens(self, items: IndexArray) -> IndexArray:
        """The root's child that each item is below, numbered from 1."""
        children = slice(int(self.first_child[ROOT]), int(self.first_child[ROOT + 1]))
        return np.searchsorted(self._first_item[children], items, side="right")

    def children(self, nodes: IndexArray) -> tuple[IndexArray, IndexArray]:
        """Edges to wanted children: where each node's begin (and one end more), and the children."""
        starts = self.first_child[nodes]
        counts = self.first_child[nodes + 1] - starts
        edge_starts = np.zeros(len(nodes) + 1, dtype=np.intp)
        counts.cumsum(out=edge_starts[1:])
        edge_nodes = (starts - edge_starts[:-1]).repeat(counts)
        edge_nodes += np.arange(len(edge_nodes))
        if self._before is None:
            return edge_starts, edge_nodes
        is_wanted = self.count(edge_nodes) > 0
        before = np.zeros(len(edge_nodes) + 1, dtype=np.intp)
        is_wanted.cumsum(out=before[1:])
        return before[edge_starts], edge_nodes[is_wanted]

    def one_level(self, nodes: IndexArray) -> Layout:
        return _flat(nodes, *self.children(nodes))

    def next_round(self, nodes: IndexArray) -> Layout:
        """Rows that tell `nodes`' children apart: the nodes, and under `catalogue` scoring the chains below.

        An only child's score needs no row, but whoever is scored below it needs its KV: a chain runs at once.
        """
        if not self.is_renormalised:
            return self.one_level(nodes)
        edge_starts, edge_nodes = self.children(nodes)
        if (edge_starts[1:] - edge_starts[:-1] > 1).all():
            return _flat(nodes, edge_starts, edge_nodes)
        layout = self._layout(nodes, (edge_starts, edge_nodes), only_chains=True, max_rows=None)
        assert layout is not None
        return layout

    def all_below(self, nodes: IndexArray, max_rows: int) -> Layout | None:
        """Every row that scores the wanted items below `nodes`; None where they are more than `max_rows`."""
        if len(nodes) > max_rows:
            return None
        return self._layout(nodes, self.children(nodes), only_chains=False, max_rows=max_rows)

    def _layout(
        self,
        nodes: IndexArray,
        edges: tuple[IndexArray, IndexArray],
        *,
        only_chains: bool,
        max_rows: int | None,
    ) -> Layout | None:
        """`edges`: the nodes' own."""
        start = 0
        parents, owners = _none(len(nodes)), np.arange(len(nodes))
        levels: list[tuple[IndexArray, ...]] = []
        while len(nodes):
            end = start + len(nodes)
            if max_rows is not None and end > max_rows:
                return None
            edge_starts, edge_nodes = edges if start == 0 else self.children(nodes)
            counts = edge_starts[1:] - edge_starts[:-1]
            goes_on = ~self.is_ended(edge_nodes)
            if only_chains:
                goes_on &= (counts == 1).repeat(counts)
            below = goes_on.nonzero()[0]
            edge_rows = np.empty(len(edge_nodes), dtype=np.intp)
            edge_rows.fill(NO_ROW)
            edge_rows[below] = np.arange(end, end + len(below))
            levels.append((nodes, parents, owners, counts, edge_nodes, edge_rows))
            within = edge_starts.searchsorted(below, side="right") - 1
            nodes, parents, owners = edge_nodes[below], start + within, owners[within]
            start = end
        if len(levels) == 1:
            return _flat(levels[0][0], edge_starts, edge_nodes)
        sizes = [len(level[0]) for level in levels]
        whole = [np.concatenate(parts) for parts in zip(*levels, strict=True)]
        edge_starts = np.zeros(start + 1, dtype=np.intp)
        whole[3].cumsum(out=edge_starts[1:])
        return Layout(
            nodes=whole[0],
            parents=whole[1],
            owners=whole[2],
            levels=np.repeat(np.arange(len(levels)), sizes),
            num_levels=len(levels),
            is_scored=only_chains,
            edge_starts=edge_starts,
            edge_nodes=whole[4],
            edge_rows=whole[5],
        )


def _flat(nodes: IndexArray, edge_starts: IndexArray, edge_nodes: IndexArray) -> Layout:
    return Layout(
        nodes=nodes,
        parents=_none(len(nodes)),
        owners=np.arange(len(nodes)),
        levels=np.zeros(len(nodes), dtype=np.intp),
        num_levels=1,
        is_scored=True,
        edge_starts=edge_starts,
        edge_nodes=edge_nodes,
        edge_rows=_none(len(edge_nodes)),
    )


def _none(count: int) -> IndexArray:
    return _NONE[:count] if count <= len(_NONE) else np.full(count, NO_ROW, dtype=np.intp)


def as_int32(indices: IndexArray) -> Int32Array:
    return indices.astype(np.int32)
