"""A timeline as a picture: a lane a worker, a colour a role, bubbles light; on any background."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from megakernel.bubbles import Bubble, Cause, bubble_totals, bubbles, idle_us, shown_bubble, shown_totals
from megakernel.machine import Machine
from megakernel.program import Program
from megakernel.timeline import Slice, Timeline, busy_us, predicted_timeline, role_totals
from megakernel.timeline_colours import style
from megakernel.timeline_panel import (
    CHARACTER_WIDTH,
    LEFT,
    PLOT,
    WIDTH,
    Panel,
    class_of,
    drawn_panel,
    shown_time,
)
from megakernel.work import DEFAULT_CONTEXT_TOKENS

_TEXT_HEIGHT = 18
_STRIP_HEIGHT = 34
_LANES_HEIGHT = 480
"""Of many workers together; few have taller lanes, and fewer pixels altogether."""
_NUM_NAMED_BUBBLES = 6


def schedule_svg(
    program: Program,
    machine: Machine,
    formats: Mapping[str, str] | None = None,
    context_tokens: int = DEFAULT_CONTEXT_TOKENS,
) -> str:
    """The step as the cost model predicts it."""
    timeline = predicted_timeline(program, machine, formats, context_tokens)
    rows = f"{program.bucket} row{'s' if program.bucket > 1 else ''}"
    return timeline_svg(
        timeline, f"Predicted step of {rows} at {context_tokens} tokens of context on {machine.name}"
    )


def timeline_svg(timeline: Timeline, title: str) -> str:
    """The whole step, one of its layers magnified, and its largest bubbles by name."""
    named = bubbles(timeline)[:_NUM_NAMED_BUBBLES]
    lane_height = lane_height_for(len(timeline.lanes))
    lanes_height = lane_height * max(1, len(timeline.lanes))
    parts, y = [*_heading(timeline, title)], 128.0
    whole = Panel(
        top=y + _STRIP_HEIGHT + 22,
        start_us=0.0,
        end_us=timeline.makespan_us or 1.0,
        lane_height=lane_height,
    )
    parts += _caption(
        y - 8,
        f"The whole step, {shown_time(timeline.makespan_us)}; above the lanes, how many workers are busy",
    )
    parts += _strip(timeline, y)
    parts += drawn_panel(timeline, whole)
    parts += _markers(named, whole)
    y = whole.top + lanes_height + 58
    window = layer_window(timeline)
    if window is not None:
        layer, start_us, end_us = window
        one = Panel(top=y + 8, start_us=start_us, end_us=end_us, lane_height=lane_height)
        parts += _caption(y, f"Layer {layer}, {shown_time(end_us - start_us)}, magnified")
        parts += drawn_panel(timeline, one)
        y = one.top + lanes_height + 58
    parts += _bubble_list(named, timeline, y)
    height = y + (len(named) + 1) * _TEXT_HEIGHT + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}" role="img"><title>{escape(title)}</title><style>{style()}</style>'
        f'<rect class="paper" width="{WIDTH}" height="{height:.0f}"/>{"".join(parts)}</svg>\n'
    )


def lane_height_for(num_lanes: int) -> float:
    return max(3.0, min(26.0, _LANES_HEIGHT / max(1, num_lanes)))


def layer_window(timeline: Timeline) -> tuple[int, float, float] | None:
    """The layer in the middle, from its first tile's start to its last one's end; None without layers."""
    spans: dict[int, tuple[float, float]] = {}
    for lane in timeline.lanes:
        for piece in lane:
            layer = layer_of(piece)
            if layer is not None:
                start, end = spans.get(layer, (math.inf, 0.0))
                spans[layer] = (min(start, piece.started_us), max(end, piece.ended_us))
    if not spans:
        return None
    layer = sorted(spans)[len(spans) // 2]
    start_us, end_us = spans[layer]
    return (layer, start_us, end_us) if end_us > start_us else None


def layer_of(piece: Slice) -> int | None:
    first, _, rest = piece.name.partition(".")
    return int(rest.partition(".")[0]) if first == "layers" else None


def _heading(timeline: Timeline, title: str) -> Iterator[str]:
    busy, idle = busy_us(timeline), idle_us(timeline)
    total = timeline.total_us or 1.0
    nothing = sum(idle[cause] for cause in (Cause.GAP, Cause.BEGIN, Cause.END))
    yield f'<text class="title" x="{LEFT}" y="30">{escape(title)}</text>'
    yield (
        f'<text x="{LEFT}" y="52">{shown_time(timeline.makespan_us)} on {len(timeline.lanes)} workers: '
        f"busy {_share(busy, total)}, waiting for memory {_share(idle[Cause.LOAD], total)}, "
        f"in bubbles {_share(idle[Cause.BARRIER] + nothing, total)}</text>"
    )
    entries = [(totals.role, totals.role, totals.busy_us) for totals in role_totals(timeline)]
    entries += [
        ("waiting", Cause.BARRIER.value, idle[Cause.BARRIER]),
        ("loading", Cause.LOAD.value, idle[Cause.LOAD]),
        ("idle", "nothing to do", nothing),
    ]
    x = float(LEFT)
    for kind, text, us in entries:
        label = f"{text} {_share(us, total)}"
        yield f'<rect class="{class_of(kind)}" x="{x:.0f}" y="66" width="14" height="14" rx="2"/>'
        yield f'<text x="{x + 19:.0f}" y="78">{escape(label)}</text>'
        x += 30 + CHARACTER_WIDTH * len(label)


def _caption(y: float, text: str) -> Iterator[str]:
    yield f'<text class="caption" x="{LEFT}" y="{y:.0f}">{escape(text)}</text>'


def _strip(timeline: Timeline, y: float) -> Iterator[str]:
    """How many workers are busy, averaged over every two pixels."""
    num_bins = PLOT // 2
    bin_us = (timeline.makespan_us or 1.0) / num_bins
    busy = [0.0] * num_bins
    for lane in timeline.lanes:
        for piece in lane:
            at, end = piece.started_us, piece.ended_us
            while at < end:
                number = min(num_bins - 1, int(at / bin_us))
                stop = end if number == num_bins - 1 else min(end, (number + 1) * bin_us)
                stop = max(stop, math.nextafter(at, math.inf))
                busy[number] += stop - at
                at = stop
    bottom = y + _STRIP_HEIGHT
    full = bin_us * max(1, len(timeline.lanes))
    points = " ".join(
        f"{LEFT + 2 * number},{bottom - _STRIP_HEIGHT * min(1.0, us / full):.1f} "
        f"{LEFT + 2 * number + 2},{bottom - _STRIP_HEIGHT * min(1.0, us / full):.1f}"
        for number, us in enumerate(busy)
    )
    yield f'<rect class="idle" x="{LEFT}" y="{y:.0f}" width="{PLOT}" height="{_STRIP_HEIGHT}"/>'
    yield f'<polygon class="busy" points="{LEFT},{bottom} {points} {LEFT + 2 * num_bins},{bottom}"/>'
    yield f'<text class="axis" text-anchor="end" x="{LEFT - 8}" y="{y + 10:.0f}">all busy</text>'
    yield f'<text class="axis" text-anchor="end" x="{LEFT - 8}" y="{bottom:.0f}">none</text>'


def _markers(named: Sequence[Bubble], panel: Panel) -> Iterator[str]:
    for number, bubble in enumerate(named, start=1):
        x = panel.x((bubble.start_us + bubble.end_us) / 2)
        y = panel.lane_top(bubble.worker) + panel.lane_height / 2
        yield f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="7"/>'
        yield f'<text class="number" x="{x:.1f}" y="{y + 3.5:.1f}">{number}</text>'


def _bubble_list(named: Sequence[Bubble], timeline: Timeline, y: float) -> Iterator[str]:
    yield from _caption(y, "The largest bubbles" if named else "No bubbles")
    for number, bubble in enumerate(named, start=1):
        text = f"{number}  {shown_bubble(bubble)}, from {shown_time(bubble.start_us)} on"
        yield f'<text x="{LEFT}" y="{y + number * _TEXT_HEIGHT:.0f}">{escape(text)}</text>'
    middle = LEFT + PLOT / 2
    for number, group in enumerate(bubble_totals(timeline)[: len(named)], start=1):
        text = shown_totals(group, timeline)
        yield f'<text x="{middle:.0f}" y="{y + number * _TEXT_HEIGHT:.0f}">{escape(text)}</text>'


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "0%"
