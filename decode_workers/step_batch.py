"""The rows of one decode step, as the executor receives them (DESIGN.md section 2)."""

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from megakernel.head import Reductions

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

NO_PARENT = -1


class StepBatch(Struct, frozen=True, kw_only=True, eq=False):
    """Rows of all sequences, grouped by sequence, every parent before its children.

    A row attends to its sequence's committed prefix, to its ancestors and to itself, whatever
    else is in the batch; its KV is written to `slots[row]`. *Held* ancestors are rows of earlier steps.
    """

    token_ids: Int32Array
    """[rows]"""
    positions: Int32Array
    """[rows] committed length of the row's sequence + held ancestors of its root + depth in the batch."""
    slots: Int32Array
    """[rows] token slot of the KV pool (block id * block size + offset) that the row writes."""
    parents: Int32Array
    """[rows] index of the parent row in this batch, or NO_PARENT for a child of the committed prefix or of a
    held row."""
    sequence_starts: Int32Array
    """[sequences + 1] rows [starts[i], starts[i + 1]) belong to sequence i."""
    context_lengths: Int32Array
    """[sequences] committed tokens in the KV pool."""
    block_tables: Int32Array
    """[sequences, max_blocks] KV block ids in order; entries past the sequence's last block are -1."""
    needs_logits: BoolArray
    """[rows] rows whose whole logits row the sampler reads; a chain's inner rows need none. Of a row with
    allowed tokens it is their logits alone."""
    needs_best: BoolArray | None = None
    """[rows] rows whose logits over the whole vocabulary are reduced; None: no row's."""
    top_k: int = 0
    """How many of the likeliest tokens a reduced row tells, at most MAX_TOP_K."""
    needs_log_sums: bool = False
    """Whether a reduced row tells its log-sum-exp."""
    allowed_starts: Int32Array | None = None
    """[rows that need logits or the best, + 1] the i-th of them may take
    `allowed_token_ids[starts[i]:starts[i + 1]]`; an empty slice: any token. None: so may all. A row with
    allowed tokens that needs no reductions is computed for those alone."""
    allowed_token_ids: Int32Array | None = None
    """Ascending and unique within a row."""
    held_starts: Int32Array | None = None
    """[rows + 1] `held_slots[starts[i]:starts[i + 1]]` are the slots of row i's ancestors that earlier steps
    ran, the root's first. Only a row without a parent in the batch names any: another has its parent's. None:
    no row has any. A CPU takes 255 ancestors of a row, held and in the batch."""
    held_slots: Int32Array | None = None
    """No row of the batch writes one of them."""

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.context_lengths)


class StepResult(Struct, frozen=True, kw_only=True, eq=False):
    """What a step says of the rows that asked."""

    rows: Int32Array
    """[n] rows that needed logits and have no allowed tokens, ascending."""
    logits: Float32Array
    """[n, vocab] of those."""
    reductions: Reductions | None = None
    """Of the rows that needed the best, in row order; None where the batch named none."""
    allowed_logits: Float32Array | None = None
    """[allowed tokens] in the order of the batch's; None where it had none."""


def ancestor_mask(parents: Int32Array, start: int, end: int) -> BoolArray:
    """[n, n] for rows [start, end) of one sequence: true at [i, j] where row j is row i's ancestor or itself.

    `parents` holds indices into the whole batch. A parent outside [start, i) breaks the order
    that StepBatch promises, and fails an assertion.
    """
    num_rows = end - start
    mask = np.zeros((num_rows, num_rows), dtype=np.bool_)
    for i in range(num_rows):
        parent = int(parents[start + i])
        if parent != NO_PARENT:
            assert start <= parent < start + i, f"row {start + i} has parent {parent}, not before it"
            mask[i] = mask[parent - start]
        mask[i, i] = True
    return mask
