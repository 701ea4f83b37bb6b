"""Rows of searches in a step, behind those of everything else: what is run, and where the answers will be."""

from collections.abc import Sequence as SequenceOf

import msgspec
import numpy as np

from cluster.ids import RequestId
from cluster.messages import Record
from decode_workers.sampler import BadLogitsError
from decode_workers.scheduler import RowGrant
from decode_workers.sequence import Sequence
from decode_workers.step_batch import NO_PARENT, BoolArray, Int32Array, StepBatch, StepResult
from decode_workers.targeting.search import TargetingSearch
from decode_workers.targeting.search_rows import SearchRows
from decode_workers.verdicts import Verdict


class SearchGrant(Record, frozen=True, kw_only=True, eq=False):
    """What one search has of a step: rows of its own, or the row that ends its prompt."""

    sequence: Sequence
    rows: SearchRows
    root_row: int | None = None
    """Of the step's other rows, behind all of those that ask anything. `rows` says what it is asked for."""


class SearchAnswer(Record, frozen=True, kw_only=True, eq=False):
    """Where the answers to one search are in a step's result."""

    sequence: Sequence
    rows: SearchRows
    first_edge: int
    """Among the allowed tokens' logits."""
    first_row: int
    """Among the reductions."""

    def give(self, result: StepResult) -> None:
        """Hand the search what it asked for. Raises BadLogitsError."""
        num_rows = self.rows.num_rows
        assert result.allowed_logits is not None, "a step without allowed tokens"
        edges = result.allowed_logits[self.first_edge : self.first_edge + len(self.rows.allowed_token_ids)]
        log_sums = None
        if self.rows.needs_log_sums.any():
            assert result.reductions is not None, "a step without reductions"
            log_sums = result.reductions.log_sums[self.first_row : self.first_row + num_rows]
        search_of(self.sequence).give(self.rows, edges, log_sums)


def take_search_rows(grants: SequenceOf[RowGrant]) -> list[SearchRows]:
    """Of the grants that ask for a catalogue's tokens: what they run, or ask of their prompt's end."""
    return [
        search_of(grant.sequence).take(grant.num_searched)
        if grant.num_searched
        else search_of(grant.sequence).root_ask()
        for grant in grants
        if grant.asks_catalogue
    ]


def give_answers(answers: SequenceOf[SearchAnswer], result: StepResult) -> dict[RequestId, Verdict]:
    """Hand every search what it asked for; verdicts on those whose logits are no distribution."""
    faults: dict[RequestId, Verdict] = {}
    for answer in answers:
        try:
            answer.give(result)
        except BadLogitsError as error:
            faults[answer.sequence.request.request_id] = Verdict(fault=str(error))
    return faults


def search_of(sequence: Sequence) -> TargetingSearch:
    assert sequence.search is not None, "a sequence that searches nothing"
    return sequence.search


def add_searches(
    plain: StepBatch | None,
    grants: SequenceOf[SearchGrant],
    block_tables: Int32Array,
    block_size_tokens: int,
) -> tuple[StepBatch, tuple[SearchAnswer, ...]]:
    """The step of `plain` (None: no other rows) and of searches: roots first, then those with own rows."""
    own = [grant for grant in grants if grant.root_row is None]
    batches = [_own_rows(grant, block_tables, block_size_tokens) for grant in own]
    batch = joined(batches if plain is None else [plain, *batches])
    needs_logits, needs_best = batch.needs_logits.copy(), _flags(batch)
    num_allowed = np.zeros(batch.num_rows, dtype=np.int32)
    starts: list[int] = []
    next_row = 0 if plain is None else plain.num_rows
    for grant in grants:
        start = next_row if grant.root_row is None else grant.root_row
        end = start + grant.rows.num_rows
        num_allowed[start:end] = np.diff(grant.rows.allowed_starts)
        needs_best[start:end] = grant.rows.needs_log_sums
        # Without allowed tokens a row is run for its KV alone.
        needs_logits[start:end] = ~grant.rows.needs_log_sums & (num_allowed[start:end] > 0)
        starts.append(start)
        next_row = max(next_row, end)
    asked = np.flatnonzero(needs_logits | needs_best)
    edges = _starts(num_allowed)
    best = _starts(needs_best)
    batch = msgspec.structs.replace(
        batch,
        needs_logits=needs_logits,
        needs_best=needs_best if needs_best.any() else None,
        needs_log_sums=batch.needs_log_sums or any(grant.rows.needs_log_sums.any() for grant in grants),
        allowed_starts=_starts(num_allowed[asked]),
        allowed_token_ids=np.concatenate([grant.rows.allowed_token_ids for grant in grants]),
    )
    return batch, tuple(
        SearchAnswer(
            sequence=grant.sequence, rows=grant.rows, first_edge=int(edges[start]), first_row=int(best[start])
        )
        for grant, start in zip(grants, starts, strict=True)
    )


