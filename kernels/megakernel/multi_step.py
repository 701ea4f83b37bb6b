"""Several decode steps without the scheduler in between: what is asked, what comes back, and the plain way.

Sequences decode greedily, each from one pending token. A step verifies the pending token and a draft chain
below it, accepts the model's own tokens for as long as the draft foresaw them, and goes on from the last of
those. `HostRun` does it one step at a time: so runs a runtime without a kernel for it, and it is the oracle
of those that have one.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import numpy as np

from megakernel.draft_automaton import DraftAutomaton
from megakernel.head import Reductions
from megakernel.step import FloatArray, IntArray, Rows, StepError, StepOutput

MAX_STEPS = 64
MAX_DRAFT_TOKENS = 7
MAX_STOP_TOKENS = 64
"""A sequence."""
_NO_PARENT = -1


class MultiStep(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Sequences as of `Rows`: int32 and C-contiguous."""

    num_steps: int
    """At most; a run ends sooner where all sequences have."""
    token_ids: IntArray
    """[sequences] the pending token: the last known one, which has no KV yet."""
    context_lengths: IntArray
    """[sequences] committed tokens."""
    block_tables: IntArray
    """[sequences, max_blocks] with room for `context_lengths + max_new_tokens` tokens."""
    max_new_tokens: IntArray
    """[sequences] at least 1; after as many a sequence has ended."""
    stop_starts: IntArray
    """[sequences + 1] into `stop_token_ids`."""
    stop_token_ids: IntArray
    """A sequence has ended with the first of its own that it emits."""
    needs_log_sums: bool = False
    drafts: DraftAutomaton | None = None
    max_draft_tokens: int = 0
    """A sequence and step; 0 without `drafts`."""
    draft_states: IntArray | None = None
    """[sequences] of `drafts`, after the pending token."""

    @property
    def num_sequences(self) -> int:
        return len(self.token_ids)

    @property
    def rows_a_sequence(self) -> int:
        return 1 + self.max_draft_tokens

    @property
    def num_rows(self) -> int:
        return self.num_sequences * self.rows_a_sequence

    def stop_tokens(self, sequence: int) -> frozenset[int]:
        start, end = self.stop_starts[sequence], self.stop_starts[sequence + 1]
        return frozenset(self.stop_token_ids[start:end].tolist())


