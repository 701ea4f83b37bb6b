"""What a step's logits decide for each sequence in it."""

from collections.abc import Sequence as SequenceOf

import numpy as np

from cluster.messages import EmittedToken, Record
from decode_workers.draft_tree import DraftTree, node_depths
from decode_workers.sampler import BadLogitsError, check_best, sample, with_logprobs
from decode_workers.scheduler import RowGrant
from decode_workers.sequence import Sequence
from decode_workers.step_batch import NO_PARENT, Float32Array
from decode_workers.verify import verify


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
    logits_starts: SequenceOf[int],
    logits: Float32Array,
) -> list[Verdict]:
    """One verdict a grant, each a function of that sequence's own logits rows alone."""
    # One call for all rows: a step of greedy sequences costs no more Python than that.
    best_ids = logits.argmax(axis=1)
    is_sound = np.isfinite(logits[np.arange(len(logits)), best_ids]).tolist()
    best: list[int] = best_ids.tolist()
    verdicts: list[Verdict] = []
    for grant, tree, start in zip(grants, trees, logits_starts, strict=True):
        sampling = grant.sequence.request.sampling
        if not grant.is_sampled:
            verdicts.append(NOTHING_SAMPLED)
        elif (
            sampling.temperature == 0
            and sampling.num_logprobs is None
            and not tree.token_ids
            and is_sound[start]
        ):
            verdicts.append(Verdict(tokens=(EmittedToken(token_id=best[start]),)))
        else:
            rows = logits[start : start + 1 + tree.num_nodes]
            verdicts.append(_judge(grant.sequence, tree, rows, best[start : start + 1 + tree.num_nodes]))
    return verdicts


def _judge(sequence: Sequence, tree: DraftTree, logits: Float32Array, best: SequenceOf[int]) -> Verdict:
    """`logits` and `best`: row 0 follows the last known token, row 1 + i follows node i."""
    sampling = sequence.request.sampling
    depths = node_depths(tree)

    def target_token(node: int) -> int:
        row = node + 1
        if sampling.temperature == 0:
            check_best(logits[row], best[row])
            return best[row]
        depth = 0 if node == NO_PARENT else depths[node]
        return sample(logits[row], sampling, sequence.next_index + depth)

    try:
        acceptance = verify(tree, target_token)
    except BadLogitsError as error:
        return Verdict(fault=str(error))
    if sampling.num_logprobs is None:
        tokens = tuple(EmittedToken(token_id=token_id) for token_id in acceptance.token_ids)
    else:
        rows = [0, *(node + 1 for node in acceptance.path)]
        tokens = tuple(
            with_logprobs(logits[row], token_id, sampling.num_logprobs)
            for row, token_id in zip(rows, acceptance.token_ids, strict=True)
        )
    return Verdict(tokens=tokens, path=acceptance.path)
