"""What a search asks of a step, and the nodes it goes on from."""

import numpy as np
from msgspec import Struct

from decode_workers.step_batch import BoolArray, Int32Array
from decode_workers.targeting.scoring import Float64Array
from decode_workers.targeting.wanted import IndexArray

NO_SLOT = -1

Rows = IndexArray | slice
"""Some of a forest's rows, or edges: a round that runs in order takes ranges, which cost nothing to index."""


class SearchRows(Struct, frozen=True, kw_only=True, eq=False):
    """Rows of one search in one step, every parent before its children."""

    nodes: Int32Array
    """[rows]"""
    token_ids: Int32Array
    depths: Int32Array
    """[rows] 0 for a child of the root: its position is the context's length. The root's own row has -1."""
    parents: Int32Array
    """[rows] index of the parent in these rows, or NO_PARENT."""
    held_starts: Int32Array
    """[rows + 1]"""
    held_slots: Int32Array
    """Local slots of ancestors that earlier steps ran, root side first; of rows without a parent here."""
    slots: Int32Array
    """[rows] the local slot that each row writes; NO_SLOT for the root's row, whose slot is the context's."""
    allowed_starts: Int32Array
    """[rows + 1] a row without allowed tokens is run for its KV alone."""
    allowed_token_ids: Int32Array
    """Ascending within a row."""
    needs_log_sums: BoolArray
    """[rows]"""
    forest_rows: Rows
    """The forest's own numbers of these rows."""

    @property
    def num_rows(self) -> int:
        return len(self.nodes)


class Frontier(Struct, frozen=True, kw_only=True, eq=False):
    """Nodes that are scored and have not run; where they are a round's, best first."""

    nodes: IndexArray
    scores: Float64Array
    """What is ranked: log-probabilities, with noise where it was asked for."""
    logprobs: Float64Array
    depths: IndexArray
    """As in SearchRows."""
    paths: IndexArray
    """[nodes, any width] slots of their ancestors, root side first; NO_SLOT between them is no ancestor."""
    has_gaps: bool
    """Whether there may be NO_SLOT in `paths`."""

    def some(self, places: IndexArray) -> "Frontier":
        return Frontier(
            nodes=self.nodes[places],
            scores=self.scores[places],
            logprobs=self.logprobs[places],
            depths=self.depths[places],
            paths=self.paths[places],
            has_gaps=self.has_gaps,
        )

    def joined(self, other: "Frontier") -> "Frontier":
        """In this order, whatever their scores."""
        width = max(self.paths.shape[1], other.paths.shape[1])
        return Frontier(
            nodes=np.concatenate([self.nodes, other.nodes]),
            scores=np.concatenate([self.scores, other.scores]),
            logprobs=np.concatenate([self.logprobs, other.logprobs]),
            depths=np.concatenate([self.depths, other.depths]),
            paths=np.concatenate([_widened(self.paths, width), _widened(other.paths, width)]),
            has_gaps=self.has_gaps or other.has_gaps or self.paths.shape[1] != other.paths.shape[1],
        )


def _widened(paths: IndexArray, width: int) -> IndexArray:
    if paths.shape[1] == width:
        return paths
    widened = np.full((len(paths), width), NO_SLOT, dtype=paths.dtype)
    widened[:, : paths.shape[1]] = paths
    return widened
