"""From grants and draft trees to the rows of a step."""

from collections.abc import Sequence as SequenceOf
from functools import lru_cache

import numpy as np

from cluster.messages import Record
from decode_workers.draft_tree import NO_DRAFT, DraftTree, node_depths
from decode_workers.scheduler import RowGrant
from decode_workers.search_batch import SearchAnswer, SearchGrant, add_searches
from decode_workers.sequence import Sequence
from decode_workers.step_batch import NO_PARENT, BoolArray, Int32Array, StepBatch
from decode_workers.targeting.search_rows import SearchRows


class StepRows(Record, frozen=True, kw_only=True, eq=False):
    """A batch, and where each grant's answers are in its result."""

    batch: StepBatch
    answer_starts: SequenceOf[int]
    """By grant: where the last forced token's row is among the result's logits, or among its reductions if
    the sequence reads those; the tree's nodes follow it. Of grants without searches, which are the first."""
    search_answers: tuple[SearchAnswer, ...] = ()
    """Of the searches that asked, in order."""


class _Rows(Record, frozen=True, kw_only=True, eq=False):
    """What a row runs and where; arrays are [rows]."""

    token_ids: Int32Array
    positions: Int32Array
    places: Int32Array
    """Which of its sequence's slots the row writes."""
    parents: Int32Array
    tables: Int32Array
    """Row of the pool's block tables."""
    starts: Int32Array
    """[grants + 1]"""


class _Asked(Record, frozen=True, kw_only=True, eq=False):
    """What the head is asked for."""

    needs_logits: BoolArray
    needs_best: BoolArray | None
    top_k: int
    needs_log_sums: bool
    answer_starts: SequenceOf[int]


def assemble(
    grants: SequenceOf[RowGrant],
    trees: SequenceOf[DraftTree],
    block_tables: Int32Array,
    block_size_tokens: int,
    searches: SequenceOf[SearchRows] = (),
) -> StepRows:
    """Rows of each grant: its pending tokens as a chain, then its tree below the last; or its search's.

    `searches`: in order, what the grants for which `asks_catalogue` holds run or ask for. These are the last.
    """
    plain = [grant for grant in grants if not grant.num_searched]
    batch: StepBatch | None = None
    answer_starts: SequenceOf[int] = ()
    if plain:
        batch, answer_starts = _plain_rows(plain, trees[: len(plain)], block_tables, block_size_tokens)
    if not searches:
        assert batch is not None, "a step without rows"
        return StepRows(batch=batch, answer_starts=answer_starts)
    asking = [grant for grant in grants if grant.asks_catalogue]
    searched = [
        SearchGrant(
            sequence=grant.sequence,
            rows=rows,
            root_row=None if grant.num_searched else _last_row(batch, grants.index(grant)),
        )
        for grant, rows in zip(asking, searches, strict=True)
    ]
    batch, answers = add_searches(batch, searched, block_tables, block_size_tokens)
    padded = (*answer_starts, *([0] * (len(grants) - len(plain))))
    return StepRows(batch=batch, answer_starts=padded, search_answers=answers)


def _last_row(batch: StepBatch | None, sequence: int) -> int:
    assert batch is not None, "a prompt without rows"
    return int(batch.sequence_starts[sequence + 1]) - 1


def _plain_rows(
    grants: SequenceOf[RowGrant],
    trees: SequenceOf[DraftTree],
    block_tables: Int32Array,
    block_size_tokens: int,
) -> tuple[StepBatch, SequenceOf[int]]:
    """And by grant where its answers start.

    The i-th row of a sequence writes the i-th slot behind the committed ones, whatever its depth; a
    node's position is its depth's. `commit` moves the accepted path to the slots of its positions.
    """
    is_single = all(grant.num_forced == 1 for grant in grants) and all(tree is NO_DRAFT for tree in trees)
    rows = _single_rows(grants) if is_single else _tree_rows(grants, trees)
    asked = _asked(grants, trees)
    size = np.int32(block_size_tokens)
    block_places = rows.places // size
    first_rows = rows.starts[:-1]
    width = int(block_places.max()) + 1
    batch = StepBatch(
        token_ids=rows.token_ids,
        positions=rows.positions,
        slots=block_tables[rows.tables, block_places] * size + rows.places % size,
        parents=rows.parents,
        sequence_starts=rows.starts,
        context_lengths=rows.places[first_rows],
        block_tables=block_tables[rows.tables[first_rows], :width],
        needs_logits=asked.needs_logits,
        needs_best=asked.needs_best,
        top_k=asked.top_k,
        needs_log_sums=asked.needs_log_sums,
    )
    return batch, asked.answer_starts


