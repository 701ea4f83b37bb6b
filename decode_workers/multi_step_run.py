"""A run of several steps, from the engine's side: what is asked for, and what each of its steps decides."""

from collections.abc import Sequence as SequenceOf

import numpy as np

from cluster.messages import Record
from decode_workers.kv_pool import KvPool
from decode_workers.scheduler import RowGrant
from decode_workers.sequence import Sequence, SequenceState
from decode_workers.step_batch import Int32Array
from decode_workers.verdicts import Verdict, judge_accepted
from megakernel.multi_step import MultiStep, StepRun


class ToldStep(Record, frozen=True, kw_only=True, eq=False):
    """One step of a run, for the sequences that still run."""

    grants: list[RowGrant]
    verdicts: list[Verdict]
    num_rows: int
    """That the device ran, also for sequences that the host has ended."""


class MultiStepRun:
    """Steps under way, whose they are, and which of those sequences they still go on with."""

    def __init__(self, run: StepRun, asked: MultiStep, grants: SequenceOf[RowGrant]) -> None:
        """`grants` are of one row each, in the order of `asked`."""
        self._run = run
        self._grants = grants
        self._sequences = [grant.sequence for grant in grants]
        self._left: list[int] = asked.max_new_tokens.tolist()

    @property
    def live(self) -> list[Sequence]:
        """Those that a next step would have tokens of."""
        return [one for one, left in zip(self._sequences, self._left, strict=True) if left]

    @property
    def grants(self) -> list[RowGrant]:
        """Of the sequences that still run."""
        return [grant for grant in self._grants if grant.sequence.state is SequenceState.RUNNING]

    def next(self) -> ToldStep | None:
        """Waits for a step; None after the last. Raises StepError."""
        told = self._run.next()
        if told is None:
            return None
        grants: list[RowGrant] = []
        verdicts: list[Verdict] = []
        num_rows = 0
        judged = judge_accepted(self._sequences, told)
        for index, (grant, verdict) in enumerate(zip(self._grants, judged, strict=True)):
            if verdict is None:
                continue
            num_rows += told.rows_a_sequence
            self._left[index] = self._left_after(index, verdict)
            if grant.sequence.state is SequenceState.RUNNING:
                grants.append(grant)
                verdicts.append(verdict)
        return ToldStep(grants=grants, verdicts=verdicts, num_rows=num_rows)

    def stop(self) -> None:
        """Begin no further step; those begun are still told."""
        self._run.stop()

    def _left_after(self, index: int, verdict: Verdict) -> int:
        if verdict.fault is not None:
            return 0
        if verdict.tokens[-1].token_id in self._sequences[index].completion.stop_token_ids:
            return 0
        return self._left[index] - len(verdict.tokens)


def ask_for(sequences: SequenceOf[Sequence], num_steps: int, kv: KvPool) -> MultiStep:
    """Without drafts: a token a sequence and step."""
    stops = [sorted(sequence.completion.stop_token_ids) for sequence in sequences]
    committed = _int32([sequence.committed for sequence in sequences])
    max_new = _int32([min(num_steps, sequence.completion.num_left) for sequence in sequences])
    width = kv.num_blocks_for(int((committed + max_new).max()))
    return MultiStep(
        num_steps=num_steps,
        token_ids=_int32([sequence.tokens[-1] for sequence in sequences]),
        context_lengths=committed,
        block_tables=np.ascontiguousarray(kv.block_tables[_table_indexes(sequences), :width]),
        max_new_tokens=max_new,
        stop_starts=np.cumsum([0, *map(len, stops)], dtype=np.int32),
        stop_token_ids=_int32([token for own in stops for token in own]),
        needs_log_sums=any(sequence.num_top is not None for sequence in sequences),
    )


def _table_indexes(sequences: SequenceOf[Sequence]) -> list[int]:
    indexes = []
    for sequence in sequences:
        assert sequence.reservation is not None, "a running sequence without blocks"
        indexes.append(sequence.reservation.table_index)
    return indexes


def _int32(values: SequenceOf[int]) -> Int32Array:
    return np.array(values, dtype=np.int32)
