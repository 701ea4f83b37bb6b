"""Rows to run below nodes whose ancestors' KV is held: which have run, where their KV is, what they scored.

A slot is in use from the step that writes it until no row below it is pending. Nothing is copied.
"""

import numpy as np

from decode_workers.step_batch import NO_PARENT, BoolArray, Float32Array
from decode_workers.targeting import noise
from decode_workers.targeting.scoring import (
    Float64Array,
    catalogue_logprobs,
    check_finite,
    vocabulary_logprobs,
)
from decode_workers.targeting.search_rows import NO_SLOT, Frontier, Rows, SearchRows
from decode_workers.targeting.wanted import NO_ROW, IndexArray, Layout, WantedTrie, as_int32


class OutOfSlotsError(ValueError):
    """No slot is free for the next row: fewer are reserved than `slots_needed` asks for."""


class Forest:
    def __init__(
        self,
        wanted: WantedTrie,
        layout: Layout,
        top: Frontier,
        capacity_slots: int,
        noise_seed: int | None,
        held_slots: IndexArray | None = None,
    ) -> None:
        """`held_slots` are in use as long as the forest is: by ancestors of nodes that it does not have."""
        self.layout = layout
        self.top = top
        self._wanted = wanted
        self._noise_seed = noise_seed
        num_rows, num_top = layout.num_rows, len(top.nodes)
        self.is_pending = np.ones(num_rows, dtype=np.bool_)
        self.num_pending = num_rows
        self.scores = top.scores
        """[rows] NaN where the parent has not run."""
        self.logprobs = top.logprobs
        if not layout.is_flat and layout.is_scored:
            self.scores, self.logprobs = top.scores[layout.owners], top.logprobs[layout.owners]
        elif not layout.is_flat:
            self.scores = np.full(num_rows, np.nan)
            self.scores[:num_top] = top.scores
            self.logprobs = np.full(num_rows, np.nan)
            self.logprobs[:num_top] = top.logprobs
        self.edge_logprobs = np.empty(len(layout.edge_nodes))
        """[edges] of rows that ran."""
        self.edge_scores = self.edge_logprobs if noise_seed is None else np.empty(len(layout.edge_nodes))
        self._slots = np.empty(num_rows, dtype=np.intp)
        self._slots.fill(NO_SLOT)
        self._capacity_slots = capacity_slots
        self._held_slots = held_slots
        self._is_used: BoolArray | None = None

    def free_slots(self) -> IndexArray:
        if self._is_used is None:
            self._is_used = self._slots_in_use()
        return (~self._is_used).nonzero()[0]

    def release(self) -> None:
        """Look again which slots are in use: after rows ran or were dropped."""
        self._is_used = None

    def drop(self, rows: IndexArray) -> None:
        self.is_pending[rows] = False
        self.num_pending = int(np.count_nonzero(self.is_pending))

    def take(self, rows: Rows) -> SearchRows:
        """Pending rows, parents first, whose parents run with them or have run. Raises OutOfSlotsError."""
        layout = self.layout
        nodes = layout.nodes[rows]
        num_rows = len(nodes)
        slots = self.free_slots()[:num_rows]
        if len(slots) < num_rows:
            raise OutOfSlotsError(
                f"{num_rows} rows need slots, {len(slots)} of {self._capacity_slots} are free"
            )
        assert self._is_used is not None
        self._is_used[slots] = True
        self._slots[rows] = slots
        self.is_pending[rows] = False
        self.num_pending -= num_rows
        parents = self._places(rows)
        held_starts, held_slots = self._held(rows, parents)
        starts, edges = self._edges(rows)
        asked = layout.edge_nodes[edges]
        if self._wanted.is_renormalised and not layout.is_flat:
            counts = starts[1:] - starts[:-1]
            is_asked = counts > 1
            starts, asked = _starts(counts * is_asked), asked[is_asked.repeat(counts)]
        return SearchRows(
            nodes=as_int32(nodes),
            token_ids=self._wanted.token[nodes],
            depths=as_int32(self.top.depths[layout.owners[rows]] + layout.levels[rows]),
            parents=as_int32(parents),
            held_starts=as_int32(held_starts),
            held_slots=as_int32(held_slots),
            slots=as_int32(slots),
            allowed_starts=as_int32(starts),
            allowed_token_ids=self._wanted.token[asked],
            needs_log_sums=self._needs_log_sums(num_rows),
            forest_rows=rows,
        )

    def take_root(self) -> SearchRows:
        """Of the forest of the root alone: the context's last token, whose slot is not ours."""
        self.is_pending[:] = False
        self.num_pending = 0
        zero = np.zeros(1, dtype=np.int32)
        edge_nodes = self.layout.edge_nodes
        return SearchRows(
            nodes=zero,
            token_ids=zero - 1,
            depths=zero - 1,
            parents=zero + NO_PARENT,
            held_starts=np.zeros(2, dtype=np.int32),
            held_slots=np.zeros(0, dtype=np.int32),
            slots=zero + NO_SLOT,
            allowed_starts=np.array([0, len(edge_nodes)], dtype=np.int32),
            allowed_token_ids=self._wanted.token[edge_nodes],
            needs_log_sums=self._needs_log_sums(1),
            forest_rows=slice(0, 1),
        )

    def give(self, batch: SearchRows, allowed_logits: Float32Array, log_sums: Float32Array | None) -> None:
        """Score the edges of rows that ran. Raises BadLogitsError."""
        layout = self.layout
        starts, edges = self._edges(batch.forest_rows)
        counts = starts[1:] - starts[:-1]
        conditional = self._conditional(batch, starts, counts, allowed_logits, log_sums)
        if layout.is_scored:
            self._score(batch.forest_rows, starts, counts, edges, conditional)
            return
        rows = np.arange(layout.num_rows)[batch.forest_rows]
        edges = np.arange(len(layout.edge_nodes))[edges]
        levels = layout.levels[rows]
        for level in range(layout.num_levels):
            at_level = (levels == level).nonzero()[0]
            if not len(at_level):
                continue
            level_counts = counts[at_level]
            places = _ranges(starts[at_level], level_counts)
            level_edges = edges[places]
            level_starts = _starts(level_counts)
            self._score(rows[at_level], level_starts, level_counts, level_edges, conditional[places])
            below = layout.edge_rows[level_edges]
            has_row = below != NO_ROW
            self.scores[below[has_row]] = self.edge_scores[level_edges[has_row]]
            self.logprobs[below[has_row]] = self.edge_logprobs[level_edges[has_row]]

    def ended_edges(self, batch: SearchRows) -> IndexArray:
        """Of rows that ran: edges to nodes that are no rows of the forest."""
        edges = np.arange(len(self.layout.edge_nodes))[self._edges(batch.forest_rows)[1]]
        ended: IndexArray = edges[self.layout.edge_rows[edges] == NO_ROW]
        return ended

    def owners(self, edges: IndexArray) -> IndexArray:
        """Which of the forest's top each edge is below."""
        return self.layout.owners[self._edge_rows(edges)]

    def children(self, edges: IndexArray) -> Frontier:
        """What edges of rows that ran lead to."""
        layout, top = self.layout, self.top
        rows = self._edge_rows(edges)
        depths = top.depths[layout.owners[rows]]
        depths += layout.levels[rows] + 1
        paths = self._paths(rows)
        if self._slots[0] != NO_SLOT:
            paths = np.concatenate([paths, self._slots[rows][:, None]], axis=1)
        return Frontier(
            nodes=layout.edge_nodes[edges],
            scores=self.edge_scores[edges],
            logprobs=self.edge_logprobs[edges],
            depths=depths,
            paths=paths,
            has_gaps=top.has_gaps or not layout.is_flat,
        )

    def _edge_rows(self, edges: IndexArray) -> IndexArray:
        rows: IndexArray = self.layout.edge_starts.searchsorted(edges, side="right") - 1
        return rows

    def _score(
        self, rows: Rows, starts: IndexArray, counts: IndexArray, edges: Rows, conditional: Float64Array
    ) -> None:
        self.edge_logprobs[edges] = self.logprobs[rows].repeat(counts) + conditional
        if self._noise_seed is not None:
            self.edge_scores[edges] = noise.perturbed(
                self._noise_seed,
                parents=self.layout.nodes[rows],
                parent_scores=self.scores[rows],
                parent_logprobs=self.logprobs[rows],
                edge_starts=starts,
                edge_nodes=self.layout.edge_nodes[edges],
                edge_logprobs=conditional,
            )

    def _conditional(
        self,
        batch: SearchRows,
        starts: IndexArray,
        counts: IndexArray,
        logits: Float32Array,
        log_sums: Float32Array | None,
    ) -> Float64Array:
        num_asked = len(batch.allowed_token_ids)
        assert logits.shape == (num_asked,), f"{logits.shape} logits of {num_asked} allowed tokens"
        check_finite(logits, "allowed logit")
        if not self._wanted.is_renormalised:
            assert log_sums is not None
            assert log_sums.shape == counts.shape, f"{log_sums.shape} log-sum-exps of {len(counts)} rows"
            check_finite(log_sums, "log-sum-exp of row")
            return vocabulary_logprobs(logits, log_sums, counts)
        if num_asked == starts[-1]:
            return catalogue_logprobs(logits, starts[:-1], counts)
        # Only children were not asked for: their log-probability is 0.
        conditional = np.zeros(int(starts[-1]))
        if num_asked:
            is_asked = counts > 1
            conditional[is_asked.repeat(counts)] = catalogue_logprobs(
                logits, _starts(counts[is_asked])[:-1], counts[is_asked]
            )
        return conditional

    def _needs_log_sums(self, num_rows: int) -> BoolArray:
        needs: BoolArray = np.zeros(num_rows, dtype=np.bool_)
        needs.fill(not self._wanted.is_renormalised)
        return needs

    def _held(self, rows: Rows, parents: IndexArray) -> tuple[IndexArray, IndexArray]:
        """Slots of ancestors that ran before, of the rows that have no parent beside them, in sparse rows."""
        if self.layout.is_flat:
            held = self._paths(rows)
            num_rows, width = held.shape
            if not self.top.has_gaps:
                return np.arange(num_rows + 1) * width, held.ravel()
            is_held = held != NO_SLOT
            return _starts(is_held.sum(axis=1)), held[is_held]
        alone = (parents == NO_PARENT).nonzero()[0]
        held = self._paths(np.arange(self.layout.num_rows)[rows][alone])
        is_held = held != NO_SLOT
        counts = np.zeros(len(parents), dtype=np.intp)
        counts[alone] = is_held.sum(axis=1)
        return _starts(counts), held[is_held]

    def _places(self, rows: Rows) -> IndexArray:
        """Where each row's parent is among `rows`."""
        parents = self.layout.parents[rows]
        if self.layout.is_flat:
            return parents
        place = np.full(self.layout.num_rows, NO_PARENT, dtype=np.intp)
        place[rows] = np.arange(len(parents))
        return np.where(parents == NO_ROW, NO_PARENT, place[parents])

    def _paths(self, rows: Rows) -> IndexArray:
        """[rows, width] slots of their ancestors, root side first, NO_SLOT between."""
        above = self.top.paths[self.layout.owners[rows]]
        if self.layout.is_flat:
            return above
        columns: list[IndexArray] = []
        ancestors = self.layout.parents[rows]
        while (is_row := ancestors != NO_ROW).any():
            columns.append(np.where(is_row, self._slots[ancestors], NO_SLOT))
            ancestors = np.where(is_row, self.layout.parents[ancestors], NO_ROW)
        return np.concatenate([above, *(column[:, None] for column in reversed(columns))], axis=1)

    def _edges(self, rows: Rows) -> tuple[IndexArray, Rows]:
        """Where each row's edges start among those of `rows`, and their places among the forest's."""
        starts = self.layout.edge_starts
        if isinstance(rows, slice):
            own = starts[rows.start : rows.stop + 1]
            first = own[0]
            return (own - first if first else own), slice(first, own[-1])
        counts = starts[rows + 1] - starts[rows]
        return _starts(counts), _ranges(starts[rows], counts)

    def _slots_in_use(self) -> BoolArray:
        """By rows that ran and have a pending row below, and by ancestors of the forest's trees that do."""
        is_used = np.zeros(self._capacity_slots + 1, dtype=np.bool_)
        """Its last place is NO_SLOT's."""
        if self._held_slots is not None:
            is_used[self._held_slots] = True
        layout = self.layout
        if self.num_pending == layout.num_rows:
            is_used[self.top.paths] = True
            return is_used[:-1]
        is_needed = np.zeros(layout.num_rows, dtype=np.bool_)
        rows = self.is_pending.nonzero()[0]
        while len(rows):
            rows = layout.parents[rows]
            rows = rows[rows != NO_ROW]
            rows = np.unique(rows[~is_needed[rows]])
            is_needed[rows] = True
        is_used[self._slots[is_needed]] = True
        has_pending = np.zeros(len(self.top.nodes), dtype=np.bool_)
        has_pending[layout.owners[self.is_pending]] = True
        is_used[self.top.paths[has_pending]] = True
        return is_used[:-1]


def _starts(counts: IndexArray) -> IndexArray:
    starts = np.zeros(len(counts) + 1, dtype=np.intp)
    counts.cumsum(out=starts[1:])
    return starts


def _ranges(first: IndexArray, counts: IndexArray) -> IndexArray:
    """[first, first + count) of each, one after the other."""
    starts = _starts(counts)
    places = (first - starts[:-1]).repeat(counts)
    places += np.arange(len(places))
    return places
