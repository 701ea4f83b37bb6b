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
    num_searched: int = 0
    """Rows of its search of a catalogue; then it has no others."""

    @property
    def num_rows(self) -> int:
        """Without drafts."""
        return self.num_forced + self.num_searched

    @property
    def is_sampled(self) -> bool:
        return 0 < self.num_forced == self.sequence.num_pending

    @property
    def asks_catalogue(self) -> bool:
        """Whether its rows, or the one that ends its prompt, are told a catalogue's tokens."""
        return self.sequence.search is not None and (self.num_searched > 0 or self.is_sampled)


def plan_step(running: SequenceOf[Sequence], max_rows: int, *, can_draft: bool) -> list[RowGrant]:
    """Grants for the next step, those of searches last; `running` is in order of arrival.

    Every sequence gets one row, those served longest ago first where there are more than rows. What is
    left goes to pending chains, oldest first, then to searches, in shares as equal as they want, then to
    draft trees.
    """
    chosen = running
    if len(running) > max_rows:
        chosen = sorted(running, key=lambda sequence: sequence.last_grant)[:max_rows]
    if any(sequence.search is not None for sequence in chosen):
        return _plan_beside_searches(chosen, max_rows, can_draft=can_draft)
    return _plan_plain(chosen, max_rows, can_draft=can_draft)


def _plan_plain(chosen: SequenceOf[Sequence], max_rows: int, *, can_draft: bool) -> list[RowGrant]:
    """Of at most `max_rows` sequences, each with pending tokens."""
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


def _plan_beside_searches(chosen: SequenceOf[Sequence], max_rows: int, *, can_draft: bool) -> list[RowGrant]:
    searching = [sequence for sequence in chosen if sequence.is_searching]
    # Prompts that a search will follow last: what they ask comes behind what others do.
    others = sorted(
        (sequence for sequence in chosen if not sequence.is_searching),
        key=lambda sequence: sequence.search is not None,
    )
    wanted = [one.search.wanted_rows() for one in searching if one.search is not None]
    chains = _plan_plain(others, max_rows - len(searching), can_draft=False)
    shares = _shares(wanted, max_rows - sum(grant.num_forced for grant in chains))
    num_left = max_rows - sum(shares)
    plain = _plan_plain(others, num_left, can_draft=True) if can_draft else chains
    return plain + [
        RowGrant(sequence=sequence, num_forced=0, max_draft_nodes=0, num_searched=share)
        for sequence, share in zip(searching, shares, strict=True)
    ]


def _shares(wanted: SequenceOf[int], num_rows: int) -> list[int]:
    """Of `num_rows`, at least one each: equal but for who wants less, the first ones larger."""
    shares = [0] * len(wanted)
    by_want = sorted(range(len(wanted)), key=lambda index: wanted[index])
    for place, index in enumerate(by_want):
        shares[index] = min(wanted[index], -(-num_rows // (len(wanted) - place)))
        num_rows -= shares[index]
    return shares


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
        sequence.search is None
        and not sequence.reads_logits
        and not sequence.num_top
        and sequence.num_pending == 1
        and len(sequence.completion.stop_token_ids) <= MAX_STOP_TOKENS
    )


def _draft_room(sequence: Sequence, num_forced: int, spare: int) -> int:
    """Nodes that fit the spare rows and the reserved slots; none where one token more is the last."""
    if num_forced < sequence.num_pending or sequence.search is not None or sequence.completion.num_left <= 1:
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
