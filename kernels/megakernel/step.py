"""A step as every runtime takes and answers it: its rows, what they ask of the head, and what it gave."""

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.head import Reductions

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

NO_PARENT = -1


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
    held_starts: IntArray | None = None
    held_slots: IntArray | None = None


class StepOutput(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What a step's head gave, in arrays of the caller's own."""

    logits: FloatArray
    """[rows that need logits and have no allowed tokens, vocab] in row order."""
    reductions: Reductions
    """Of the rows that need the best, in row order."""
    allowed_logits: FloatArray
    """[allowed tokens] in the order of `allowed_token_ids`."""


def check_held_lengths(starts: IntArray, slots: IntArray, num_rows: int) -> None:
    """Raises StepError."""
    if len(starts) != num_rows + 1:
        raise StepError(f"{len(starts)} held_starts: one a row, and one, are {num_rows + 1}")
    if starts[-1] != len(slots):
        raise StepError(f"held_starts end at {starts[-1]} of {len(slots)} held slots")


def check_held(starts: IntArray, slots: IntArray, parents: IntArray, num_slots: int) -> None:
    """Whether rows may have these held ancestors, wherever the rows are. Raises StepError."""
    check_held_lengths(starts, slots, len(parents))
    if starts[0] != 0:
        raise StepError(f"held_starts begin at {starts[0]}")
    counts = np.diff(starts)
    if (counts < 0).any():
        row = int((counts < 0).argmax())
        raise StepError(f"row {row}: its held slots are [{starts[row]}, {starts[row + 1]})")
    if (is_wrong := (counts > 0) & (parents != NO_PARENT)).any():
        row = int(is_wrong.argmax())
        raise StepError(f"row {row}: its parent is row {parents[row]}, so it has no held slots of its own")
    if (is_wrong := (slots < 0) | (slots >= num_slots)).any():
        at = int(is_wrong.argmax())
        row = int(np.searchsorted(starts, at, side="right")) - 1
        raise StepError(f"row {row}: held slot {slots[at]} is not in a pool of {num_slots}")
