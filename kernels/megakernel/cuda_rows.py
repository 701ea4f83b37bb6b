"""From a step's rows to the tables that its kernel reads, checked: device code trusts what it is handed.

As the CPU's reader of rows (kernels/include/cpu/step.h, head_rows.h), and with its messages.
"""

from collections.abc import Iterable
from itertools import pairwise

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.cuda_arguments import RowFlag
from megakernel.head import MAX_TOP_K
from megakernel.step import NO_PARENT, BoolArray, IntArray, Rows, StepError, check_held


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a compiled model and its pool fix for all steps."""

    max_rows: int
    vocab_size: int
    max_context_tokens: int
    block_size_tokens: int
    num_blocks: int
    stats_span: int

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block_size_tokens

    @property
    def num_spans(self) -> int:
        return -(-self.vocab_size // self.stats_span)


class StepTables(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """The arrays of StepArguments, by the same names: all of 4 bytes an element, and contiguous."""

    token_ids: IntArray
    positions: IntArray
    slots: IntArray
    context_lengths: IntArray
    table_rows: IntArray
    path_starts: IntArray
    path_slots: IntArray
    block_tables: IntArray
    row_flags: IntArray
    needed_spans: npt.NDArray[np.uint32]
    allowed_starts: IntArray
    allowed_token_ids: IntArray


class StepAsk(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A step's tables, and which rows are answered, in order."""

    tables: StepTables
    max_blocks: int
    """Columns of `block_tables`: as many as the committed contexts need."""
    logit_rows: IntArray
    """Whose logits are handed out."""
    full_rows: IntArray
    """With logits over the whole vocabulary, handed out or not."""
    reduced_rows: IntArray
    num_allowed: int


def read_rows(rows: Rows, limits: Limits) -> StepAsk:
    """Raises StepError for a step that must not run."""
    num_rows, num_sequences = len(rows.token_ids), len(rows.context_lengths)
    if not 1 <= num_rows <= limits.max_rows:
        raise StepError(f"a step has 1 to {limits.max_rows} rows, not {num_rows}")
    starts, contexts = rows.sequence_starts, rows.context_lengths
    lengths = _check_sequences(starts, num_rows, num_sequences)
    sequences = np.repeat(np.arange(num_sequences, dtype=np.int32), lengths)
    row_contexts = contexts[sequences]
    max_blocks = _check_tables(rows, limits)
    _check_fields(rows, row_contexts, limits)
    if rows.held_starts is not None:
        assert rows.held_slots is not None, "held_starts without held_slots"
        check_held(rows.held_starts, rows.held_slots, rows.parents, limits.num_slots)
    path_starts, path_slots = _paths(rows, row_contexts, starts, sequences)
    allowed_starts, allowed_token_ids = _allowed(rows, limits.vocab_size)
    has_allowed = np.diff(allowed_starts) > 0
    needs_best = np.zeros(num_rows, dtype=np.bool_) if rows.needs_best is None else rows.needs_best
    is_restricted = has_allowed & ~needs_best
    is_handed_out = rows.needs_logits & ~has_allowed
    flags = (
        is_handed_out * int(RowFlag.WANTS_LOGITS)
        + needs_best * int(RowFlag.WANTS_REDUCTIONS)
        + is_restricted * int(RowFlag.IS_RESTRICTED)
    )
    is_full = is_handed_out | needs_best
    allowed_of_restricted = allowed_token_ids[np.repeat(is_restricted, np.diff(allowed_starts))]
    tables = StepTables(
        token_ids=rows.token_ids,
        positions=rows.positions,
        slots=rows.slots,
        context_lengths=row_contexts,
        table_rows=sequences,
        path_starts=path_starts,
        path_slots=path_slots,
        block_tables=np.ascontiguousarray(rows.block_tables[:, :max_blocks]),
        row_flags=flags.astype(np.int32),
        needed_spans=_needed_spans(allowed_of_restricted, is_whole=bool(is_full.any()), limits=limits),
        allowed_starts=allowed_starts,
        allowed_token_ids=allowed_token_ids,
    )
    return StepAsk(
        tables=tables,
        max_blocks=max_blocks,
        logit_rows=_indices(is_handed_out),
        full_rows=_indices(is_full),
        reduced_rows=_indices(needs_best),
        num_allowed=len(allowed_token_ids),
    )