class StepTokens(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What one step of a run emitted. Sequence i's tokens are `counts[i]` of `reductions`, from row
    i * rows_a_sequence on. A sequence whose logits are not finite ends with that row's answer."""

    counts: IntArray
    """[sequences] 0 for one that had ended."""
    reductions: Reductions
    """[sequences * rows_a_sequence]; rows that emitted nothing hold anything. No top."""

    @property
    def rows_a_sequence(self) -> int:
        return len(self.reductions.token_ids) // len(self.counts)

    def rows_of(self, sequence: int) -> range:
        """That emitted something."""
        first = sequence * self.rows_a_sequence
        return range(first, first + int(self.counts[sequence]))

    def tokens_of(self, sequence: int) -> list[int]:
        rows = self.rows_of(sequence)
        tokens: list[int] = self.reductions.token_ids[rows.start : rows.stop].tolist()
        return tokens


class StepRun(Protocol):
    """Steps under way. No other step may begin before `next` has returned None or raised StepError."""

    def next(self) -> StepTokens | None:
        """Wait for the next step's tokens; None after the last. Raises StepError."""
        ...

    def stop(self) -> None:
        """Begin no further step, as soon as that can be; those already begun are still told by `next`."""
        ...


def check_multi_step(run: MultiStep, *, max_rows: int, vocab_size: int, max_context_tokens: int) -> None:
    """Raises StepError for what must not run; what a plain step checks is checked with its rows."""
    if not 1 <= run.num_steps <= MAX_STEPS:
        raise StepError(f"a run has 1 to {MAX_STEPS} steps, not {run.num_steps}")
    if not 0 <= run.max_draft_tokens <= MAX_DRAFT_TOKENS:
        raise StepError(f"a draft has at most {MAX_DRAFT_TOKENS} tokens, not {run.max_draft_tokens}")
    if (run.drafts is None) != (run.max_draft_tokens == 0) or (run.drafts is None) != (
        run.draft_states is None
    ):
        raise StepError("drafts, their states and a number of draft tokens go together")
    if not 1 <= run.num_rows <= max_rows:
        what = f"{run.num_sequences} sequences of {run.rows_a_sequence} rows"
        raise StepError(f"{what} are {run.num_rows}: a step has 1 to {max_rows}")
    _check_shapes(run)
    if run.drafts is not None and run.draft_states is not None:
        _check(run.draft_states, 0, run.drafts.num_states, "draft state")
    _check(run.token_ids, 0, vocab_size, "token")
    _check(run.stop_token_ids, 0, vocab_size, "stop token")
    _check(run.max_new_tokens, 1, max_context_tokens + 1, "max_new_tokens")
    ends = run.context_lengths.astype(np.int64) + run.max_new_tokens - 1
    _check(ends, 0, max_context_tokens, "last position")


def _check_shapes(run: MultiStep) -> None:
    sequences = run.num_sequences
    lengths = {
        "context_lengths": (run.context_lengths, sequences),
        "block_tables": (run.block_tables, sequences),
        "max_new_tokens": (run.max_new_tokens, sequences),
        "stop_starts": (run.stop_starts, sequences + 1),
    }
    if run.draft_states is not None:
        lengths["draft_states"] = (run.draft_states, sequences)
    for name, (array, length) in lengths.items():
        if len(array) != length:
            raise StepError(f"{len(array)} {name} for {sequences} sequences: {length} are needed")
    counts = np.diff(run.stop_starts)
    if run.stop_starts[0] != 0 or run.stop_starts[-1] != len(run.stop_token_ids) or (counts < 0).any():
        raise StepError(f"stop_starts do not cover the {len(run.stop_token_ids)} stop tokens")
    if (counts > MAX_STOP_TOKENS).any():
        raise StepError(
            f"sequence {int(counts.argmax())} has {counts.max()} stop tokens: at most {MAX_STOP_TOKENS}"
        )


def _check(values: IntArray, low: int, end: int, what: str) -> None:
    is_wrong = (values < low) | (values >= end)
    if is_wrong.any():
        at = int(is_wrong.argmax())
        raise StepError(f"sequence {at}: {what} {values[at]} is not in [{low}, {end})")


class SequenceState:
    """A sequence of a run, between steps."""

    def __init__(self, run: MultiStep, index: int) -> None:
        self._drafts = run.drafts
        self._most_drafted = run.max_draft_tokens
        self._stop_tokens = run.stop_tokens(index)
        self.context = int(run.context_lengths[index])
        self.remaining = int(run.max_new_tokens[index])
        self.state = 0 if run.draft_states is None else int(run.draft_states[index])
        self.pending = int(run.token_ids[index])

    @property
    def has_ended(self) -> bool:
        return self.remaining == 0

    def chain(self) -> list[int]:
        """The next step's tokens: the pending one, then its draft. No more than can be emitted."""
        if self.has_ended:
            return []
        most = min(self._most_drafted, self.remaining - 1)
        draft = [] if self._drafts is None else self._drafts.draft(self.state, most)
        return [self.pending, *draft]

    def accept(self, chain: Sequence[int], answers: Sequence[int], maxima: Sequence[float]) -> int:
        """How many answers of the chain's rows are emitted; the sequence goes on from the last of them."""
        for index, (answer, maximum) in enumerate(zip(answers, maxima, strict=True)):
            self.context += 1
            self.remaining -= 1
            self.pending = answer
            if answer in self._stop_tokens or not np.isfinite(maximum):
                self.remaining = 0
            elif self._drafts is not None:
                self.state = self._drafts.follow(self.state, answer)
            if self.has_ended or index + 1 == len(chain) or chain[index + 1] != answer:
                return index + 1
        raise AssertionError("a chain without rows")


class HostRun:
    """`StepRun` by plain steps, each run when `next` asks for it."""

    def __init__(self, step: Callable[[Rows], StepOutput], run: MultiStep, block_size_tokens: int) -> None:
        """`run` has been checked."""
        self._step = step
        self._run = run
        self._block_size_tokens = block_size_tokens
        self._sequences = [SequenceState(run, index) for index in range(run.num_sequences)]
        self._num_left = run.num_steps

    def next(self) -> StepTokens | None:
        live = [index for index, sequence in enumerate(self._sequences) if not sequence.has_ended]
        if not live or self._num_left == 0:
            return None
        self._num_left -= 1
        chains = [self._sequences[index].chain() for index in live]
        try:
            reductions = self._step(self._rows(live, chains)).reductions
        except StepError:
            self._num_left = 0
            raise
        return self._accept(live, chains, reductions)

    def stop(self) -> None:
        self._num_left = 0

    def _rows(self, live: Sequence[int], chains: Sequence[Sequence[int]]) -> Rows:
        tables, size = self._run.block_tables, self._block_size_tokens
        positions: list[int] = []
        slots: list[int] = []
        parents: list[int] = []
        starts = [0]
        for index, chain in zip(live, chains, strict=True):
            first = self._sequences[index].context
            own = range(first, first + len(chain))
            positions += own
            slots += [int(tables[index, at // size]) * size + at % size for at in own]
            parents += [_NO_PARENT, *range(starts[-1], starts[-1] + len(chain) - 1)]
            starts.append(len(positions))
        return Rows(
            token_ids=_int32([token for chain in chains for token in chain]),
            positions=_int32(positions),
            slots=_int32(slots),
            parents=_int32(parents),
            sequence_starts=_int32(starts),
            context_lengths=_int32([self._sequences[index].context for index in live]),
            block_tables=np.ascontiguousarray(tables[live]),
            needs_logits=np.zeros(len(positions), dtype=np.bool_),
            needs_best=np.ones(len(positions), dtype=np.bool_),
            needs_log_sums=self._run.needs_log_sums,
        )

    def _accept(self, live: Sequence[int], chains: Sequence[Sequence[int]], found: Reductions) -> StepTokens:
        run = self._run
        counts = np.zeros(run.num_sequences, dtype=np.int32)
        token_ids = np.zeros(run.num_rows, dtype=np.int32)
        maxima, log_sums = (np.full(run.num_rows, np.nan, dtype=np.float32) for _ in range(2))
        row = 0
        for index, chain in zip(live, chains, strict=True):
            there, here = slice(row, row + len(chain)), index * run.rows_a_sequence
            own = slice(here, here + len(chain))
            token_ids[own], maxima[own] = found.token_ids[there], found.maxima[there]
            log_sums[own] = found.log_sums[there]
            counts[index] = self._sequences[index].accept(
                chain, found.token_ids[there].tolist(), found.maxima[there].tolist()
            )
            row += len(chain)
        return StepTokens(counts=counts, reductions=without_top(token_ids, maxima, log_sums))


def without_top(token_ids: IntArray, maxima: FloatArray, log_sums: FloatArray) -> Reductions:
    return Reductions(
        token_ids=token_ids,
        maxima=maxima,
        log_sums=log_sums,
        top_token_ids=np.empty((len(token_ids), 0), dtype=np.int32),
        top_logits=np.empty((len(token_ids), 0), dtype=np.float32),
    )


def _int32(values: Sequence[int]) -> IntArray:
    return np.array(values, dtype=np.int32)
