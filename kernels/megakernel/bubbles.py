"""Where a step's workers have nothing to do.

A bubble is time in which a worker waits for other workers, or has not begun yet or is done already. A wait
for a tile that is still being loaded is the memory's time: told apart, no bubble.
"""

from collections.abc import Iterator
from enum import StrEnum
from itertools import pairwise

import msgspec

from megakernel.timeline import Slice, Timeline, tile_name


class Cause(StrEnum):
    BARRIER = "waits for other workers"
    LOAD = "waits for its weights"
    GAP = "between instructions"
    BEGIN = "has not begun"
    END = "has no more to do"


class Bubble(msgspec.Struct, frozen=True, kw_only=True):
    worker: int
    cause: Cause
    before: str
    """The tile that comes next; of END, the tile that was last."""
    role: str
    """Of that tile; empty where a worker has none."""
    start_us: float
    end_us: float

    @property
    def us(self) -> float:
        return self.end_us - self.start_us


def idle_times(timeline: Timeline) -> Iterator[Bubble]:
    """Bubbles, and waits for weights (`Cause.LOAD`); lane by lane, in order of time.

    With all `Slice.busy_us` they add up to `Timeline.total_us`.
    """
    for worker, lane in enumerate(timeline.lanes):
        if not lane:
            yield from _idle(worker, Cause.END, None, 0.0, timeline.makespan_us)
            continue
        yield from _idle(worker, Cause.BEGIN, lane[0], 0.0, lane[0].reached_us)
        for before, piece in pairwise((None, *lane)):
            assert piece is not None
            if before is not None:
                yield from _idle(worker, Cause.GAP, piece, before.ended_us, piece.reached_us)
            yield from _idle(worker, Cause.BARRIER, piece, piece.reached_us, piece.ready_us)
            yield from _idle(worker, Cause.LOAD, piece, piece.ready_us, piece.started_us)
        yield from _idle(worker, Cause.END, lane[-1], lane[-1].ended_us, timeline.makespan_us)


def _idle(worker: int, cause: Cause, piece: Slice | None, start_us: float, end_us: float) -> Iterator[Bubble]:
    if end_us > start_us:
        yield Bubble(
            worker=worker,
            cause=cause,
            before=tile_name(piece) if piece else "nothing",
            role=piece.role if piece else "",
            start_us=start_us,
            end_us=end_us,
        )


def bubbles(timeline: Timeline) -> list[Bubble]:
    """Longest first."""
    found = [idle for idle in idle_times(timeline) if idle.cause is not Cause.LOAD]
    return sorted(found, key=lambda bubble: (-bubble.us, bubble.start_us, bubble.worker))


def idle_us(timeline: Timeline) -> dict[Cause, float]:
    """Of all workers, by cause; every cause is there."""
    totals = dict.fromkeys(Cause, 0.0)
    for idle in idle_times(timeline):
        totals[idle.cause] += idle.us
    return totals


class BubbleTotals(msgspec.Struct, frozen=True, kw_only=True):
    """Of bubbles with one cause before tiles of one role."""

    cause: Cause
    role: str
    count: int
    us: float


def bubble_totals(timeline: Timeline) -> list[BubbleTotals]:
    """Most time first."""
    groups: dict[tuple[Cause, str], list[float]] = {}
    for bubble in bubbles(timeline):
        groups.setdefault((bubble.cause, bubble.role), []).append(bubble.us)
    totals = [
        BubbleTotals(cause=cause, role=role, count=len(times), us=sum(times))
        for (cause, role), times in groups.items()
    ]
    return sorted(totals, key=lambda group: (-group.us, group.cause, group.role))


def shown_totals(group: BubbleTotals, timeline: Timeline) -> str:
    """Such as `60 waits for other workers before attention, 120.0 us in all: 2.2% of the workers' time`."""
    share = 100 * group.us / timeline.total_us
    place = "after" if group.cause is Cause.END else "before"
    what = _NOUNS[group.cause]
    return (
        f"{group.count} {what} {place} {group.role or 'nothing'}, {group.us:.1f} us in all: "
        f"{share:.1f}% of the workers' time"
    )


_NOUNS = {
    Cause.BARRIER: "waits for other workers",
    Cause.LOAD: "waits for weights",
    Cause.GAP: "gaps",
    Cause.BEGIN: "late beginnings",
    Cause.END: "early ends",
}


def shown_bubble(bubble: Bubble) -> str:
    """Such as `worker 1 waits for other workers, 12.3 us before layers.3.o [0, 96)`."""
    where = "after" if bubble.cause is Cause.END else "before"
    return f"worker {bubble.worker} {_VERBS[bubble.cause]}, {bubble.us:.1f} us {where} {bubble.before}"


_VERBS = {cause: cause.value for cause in Cause} | {Cause.GAP: "is between instructions"}
