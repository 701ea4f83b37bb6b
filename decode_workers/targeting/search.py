"""One request's search for the k likeliest items of a catalogue: a state machine that the engine drives.

    rows = search.root_ask()                      # unless search.is_done already
    search.give(rows, allowed_logits, log_sums)
    while not search.is_done:
        rows = search.take(as many as the step has room for)
        search.give(rows, allowed_logits, log_sums)

A round ranks all children of the frontier. Of the best `beams` those that have ended are finished; the best
`beams` that have not are the next frontier: beam search as the transformers library defines it, for a length
penalty of 0 and without early stopping. Log-probabilities only fall: a node that is worse than the kth best
finished item is dropped, and when none is left the search is done. Neither changes the result.
Where few rows cost no more each than many, and scores are a catalogue's, nodes run best first instead
(open_nodes.py): fewer of them, and what is found is the same, or better. PTPV (ptpv.py) ends a search where
that pays.
Results depend on neither how rows are cut into steps nor the company they keep.

Noise: exact draws need `beams` of at least k, and under `vocabulary` scoring as many as keep every drawn
item's path, since a node may owe its score to paths outside the catalogue.
"""

import numpy as np
from msgspec import Struct

from cluster.catalogue.trie import ROOT
from cluster.messages import Decoding, TargetingParams
from cluster.placement.predict import StepTable
from decode_workers.step_batch import Float32Array
from decode_workers.targeting import noise
from decode_workers.targeting.finished import FinishedItems, best_first
from decode_workers.targeting.forest import Forest
from decode_workers.targeting.open_nodes import OpenNodes
from decode_workers.targeting.ptpv import ParallelOrder, nodes_at_once, plan_parallel
from decode_workers.targeting.scoring import Float64Array
from decode_workers.targeting.search_rows import Frontier, SearchRows
from decode_workers.targeting.wanted import NO_ROW, IndexArray, Layout, WantedTrie


class Found(Struct, frozen=True, kw_only=True, eq=False):
    items: IndexArray
    """Sorted items, at most k, best first."""
    logprobs: Float64Array
    """Without noise or penalties."""
    is_complete: bool
    """False: what was finished so far; better items may not have been reached."""


