"""A window of time on all lanes of a timeline, as SVG."""

import math
from collections.abc import Iterator, Sequence
from html import escape

import msgspec

from megakernel.plan import ROLES
from megakernel.timeline import Slice, Timeline, tile_name

WIDTH = 1400
LEFT, RIGHT = 92, 24
PLOT = WIDTH - LEFT - RIGHT
_MERGED_PIXELS = 0.25
"""What is this close to its neighbour of the same op is drawn as one."""
_MAX_RECTANGLES = 6000
"""Above, a panel is drawn as one path a colour, without a name under the pointer."""
CHARACTER_WIDTH = 6.7


class Run(msgspec.Struct):
    """Neighbouring slices of one kind on a lane, drawn as one rectangle."""

    kind: str
    label: str
    title: str
    start_us: float
    end_us: float


class Panel(msgspec.Struct, frozen=True, kw_only=True):
    """A window of time on all lanes."""

    top: float
    start_us: float
    end_us: float
    lane_height: float

    def x(self, us: float) -> float:
        return LEFT + (us - self.start_us) / (self.end_us - self.start_us) * PLOT

    def lane_top(self, lane: int) -> float:
        return self.top + lane * self.lane_height

    @property
    def us_a_pixel(self) -> float:
        return (self.end_us - self.start_us) / PLOT


def runs_of(lane: Sequence[Slice], panel: Panel) -> list[Run]:
    """What is drawn of a lane in a panel: ops, and the waiting before them."""
    runs: list[Run] = []
    closeness_us = _MERGED_PIXELS * panel.us_a_pixel
    for piece in lane:
        if piece.ended_us < panel.start_us or piece.reached_us > panel.end_us:
            continue
        name = tile_name(piece)
        for kind, start, end in (
            ("waiting", piece.reached_us, piece.ready_us),
            ("loading", piece.ready_us, piece.started_us),
            (piece.role, piece.started_us, piece.ended_us),
        ):
            start, end = max(start, panel.start_us), min(end, panel.end_us)
            if end <= start or (kind != piece.role and end - start < closeness_us):
                continue
            last = runs[-1] if runs else None
            if (
                last
                and last.kind == kind == piece.role
                and last.label == piece.name
                and start - last.end_us < closeness_us
            ):
                last.end_us = end
                last.title = f"{piece.name}: {shown_time(end - last.start_us)} of several tiles"
                continue
            detail = f", {piece.gb_s:.1f} GB/s" if kind == piece.role else f" of {kind}"
            title = f"{name}: {shown_time(end - start)}{detail}"
            runs.append(Run(kind, piece.name, title, start, end))
    return runs


def drawn_panel(timeline: Timeline, panel: Panel) -> Iterator[str]:
    """Every worker's lane, what is on it, and the axis below."""
    lanes = [runs_of(lane, panel) for lane in timeline.lanes]
    gap = 2.0 if panel.lane_height > 10 else 0.5
    height = panel.lane_height - gap
    for worker in range(len(lanes)):
        y = panel.lane_top(worker)
        yield (
            f'<rect class="idle lane" data-worker="{worker}" x="{LEFT}" y="{y:.1f}" width="{PLOT}" '
            f'height="{height:.1f}"/>'
        )
        if panel.lane_height >= 11 or worker % 10 == 0:
            yield (
                f'<text class="axis" text-anchor="end" x="{LEFT - 8}" '
                f'y="{y + height / 2 + 4:.1f}">worker {worker}</text>'
            )
    if sum(map(len, lanes)) <= _MAX_RECTANGLES:
        yield from _rectangles(lanes, panel, height)
    else:
        yield from _paths(lanes, panel, height)
    yield from _axis(panel, panel.lane_top(len(lanes)))


def _rectangles(lanes: Sequence[Sequence[Run]], panel: Panel, height: float) -> Iterator[str]:
    for worker, runs in enumerate(lanes):
        y = panel.lane_top(worker)
        for run in runs:
            x, width = panel.x(run.start_us), (run.end_us - run.start_us) / panel.us_a_pixel
            yield (
                f'<rect class="{class_of(run.kind)}" x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" '
                f'height="{height:.1f}"><title>{escape(run.title)}</title></rect>'
            )
            label = run.label.rpartition(".")[2]
            if run.kind in ROLES and height >= 12 and width > CHARACTER_WIDTH * len(label) + 4:
                at = f'x="{x + width / 2:.1f}" y="{y + height / 2 + 4:.1f}"'
                yield f'<text class="inside" {at}>{label}</text>'


def _paths(lanes: Sequence[Sequence[Run]], panel: Panel, height: float) -> Iterator[str]:
    shapes: dict[str, list[str]] = {}
    for worker, runs in enumerate(lanes):
        y = panel.lane_top(worker)
        for run in runs:
            x, width = panel.x(run.start_us), (run.end_us - run.start_us) / panel.us_a_pixel
            shapes.setdefault(run.kind, []).append(f"M{x:.1f} {y:.1f}h{width:.2f}v{height:.1f}h{-width:.2f}z")
    for kind, path in shapes.items():
        yield f'<path class="{class_of(kind)}" d="{"".join(path)}"/>'


def _axis(panel: Panel, y: float) -> Iterator[str]:
    step = tick_step_us(panel.end_us - panel.start_us)
    tick = math.ceil(panel.start_us / step) * step
    while tick <= panel.end_us:
        x = panel.x(tick)
        yield f'<path class="tick" d="M{x:.1f} {y:.1f}v5"/>'
        at = f'text-anchor="middle" x="{x:.1f}" y="{y + 17:.1f}"'
        yield f'<text class="axis" {at}>{_tick(tick, step)}</text>'
        tick += step


def tick_step_us(span_us: float, most: int = 12) -> float:
    """1, 2 or 5 times a power of ten, so that there are at most so many ticks."""
    power = 10.0 ** math.floor(math.log10(span_us / most))
    return next(power * factor for factor in (1, 2, 5, 10, 20) if span_us / (power * factor) <= most)


def class_of(kind: str) -> str:
    return f"role-{kind}" if kind in ROLES else kind


def shown_time(us: float) -> str:
    return f"{us / 1e3:.2f} ms" if us >= 1000 else f"{us:.1f} us"


def _tick(us: float, step_us: float) -> str:
    if step_us >= 100:
        return f"{us / 1e3:g} ms"
    return f"{us:g} us"
