"""The rows of one forward pass: tokens at positions, each after a committed prefix and its ancestors."""

import msgspec
import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

NO_PARENT = -1


class RowSpan(msgspec.Struct, frozen=True, eq=False):
    """One sequence's rows [start, end) of the batch, and where its committed prefix lies."""

    start: int
    end: int
    context_slots: IntArray
    """[committed tokens] KV slot of each position."""


class RowBatch(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Rows grouped by sequence, every parent before its children. A row sees prefix, ancestors and itself."""

    token_ids: IntArray
    """[rows]"""
    positions: IntArray
    """[rows] committed tokens of the row's sequence + held ancestors of its root + depth of the row."""
    slots: IntArray
    """[rows] KV slot that the row writes; no two rows share one."""
    parents: IntArray
    """[rows] the parent's index in this batch, or NO_PARENT."""
    spans: tuple[RowSpan, ...]
    held_starts: IntArray | None = None
    """[rows + 1] of row i, where it has no parent, `held_slots[starts[i]:starts[i + 1]]` are the slots of
    ancestors that earlier passes ran, the root's first. None: no row has any."""
    held_slots: IntArray | None = None

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    def held(self, row: int) -> IntArray:
        """Slots of the held ancestors that the row names."""
        if self.held_starts is None or self.held_slots is None:
            return np.empty(0, dtype=np.int64)
        return self.held_slots[self.held_starts[row] : self.held_starts[row + 1]]


def chain_parents(start: int, num_rows: int) -> IntArray:
    """Parents of rows [start, start + num_rows) that follow one another."""
    parents = np.arange(start - 1, start + num_rows - 1, dtype=np.int64)
    if num_rows:
        parents[0] = NO_PARENT
    return parents


def leaf_paths(parents: IntArray, start: int, end: int) -> list[list[int]]:
    """Rows from the root to each leaf of one sequence's tree, as indices into the batch."""
    inner = {int(parent) for parent in parents[start:end]}
    paths = []
    for leaf in range(start, end):
        if leaf in inner:
            continue
        path, row = [], leaf
        while row != NO_PARENT:
            path.append(row)
            row = int(parents[row])
        paths.append(path[::-1])
    return paths