class TargetingSearch:
    def __init__(
        self,
        wanted: WantedTrie,
        params: TargetingParams,
        step_table: StepTable | None,
        capacity_slots: int,
    ) -> None:
        """`wanted` may be shared with other searches. Without a step table no round goes parallel.

        `capacity_slots` is at least `slots_needed(widths, params.beams, 0)`, or rows may find none free.
        """
        if params.k < 1 or params.beams < 1:
            raise ValueError(f"k is {params.k} and beams {params.beams}: both must be at least 1")
        if not params.diversity >= 0:
            raise ValueError(f"diversity is {params.diversity}, must be at least 0")
        assert wanted.is_renormalised == (params.scoring == "catalogue"), "made for another scoring"
        self._wanted = wanted
        self._beams = params.beams
        self._noise_seed = params.noise_seed
        self._table = step_table
        self.capacity_slots = capacity_slots
        self._finished = FinishedItems(self._wanted, params.k, params.diversity)
        self._forest: Forest | None = None
        self._order: ParallelOrder | None = None
        """Set: the round is the last, and runs all that remains."""
        self._taken: SearchRows | None = None
        self._open: OpenNodes | None = None
        """Set: nodes run best first, not round by round."""
        self._nodes_at_once = params.beams
        if step_table is not None and wanted.is_renormalised:
            # Where every token of the vocabulary counts, paths fall so steeply that no beam is ever pruned.
            self._nodes_at_once = nodes_at_once(step_table, params.beams)
        self.went_best_first = False
        self.went_parallel = False
        self.num_steps = 0
        self.num_rows = 0
        self.num_verified_items = 0
        self._begin()

    @property
    def is_done(self) -> bool:
        return self._forest is None

    @property
    def decoding(self) -> Decoding:
        """The furthest it has left beam search's order so far."""
        if self.num_steps == 0:
            return "none"
        if self.went_parallel:
            return "parallel"
        return "best_first" if self.went_best_first else "stepwise"

    def result(self) -> Found:
        """At any time: of a search that is not done, the best of what is finished."""
        items, logprobs = self._finished.best()
        return Found(items=items, logprobs=logprobs, is_complete=self.is_done)

    def root_ask(self) -> SearchRows:
        """The row of the context's last token, which runs first and alone."""
        assert self._forest is not None
        assert self.num_steps == 0
        assert self._taken is None
        self._taken = self._forest.take_root()
        return self._taken

    def wanted_rows(self) -> int:
        """How many rows `take` could use now: none while rows are out."""
        if self._forest is None or self._taken is not None or self.num_steps == 0:
            return 0
        if self._order is None:
            return self._forest.num_pending
        return self._order.wanted_rows()

    def take(self, max_rows: int) -> SearchRows:
        """The next rows, at least one and at most `max_rows`. Raises OutOfSlotsError."""
        assert self._forest is not None
        assert self._taken is None, "rows are out already"
        assert self.num_steps > 0, "the root's row runs first"
        assert max_rows > 0
        if self._order is None:
            first = self._forest.layout.num_rows - self._forest.num_pending
            next_rows = slice(first, min(first + max_rows, self._forest.layout.num_rows))
            self._taken = self._forest.take(next_rows)
        else:
            self._taken = self._forest.take(self._order.choose(max_rows))
        return self._taken

    def give(self, rows: SearchRows, allowed_logits: Float32Array, log_sums: Float32Array | None) -> None:
        """What a step says of the rows last taken: a logit an allowed token, in their order, and under
        `vocabulary` scoring a log-sum-exp a row. Raises BadLogitsError where one is not finite.
        """
        assert self._forest is not None
        assert rows is self._taken, "not the rows last taken"
        self._forest.give(rows, allowed_logits, log_sums)
        self._taken = None
        self.num_steps += 1
        self.num_rows += rows.num_rows
        if self._order is not None:
            ended = self._forest.ended_edges(rows)
            self.num_verified_items += len(ended)
            self._finish(ended)
            self._order.prune(self._finished)
            if self._forest.num_pending == 0:
                self._forest = None
        elif self._forest.num_pending == 0 and self._open is not None:
            self._end_best_first(self._open)
        elif self._forest.num_pending == 0:
            self._end_round()

    def _begin(self) -> None:
        wanted = self._wanted
        root = np.array([ROOT])
        if wanted.num_wanted == 0:
            return
        if wanted.is_ended(root)[0]:
            self.num_verified_items = 1
            self._finished.add(wanted.first_item(root), np.zeros(1), np.zeros(1))
            return
        start = 0.0 if self._noise_seed is None else noise.root_score(self._noise_seed)
        top = Frontier(
            nodes=root,
            scores=np.array([start]),
            logprobs=np.zeros(1),
            depths=np.array([-1]),
            paths=np.zeros((1, 0), dtype=np.intp),
            has_gaps=False,
        )
        self._forest = self._forest_of(wanted.one_level(root), top)

    def _end_round(self) -> None:
        """Rank the children of the frontier, and go on below the best."""
        forest = self._forest
        assert forest is not None
        layout = forest.layout
        # A chain's inner edges lead to rows that ran in this round.
        edges = None if layout.is_flat else (layout.edge_rows == NO_ROW).nonzero()[0]
        nodes = layout.edge_nodes if edges is None else layout.edge_nodes[edges]
        scores = forest.edge_scores if edges is None else forest.edge_scores[edges]
        ranks = self._wanted.least_rank[nodes]
        is_ended = self._wanted.is_ended(nodes)
        self.num_verified_items += int(np.count_nonzero(is_ended))
        best = best_first(scores, ranks, 2 * self._beams)
        has_ended = is_ended[best]
        ended = best[: self._beams][has_ended[: self._beams]]
        going_on = best[~has_ended][: self._beams]
        if len(going_on) < self._beams and len(best) < len(nodes):
            others = (~is_ended).nonzero()[0]
            going_on = others[best_first(scores[others], ranks[others], self._beams)]
        if len(ended):
            self._finish(ended if edges is None else edges[ended])
        going_on = going_on[~self._finished.is_hopeless(scores[going_on], ranks[going_on])]
        if not len(going_on):
            self._forest = None
            return
        frontier = forest.children(going_on if edges is None else edges[going_on])
        if self._go_parallel(frontier):
            return
        if self._nodes_at_once < len(frontier.nodes):
            self.went_best_first = True
            self._go_on_best_first(OpenNodes(self._wanted, self._beams, frontier))
        else:
            self._forest = self._forest_of(self._wanted.next_round(frontier.nodes), frontier)

    def _go_parallel(self, frontier: Frontier) -> bool:
        """Where it is predicted to pay."""
        if self._table is None or not len(frontier.nodes):
            return False
        layout = plan_parallel(
            self._wanted,
            frontier,
            self._finished,
            table=self._table,
            beams=self._beams,
            capacity_slots=self.capacity_slots,
        )
        if layout is None:
            return False
        self._forest = self._forest_of(layout, frontier)
        self._order = ParallelOrder(self._wanted, self._forest, self._table)
        self.went_parallel = True
        return True

    def _end_best_first(self, open_nodes: OpenNodes) -> None:
        """Finish what has ended, and go on from the best nodes of all rounds."""
        forest = self._forest
        assert forest is not None
        layout = forest.layout
        edges = (layout.edge_rows == NO_ROW).nonzero()[0]
        is_ended = self._wanted.is_ended(layout.edge_nodes[edges])
        self.num_verified_items += int(np.count_nonzero(is_ended))
        self._finish(edges[is_ended])
        others = edges[~is_ended]
        ranks = self._wanted.least_rank[layout.edge_nodes[others]]
        others = others[~self._finished.is_hopeless(forest.edge_scores[others], ranks)]
        if len(others):
            open_nodes.add(forest.children(others), forest.owners(others))
        open_nodes.close(self._finished)
        self._go_on_best_first(open_nodes)

    def _go_on_best_first(self, open_nodes: OpenNodes) -> None:
        self._open = open_nodes
        if open_nodes.num_open <= self._nodes_at_once and self._go_parallel(open_nodes.all_open()):
            return
        count = self._nodes_at_once
        while count:
            nodes = open_nodes.take(count)
            if not len(nodes.nodes):
                self._forest = None
                return
            layout = self._wanted.next_round(nodes.nodes)
            self._forest = self._forest_of(layout, nodes, open_nodes.held_slots())
            if len(self._forest.free_slots()) >= layout.num_rows:
                return
            open_nodes.put_back()
            count //= 2
        # Beams of several rounds may hold more than those of one: round by round there is always room.
        self._open, self._nodes_at_once, self.went_best_first = None, self._beams, False
        first = open_nodes.first
        self._forest = self._forest_of(self._wanted.next_round(first.nodes), first)

    def _finish(self, edges: IndexArray) -> None:
        forest = self._forest
        assert forest is not None
        items = self._wanted.first_item(forest.layout.edge_nodes[edges])
        self._finished.add(items, forest.edge_scores[edges], forest.edge_logprobs[edges])

    def _forest_of(self, layout: Layout, top: Frontier, held_slots: IndexArray | None = None) -> Forest:
        return Forest(self._wanted, layout, top, self.capacity_slots, self._noise_seed, held_slots)
