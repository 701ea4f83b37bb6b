"""From grants and draft trees to the rows of a step."""

from collections.abc import Sequence as SequenceOf

import numpy as np

from cluster.messages import Record
from decode_workers.draft_tree import DraftTree, node_depths
from decode_workers.scheduler import RowGrant
from decode_workers.step_batch import NO_PARENT, Int32Array, StepBatch


class StepRows(Record, frozen=True, kw_only=True, eq=False):
    """A batch, and where each grant's logits are in its result."""

    batch: StepBatch
    logits_starts: tuple[int, ...]
    """By grant: index in the result of the last forced token's logits row; the tree's nodes follow it."""


def assemble(
    grants: SequenceOf[RowGrant],
    trees: SequenceOf[DraftTree],
    block_tables: Int32Array,
    block_size_tokens: int,
) -> StepRows:
    """Rows of each grant: its pending tokens as a chain, then its tree below the last of them.

    The i-th row of a sequence writes the i-th slot behind the committed ones, whatever its depth; a
    node's position is its depth's. `commit` moves the accepted path to the slots of its positions.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    parents: list[int] = []
    table_indices: list[int] = []
    needs_logits: list[bool] = []
    starts = [0]
    logits_starts: list[int] = []
    num_logits = 0
    for grant, tree in zip(grants, trees, strict=True):
        sequence, num_forced = grant.sequence, grant.num_forced
        assert sequence.reservation is not None, "a running sequence without blocks"
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
        table_indices += [sequence.reservation.table_index] * num_rows
        logits_starts.append(num_logits)
        needs_logits += [False] * (num_forced - 1)
        needs_logits += [grant.is_sampled] * (1 + tree.num_nodes)
        num_logits += 1 + tree.num_nodes if grant.is_sampled else 0
        starts.append(len(token_ids))
    place, tables = np.array(places, dtype=np.int32), np.array(table_indices)
    blocks = block_tables[tables, place // block_size_tokens]
    sequence_starts = np.array(starts, dtype=np.int32)
    width = int(place.max()) // block_size_tokens + 1
    return StepRows(
        batch=StepBatch(
            token_ids=np.array(token_ids, dtype=np.int32),
            positions=np.array(positions, dtype=np.int32),
            slots=blocks * np.int32(block_size_tokens) + place % np.int32(block_size_tokens),
            parents=np.array(parents, dtype=np.int32),
            sequence_starts=sequence_starts,
            context_lengths=place[sequence_starts[:-1]],
            block_tables=block_tables[tables[sequence_starts[:-1]], :width],
            needs_logits=np.array(needs_logits, dtype=np.bool_),
        ),
        logits_starts=tuple(logits_starts),
    )