def joined(batches: SequenceOf[StepBatch]) -> StepBatch:
    """One step of all rows, in order; none asks for allowed tokens."""
    if len(batches) == 1:
        return batches[0]
    rows = np.cumsum([0, *(batch.num_rows for batch in batches)], dtype=np.int32)
    width = max(batch.block_tables.shape[1] for batch in batches)
    has_held = any(batch.held_starts is not None for batch in batches)
    return StepBatch(
        token_ids=np.concatenate([batch.token_ids for batch in batches]),
        positions=np.concatenate([batch.positions for batch in batches]),
        slots=np.concatenate([batch.slots for batch in batches]),
        parents=np.concatenate(
            [
                np.where(batch.parents == NO_PARENT, np.int32(NO_PARENT), batch.parents + first)
                for batch, first in zip(batches, rows[:-1], strict=True)
            ]
        ),
        sequence_starts=np.concatenate(
            [
                np.zeros(1, dtype=np.int32),
                *(b.sequence_starts[1:] + first for b, first in zip(batches, rows[:-1], strict=True)),
            ]
        ),
        context_lengths=np.concatenate([batch.context_lengths for batch in batches]),
        block_tables=np.concatenate([_widened(batch.block_tables, width) for batch in batches]),
        needs_logits=np.concatenate([batch.needs_logits for batch in batches]),
        needs_best=np.concatenate([_flags(batch) for batch in batches]),
        top_k=max(batch.top_k for batch in batches),
        needs_log_sums=any(batch.needs_log_sums for batch in batches),
        held_starts=_starts(np.concatenate([_num_held(batch) for batch in batches])) if has_held else None,
        held_slots=(
            np.concatenate([batch.held_slots for batch in batches if batch.held_slots is not None])
            if has_held
            else None
        ),
    )


def _own_rows(grant: SearchGrant, block_tables: Int32Array, block_size_tokens: int) -> StepBatch:
    """The i-th slot of a search is the i-th behind the prompt's."""
    sequence, rows = grant.sequence, grant.rows
    assert sequence.reservation is not None, "a search without blocks"
    table = block_tables[sequence.reservation.table_index]
    committed, size = np.int32(sequence.committed), np.int32(block_size_tokens)

    def slots(local: Int32Array) -> Int32Array:
        places = local + committed
        found: Int32Array = table[places // size] * size + places % size
        return found

    return StepBatch(
        token_ids=rows.token_ids,
        positions=rows.depths + committed,
        slots=slots(rows.slots),
        parents=rows.parents,
        sequence_starts=np.array([0, rows.num_rows], dtype=np.int32),
        context_lengths=np.array([committed], dtype=np.int32),
        block_tables=table[None, : -(-sequence.committed // block_size_tokens)],
        needs_logits=np.zeros(rows.num_rows, dtype=np.bool_),
        held_starts=rows.held_starts,
        held_slots=slots(rows.held_slots),
    )


def _flags(batch: StepBatch) -> BoolArray:
    """[rows] a copy of `needs_best`."""
    return np.zeros(batch.num_rows, dtype=np.bool_) if batch.needs_best is None else batch.needs_best.copy()


def _num_held(batch: StepBatch) -> Int32Array:
    if batch.held_starts is None:
        return np.zeros(batch.num_rows, dtype=np.int32)
    counts: Int32Array = np.diff(batch.held_starts)
    return counts


def _starts(counts: Int32Array | BoolArray) -> Int32Array:
    starts = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts


def _widened(tables: Int32Array, width: int) -> Int32Array:
    return np.pad(tables, ((0, 0), (0, width - tables.shape[1])), constant_values=-1)
