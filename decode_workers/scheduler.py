"""Who is admitted next, which rows the next step has, and how many steps run by themselves. Nothing here
touches KV."""

import bisect
from collections.abc import Sequence as SequenceOf

from cluster.messages import Record
from decode_workers.sequence import Sequence
from megakernel.multi_step import MAX_STOP_TOKENS

PATIENCE_NS = 10_000_000_000
"""A request without a deadline is ordered as if it had one this long after its arrival: earliest deadline
first without starving those that named none."""
STEPS_BESIDE_HANDOFFS = 2
"""Of a run while KV is awaited: whoever it is for joins after as many."""


class RowGrant(Record, frozen=True, kw_only=True, gc=False):
    """Rows of one sequence in one step."""

    sequence: Sequence
    num_forced: int
    """Pending tokens that run, in order; all of them: the last one's logits are sampled."""
    max_draft_nodes: int
    """That it has use and slots for; how many rows drafts get in all is the drafter's to divide."""

    @property
    def is_sampled(self) -> bool:
        return self.num_forced == self.sequence.num_pending


def plan_step(running: SequenceOf[Sequence], max_rows: int, *, can_draft: bool) -> list[RowGrant]:
    """Grants for the next step; `running` is in order of arrival.

    Every sequence gets one row, those served longest ago first where there are more than rows. What is
    left goes to pending chains, oldest first, then to draft trees.
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
    return [
        RowGrant(
            sequence=sequence,
            num_forced=count,
            max_draft_nodes=_draft_room(sequence, count, spare) if can_draft and spare else 0,
        )
        for sequence, count in zip(chosen, num_forced, strict=True)
    ]


class Waiting(Record, frozen=True, kw_only=True, gc=False):
    """Who may want to join what runs."""

    num_calls: int
    """Posted to the engine's thread and not run yet: requests, most of them."""
    num_queued: int
    """Requests that fit once a sequence has ended."""
    num_awaiting: int
    """Sequences whose KV a hand-off may bring at any time."""


def plan_run(
    running: SequenceOf[Sequence],
    waiting: Waiting,
    *,
    most_steps: int,
    max_rows: int,
    step_ms: float,
    now_ns: int,
) -> int:
    """How many steps may run without the host in between; 1: a plain step.

    More than one only where the device can do what the host does between steps: every sequence takes the
    likeliest token and tells of no others, has one pending token, a row in every step, and no more stop
    tokens than a run knows. And only where nobody waits for the host. Beside hand-offs a run is short. It
    ends when the last sequence must, or the first where somebody is queued for its place, and is not begun
    past the nearest deadline as far as `step_ms` (0: unknown) predicts it.
    """
    if most_steps == 1 or not running or len(running) > max_rows or waiting.num_calls:
        return 1
    if not all(_can_run_alone(sequence) for sequence in running):
        return 1
    left = [sequence.completion.num_left for sequence in running]
    num_steps = min(most_steps, min(left) if waiting.num_queued else max(left))
    if waiting.num_awaiting:
        num_steps = min(num_steps, STEPS_BESIDE_HANDOFFS)
    deadlines_ns = [at for one in running if (at := one.request.deadline_unix_ns) is not None]
    if deadlines_ns and step_ms > 0:
        num_steps = min(num_steps, int((min(deadlines_ns) - now_ns) / (step_ms * 1e6)))
    return max(1, num_steps)


def _can_run_alone(sequence: Sequence) -> bool:
    return (
        not sequence.reads_logits
        and not sequence.num_top
        and sequence.num_pending == 1
        and len(sequence.completion.stop_token_ids) <= MAX_STOP_TOKENS
    )


def _draft_room(sequence: Sequence, num_forced: int, spare: int) -> int:
    """Nodes that fit the spare rows and the reserved slots; none where one token more is the last."""
    if num_forced < sequence.num_pending or sequence.completion.num_left <= 1:
        return 0
    assert sequence.reservation is not None, "a running sequence without blocks"
    slots_left = sequence.reservation.capacity_tokens - len(sequence.tokens)
    return max(0, min(spare, slots_left))


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
