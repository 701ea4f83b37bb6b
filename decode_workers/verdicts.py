"""What a step's answers decide for each sequence in it."""

import math
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from cluster.messages import EmittedToken, Record, SamplingParams, TokenLogprob
from decode_workers.draft_tree import DraftTree, node_depths
from decode_workers.sampler import BadLogitsError, bad_logits, check_best, sample, with_logprobs
from decode_workers.scheduler import RowGrant
from decode_workers.sequence import Sequence
from decode_workers.step_batch import NO_PARENT, Float32Array, StepResult
from decode_workers.verify import verify
from megakernel.head import Reductions
from megakernel.multi_step import StepTokens


class Verdict(Record, frozen=True, kw_only=True, gc=False):
    """Tokens that one sequence emits, and the draft nodes whose KV it keeps."""

    tokens: tuple[EmittedToken, ...] = ()
    path: tuple[int, ...] = ()
    fault: str | None = None
    """Set: its logits are no distribution, and the sequence fails."""


NOTHING_SAMPLED = Verdict()


def judge_step(
    grants: SequenceOf[RowGrant],
    trees: SequenceOf[DraftTree],
    answer_starts: SequenceOf[int],
    result: StepResult,
) -> list[Verdict]:
    """One verdict a grant, each a function of that sequence's own rows alone."""
    # As lists, once for all rows: a step of greedy sequences costs no more Python than this loop.
    reductions = result.reductions
    maxima: list[float] = reductions.maxima.tolist() if reductions is not None else []
    best: list[int] = reductions.token_ids.tolist() if reductions is not None else []
    verdicts: list[Verdict] = []
    for grant, tree, start in zip(grants, trees, answer_starts, strict=True):
        sequence = grant.sequence
        if not grant.is_sampled or sequence.search is not None:
            verdicts.append(NOTHING_SAMPLED)
        elif sequence.reads_logits:
            logits = result.logits[start : start + 1 + tree.num_nodes]
            verdicts.append(_judge(sequence, tree, _Logits(logits, sequence.request.sampling)))
        elif not tree.token_ids and sequence.num_top is None and math.isfinite(maxima[start]):
            verdicts.append(Verdict(tokens=(EmittedToken(token_id=best[start]),)))
        else:
            assert reductions is not None, "the batch asked for none"
            verdicts.append(_judge(sequence, tree, _Reduced(reductions, start, sequence.num_top or 0)))
    return verdicts


def judge_accepted(sequences: SequenceOf[Sequence], told: StepTokens) -> list[Verdict | None]:
    """Of a step of a run: accepted, with all KV in its place; None where a sequence had ended before."""
    reductions = told.reductions
    maxima: list[float] = reductions.maxima.tolist()
    best: list[int] = reductions.token_ids.tolist()
    verdicts: list[Verdict | None] = []
    for index, sequence in enumerate(sequences):
        rows = told.rows_of(index)
        bad = next((row for row in rows if not math.isfinite(maxima[row])), None)
        if not rows:
            verdicts.append(None)
        elif bad is not None:
            verdicts.append(Verdict(fault=bad_logits(maxima[bad], best[bad])))
        elif sequence.num_top is None:
            verdicts.append(Verdict(tokens=tuple(EmittedToken(token_id=best[row]) for row in rows)))
        else:
            answers = _Reduced(reductions, rows.start, 0)
            tokens = tuple(answers.with_logprobs(at, best[row]) for at, row in enumerate(rows))
            verdicts.append(Verdict(tokens=tokens))
    return verdicts


class _Answers(Protocol):
    """Of one sequence's rows: row 0 follows the last known token, row 1 + i follows node i."""

    def token(self, row: int, index: int) -> int:
        """The target's own, at completion index `index`. Raises BadLogitsError."""
        ...

    def with_logprobs(self, row: int, token_id: int) -> EmittedToken: ...


class _Logits:
    def __init__(self, logits: Float32Array, sampling: SamplingParams) -> None:
        self._logits = logits
        self._sampling = sampling

    def token(self, row: int, index: int) -> int:
        return sample(self._logits[row], self._sampling, index)

    def with_logprobs(self, row: int, token_id: int) -> EmittedToken:
        return with_logprobs(self._logits[row], token_id, self._sampling.num_logprobs or 0)


class _Reduced:
    """Rows from `start` on, of a sequence that takes the likeliest token."""

    def __init__(self, reductions: Reductions, start: int, num_top: int) -> None:
        self._reductions = reductions
        self._start = start
        self._num_top = num_top

    def token(self, row: int, index: int) -> int:  # noqa: ARG002 - whichever the index
        at = self._start + row
        token_id = int(self._reductions.token_ids[at])
        check_best(float(self._reductions.maxima[at]), token_id)
        return token_id

    def with_logprobs(self, row: int, token_id: int) -> EmittedToken:
        """`token_id` is the row's own."""
        at, reductions = self._start + row, self._reductions
        log_sum = float(reductions.log_sums[at])
        top_ids = reductions.top_token_ids[at, : self._num_top].tolist()
        top_logits = reductions.top_logits[at, : self._num_top].tolist()
        return EmittedToken(
            token_id=token_id,
            logprob=float(reductions.maxima[at]) - log_sum,
            top_logprobs=tuple(
                TokenLogprob(token_id=top_id, logprob=logit - log_sum)
                for top_id, logit in zip(top_ids, top_logits, strict=True)
            ),
        )


def _judge(sequence: Sequence, tree: DraftTree, answers: _Answers) -> Verdict:
    depths = node_depths(tree)

    def target_token(node: int) -> int:
        depth = 0 if node == NO_PARENT else depths[node]
        return answers.token(node + 1, sequence.next_index + depth)

    try:
        acceptance = verify(tree, target_token)
    except BadLogitsError as error:
        return Verdict(fault=str(error))
    if sequence.num_top is None:
        tokens = tuple(EmittedToken(token_id=token_id) for token_id in acceptance.token_ids)
    else:
        rows = [0, *(node + 1 for node in acceptance.path)]
        tokens = tuple(map(answers.with_logprobs, rows, acceptance.token_ids))
    return Verdict(tokens=tokens, path=acceptance.path)