def _single_rows(grants: SequenceOf[RowGrant]) -> _Rows:
    """One token a sequence: what most steps are."""
    sequences = [grant.sequence for grant in grants]
    places = np.array([sequence.committed for sequence in sequences], dtype=np.int32)
    tokens = [sequence.tokens[sequence.committed] for sequence in sequences]
    tables = [_table_index(sequence) for sequence in sequences]
    return _Rows(
        token_ids=np.array(tokens, dtype=np.int32),
        positions=places,
        places=places,
        parents=_no_parents(len(grants)),
        tables=np.array(tables, dtype=np.int32),
        starts=_counted(len(grants)),
    )


def _tree_rows(grants: SequenceOf[RowGrant], trees: SequenceOf[DraftTree]) -> _Rows:
    token_ids: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    parents: list[int] = []
    tables: list[int] = []
    starts = [0]
    for grant, tree in zip(grants, trees, strict=True):
        sequence, num_forced = grant.sequence, grant.num_forced
        base, first_row = sequence.committed, len(token_ids)
        num_rows = num_forced + tree.num_nodes
        token_ids += sequence.tokens[base : base + num_forced]
        positions += range(base, base + num_forced)
        parents.append(NO_PARENT)
        parents += range(first_row, first_row + num_forced - 1)
        if tree.token_ids:
            root_row = first_row + num_forced - 1
            token_ids += tree.token_ids
            positions += [base + num_forced - 1 + depth for depth in node_depths(tree)]
            parents += [root_row + 1 + parent for parent in tree.parents]
        places += range(base, base + num_rows)
        tables += [_table_index(sequence)] * num_rows
        starts.append(len(token_ids))
    return _Rows(
        token_ids=np.array(token_ids, dtype=np.int32),
        positions=np.array(positions, dtype=np.int32),
        places=np.array(places, dtype=np.int32),
        parents=np.array(parents, dtype=np.int32),
        tables=np.array(tables, dtype=np.int32),
        starts=np.array(starts, dtype=np.int32),
    )


def _asked(grants: SequenceOf[RowGrant], trees: SequenceOf[DraftTree]) -> _Asked:
    """Logits where the sampler reads them, reductions where those will do; of chains' inner rows nothing."""
    needs_logits: list[bool] = []
    needs_best: list[bool] = []
    answer_starts: list[int] = []
    num_logits = num_best = top_k = 0
    needs_log_sums = False
    for grant, tree in zip(grants, trees, strict=True):
        sequence, num_inner = grant.sequence, grant.num_forced - 1
        if num_inner:
            needs_logits += [False] * num_inner
            needs_best += [False] * num_inner
        num_answers = 1 + len(tree.token_ids)
        is_sampled, reads_logits = grant.is_sampled and sequence.search is None, sequence.reads_logits
        needs_logits += [is_sampled and reads_logits] * num_answers
        needs_best += [is_sampled and not reads_logits] * num_answers
        answer_starts.append(num_logits if reads_logits else num_best)
        if is_sampled and reads_logits:
            num_logits += num_answers
        elif is_sampled:
            num_best += num_answers
            if sequence.num_top is not None:
                top_k, needs_log_sums = max(top_k, sequence.num_top), True
    return _Asked(
        needs_logits=np.array(needs_logits, dtype=np.bool_),
        needs_best=np.array(needs_best, dtype=np.bool_) if num_best else None,
        top_k=top_k,
        needs_log_sums=needs_log_sums,
        answer_starts=answer_starts,
    )


def _table_index(sequence: Sequence) -> int:
    assert sequence.reservation is not None, "a running sequence without blocks"
    return sequence.reservation.table_index


@lru_cache(maxsize=256)
def _no_parents(num_rows: int) -> Int32Array:
    """Shared and read-only."""
    return _frozen(np.full(num_rows, NO_PARENT, dtype=np.int32))


@lru_cache(maxsize=256)
def _counted(num_rows: int) -> Int32Array:
    """0 .. num_rows: shared and read-only."""
    return _frozen(np.arange(num_rows + 1, dtype=np.int32))


def _frozen(array: Int32Array) -> Int32Array:
    array.flags.writeable = False
    return array
