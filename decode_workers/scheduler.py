"""Who is admitted next, and which rows the next step has. Nothing here touches KV."""

import bisect
from collections.abc import Sequence as SequenceOf

from cluster.messages import Record
from decode_workers.sequence import Sequence

PATIENCE_NS = 10_000_000_000
"""A request without a deadline is ordered as if it had one this long after its arrival: earliest deadline
first without starving those that named none."""


class RowGrant(Record, frozen=True, kw_only=True, gc=False):
    """Rows of one sequence in one step."""

    sequence: Sequence
    num_forced: int
    """Pending tokens that run, in order; all of them: the last one's logits are sampled."""
    max_draft_nodes: int

    @property
    def is_sampled(self) -> bool:
        return self.num_forced == self.sequence.num_pending


def plan_step(running: SequenceOf[Sequence], max_rows: int, *, can_draft: bool) -> list[RowGrant]:
    """Grants for the next step; `running` is in order of arrival.

    Every sequence gets one row, those served longest ago first where there are more than rows. What is
    left goes to pending chains, oldest first, then in equal shares to draft trees.
    """
    chosen = running
    if len(running) > max_rows:
        chosen = sorted(running, key=lambda sequence: sequence.last_grant)[:max_rows]
    spare = max_rows - len(chosen)
    num_forced = []
    for sequence in chosen:
        extra = min(sequence.num_pending - 1, spare)
        spare -= extra
        num_forced.append(1 + extra)
    share = spare // len(chosen) if can_draft and chosen else 0
    return [
        RowGrant(
            sequence=sequence,
            num_forced=count,
            max_draft_nodes=_draft_room(sequence, count, share) if share else 0,
        )
        for sequence, count in zip(chosen, num_forced, strict=True)
    ]


def _draft_room(sequence: Sequence, num_forced: int, share: int) -> int:
    """Nodes that fit the share, the reserved slots, and the tokens this sequence may still emit."""
    if num_forced < sequence.num_pending:
        return 0
    assert sequence.reservation is not None, "a running sequence without blocks"
    slots_left = sequence.reservation.capacity_tokens - len(sequence.tokens)
    return max(0, min(share, slots_left))


class AdmissionQueue:
    """Sequences waiting for blocks: earliest deadline first, then oldest."""

    def __init__(self) -> None:
        self._entries: list[tuple[int, int, Sequence]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, sequence: Sequence, arrival_ns: int) -> None:
        due_ns = sequence.request.deadline_unix_ns
        key = arrival_ns + PATIENCE_NS if due_ns is None else due_ns
        bisect.insort(self._entries, (key, sequence.arrival, sequence))

    def first(self) -> Sequence | None:
        return self._entries[0][2] if self._entries else None

    def remove(self, sequence: Sequence) -> None:
        for place, entry in enumerate(self._entries):
            if entry[2] is sequence:
                del self._entries[place]
                return
        raise AssertionError(f"{sequence.request.request_id} is not queued")