def _check_sequences(starts: IntArray, num_rows: int, num_sequences: int) -> IntArray:
    """Rows of each sequence."""
    if not 1 <= num_sequences <= num_rows:
        raise StepError(f"{num_rows} rows cannot be of {num_sequences} sequences")
    if len(starts) != num_sequences + 1 or starts[0] != 0 or starts[-1] != num_rows:
        raise StepError(f"sequence starts do not cover the {num_rows} rows")
    lengths: IntArray = np.diff(starts)
    if (lengths < 1).any():
        raise StepError(f"sequence {_first(lengths < 1)} has no rows")
    return lengths


def _check_tables(rows: Rows, limits: Limits) -> int:
    """Blocks that the longest committed context takes, at least 1."""
    contexts, tables = rows.context_lengths, rows.block_tables
    width = tables.shape[1]
    if tables.shape[0] != len(contexts):
        raise StepError(f"{tables.shape[0]} block tables for {len(contexts)} sequences")
    num_committed = -(-contexts // limits.block_size_tokens)
    if (is_wrong := (contexts < 0) | (num_committed > width)).any():
        at = _first(is_wrong)
        raise StepError(
            f"sequence {at}: {contexts[at]} committed tokens do not fit its block table of {width} blocks"
        )
    is_committed = np.arange(width) < num_committed[:, None]
    if (is_wrong := is_committed & ((tables < 0) | (tables >= limits.num_blocks))).any():
        at, entry = (int(index[0]) for index in np.nonzero(is_wrong))
        raise StepError(
            f"sequence {at}: block table entry {entry} is {tables[at, entry]}; "
            f"the pool has {limits.num_blocks} blocks"
        )
    return max(1, int(num_committed.max()))


def _check_fields(rows: Rows, contexts: IntArray, limits: Limits) -> None:
    tokens, slots, positions = rows.token_ids, rows.slots, rows.positions
    if (is_wrong := (tokens < 0) | (tokens >= limits.vocab_size)).any():
        at = _first(is_wrong)
        raise StepError(f"row {at}: token {tokens[at]} is not in a vocabulary of {limits.vocab_size}")
    if (is_wrong := (slots < 0) | (slots >= limits.num_slots)).any():
        at = _first(is_wrong)
        raise StepError(f"row {at}: slot {slots[at]} is not in a pool of {limits.num_slots}")
    if (is_wrong := (positions < contexts) | (positions >= limits.max_context_tokens)).any():
        at = _first(is_wrong)
        raise StepError(
            f"row {at}: position {positions[at]} is not in [{contexts[at]}, {limits.max_context_tokens})"
        )


def _paths(
    rows: Rows, contexts: IntArray, starts: IntArray, sequences: IntArray
) -> tuple[IntArray, IntArray]:
    """Slots of each row's ancestors and itself, held ones first, and where each row's begin."""
    depths: IntArray = rows.positions - contexts
    if (rows.parents == NO_PARENT).all():
        own_starts = np.arange(len(depths) + 1, dtype=np.int32)
        if rows.held_starts is None or rows.held_slots is None:
            if not depths.any():
                return own_starts, rows.slots
        elif (depths == np.diff(rows.held_starts)).all():
            path_slots = np.insert(rows.held_slots, rows.held_starts[1:], rows.slots)
            return rows.held_starts + own_starts, path_slots
    held = _held(rows)
    paths: list[list[int]] = []
    firsts = starts[sequences].tolist()
    for row, (parent, slot, depth, first) in enumerate(
        zip(rows.parents.tolist(), rows.slots.tolist(), depths.tolist(), firsts, strict=True)
    ):
        if parent >= row:
            raise StepError(f"row {row}: its parent {parent} is not before it")
        is_child = parent != NO_PARENT
        before = paths[parent] if is_child and parent >= first else held.get(row, ())
        path = [*before, slot]
        if (is_child and parent < first) or len(path) <= depth:
            raise StepError(
                f"row {row}: its position is {depth + int(contexts[row])}, but it has not {depth} ancestors"
            )
        if len(path) > depth + 1:
            raise StepError(f"row {row}: it has more than {depth} ancestors")
        paths.append(path)
    return _starts([len(path) for path in paths]), _flat(paths)


def _held(rows: Rows) -> dict[int, list[int]]:
    """Slots of the held ancestors of each row that names any."""
    if rows.held_starts is None or rows.held_slots is None:
        return {}
    starts, slots = rows.held_starts.tolist(), rows.held_slots.tolist()
    return {row: slots[begin:end] for row, (begin, end) in enumerate(pairwise(starts)) if begin < end}


def _allowed(rows: Rows, vocab_size: int) -> tuple[IntArray, IntArray]:
    """Allowed tokens and where each row's begin, of all rows rather than of those that need logits."""
    most = min(MAX_TOP_K, vocab_size)
    if not 0 <= rows.top_k <= most:
        raise StepError(f"top_k is {rows.top_k}; it is at most {most}")
    if rows.allowed_starts is None:
        return np.zeros(len(rows.token_ids) + 1, dtype=np.int32), np.empty(0, dtype=np.int32)
    assert rows.allowed_token_ids is not None, "allowed_starts without allowed_token_ids"
    tokens, given = rows.allowed_token_ids, rows.allowed_starts
    is_logit_row = rows.needs_logits if rows.needs_best is None else rows.needs_logits | rows.needs_best
    if len(given) != np.count_nonzero(is_logit_row) + 1:
        raise StepError(f"{len(given)} allowed_starts: one a row that needs logits, and one")
    if given[-1] != len(tokens):
        raise StepError(f"allowed_starts end at {given[-1]} of {len(tokens)} allowed tokens")
    if given[0] != 0:
        raise StepError(f"allowed_starts begin at {given[0]}")
    counts = np.zeros(len(is_logit_row), dtype=np.int32)
    counts[is_logit_row] = np.diff(given)
    if (counts < 0).any():
        row = _first(counts < 0)
        at = int(np.count_nonzero(is_logit_row[:row]))
        raise StepError(f"row {row}: its allowed tokens are [{given[at]}, {given[at + 1]})")
    starts = _starts(counts)
    _check_allowed(tokens, starts, vocab_size)
    return starts, tokens


def _check_allowed(tokens: IntArray, starts: IntArray, vocab_size: int) -> None:
    before = np.concatenate([[-1], tokens[:-1]])
    before[starts[:-1][np.diff(starts) > 0]] = -1
    is_wrong = (tokens <= before) | (tokens >= vocab_size)
    if is_wrong.any():
        at = _first(is_wrong)
        row = int(np.searchsorted(starts, at, side="right")) - 1
        raise StepError(
            f"row {row}: allowed token {tokens[at]} after {before[at]}, in a vocabulary of {vocab_size}"
        )


def _needed_spans(allowed: IntArray, *, is_whole: bool, limits: Limits) -> npt.NDArray[np.uint32]:
    is_needed = np.zeros(-(-limits.num_spans // 32) * 32, dtype=np.bool_)
    if is_whole:
        is_needed[: limits.num_spans] = True
    else:
        is_needed[allowed // limits.stats_span] = True
    return np.packbits(is_needed, bitorder="little").view(np.uint32)


def _starts(lengths: Iterable[int]) -> IntArray:
    return np.concatenate([[0], np.cumsum(np.fromiter(lengths, dtype=np.int64))]).astype(np.int32)


def _flat(paths: list[list[int]]) -> IntArray:
    return np.array([slot for path in paths for slot in path], dtype=np.int32)


def _first(is_wrong: BoolArray) -> int:
    return int(is_wrong.argmax())


def _indices(mask: BoolArray) -> IntArray:
    return np.flatnonzero(mask).astype(np.int32)
