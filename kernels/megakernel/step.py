"""A step as every runtime takes and answers it: its rows, what they ask of the head, and what it gave."""

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.head import Reductions

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


class StepError(RuntimeError):
    """A step that was refused or failed; after a failure of the workers every later step fails too."""


class Rows(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A step's rows, as the library reads them: int32 and C-contiguous, what is needed bool.

    StepBatch (decode_workers/step_batch.py) says what the arrays hold.
    """

    token_ids: IntArray
    positions: IntArray
    slots: IntArray
    parents: IntArray
    sequence_starts: IntArray
    context_lengths: IntArray
    block_tables: IntArray
    needs_logits: BoolArray
    needs_best: BoolArray | None = None
    top_k: int = 0
    needs_log_sums: bool = False
    allowed_starts: IntArray | None = None
    allowed_token_ids: IntArray | None = None


class StepOutput(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What a step's head gave, in arrays of the caller's own."""

    logits: FloatArray
    """[rows that need logits and have no allowed tokens, vocab] in row order."""
    reductions: Reductions
    """Of the rows that need the best, in row order."""
    allowed_logits: FloatArray
    """[allowed tokens] in the order of `allowed_token_ids`."""
