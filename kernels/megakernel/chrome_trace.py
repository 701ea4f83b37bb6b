"""A timeline as Chrome trace events, which ui.perfetto.dev and chrome://tracing open.

The format is Google's "Trace Event Format": complete events (`X`), counters (`C`), names (`M`); microseconds.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from megakernel.timeline import Slice, Timeline, tile_name

Event = dict[str, Any]
_PROCESS = 1


def chrome_trace(timeline: Timeline, title: str) -> bytes:
    """JSON: a row a worker, where waiting is a slice of its own; busy workers and read bandwidth above."""
    events = [*_names(timeline, title), *_slices(timeline), *_counters(timeline)]
    trace = {"displayTimeUnit": "ms", "otherData": {"title": title}, "traceEvents": events}
    return msgspec.json.encode(trace)


def _names(timeline: Timeline, title: str) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": _PROCESS, "args": {"name": title}}
    for worker in range(len(timeline.lanes)):
        about = {"ph": "M", "pid": _PROCESS, "tid": worker}
        yield about | {"name": "thread_name", "args": {"name": f"worker {worker}"}}
        yield about | {"name": "thread_sort_index", "args": {"sort_index": worker}}


def _slices(timeline: Timeline) -> Iterator[Event]:
    for lane in timeline.lanes:
        for piece in lane:
            if piece.waiting_us > 0:
                yield _slice(piece, "waiting", "waiting", piece.reached_us, piece.started_us) | {
                    "args": {"before": tile_name(piece), "counters": _waits(piece)}
                }
            yield _slice(piece, piece.name, piece.role, piece.started_us, piece.ended_us) | {
                "args": _arguments(piece)
            }


def _slice(piece: Slice, name: str, category: str, start_us: float, end_us: float) -> Event:
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "pid": _PROCESS,
        "tid": piece.worker,
        "ts": start_us,
        "dur": end_us - start_us,
    }


def _arguments(piece: Slice) -> dict[str, Any]:
    instruction = piece.instruction
    return {
        "instruction": piece.index,
        "opcode": instruction.opcode.name,
        "columns": [instruction.n0, instruction.n1],
        "K": [instruction.k0, instruction.k1],
        "part": f"{instruction.part} of {instruction.num_parts}",
        "rows": [instruction.r0, instruction.r1],
        "bytes": round(piece.num_bytes),
        "GB/s": round(piece.gb_s, 2),
        "counters": _waits(piece),
        "signals": instruction.signal,
    }


def _waits(piece: Slice) -> list[str]:
    return [f"{wait.counter} reaches {wait.target}" for wait in piece.instruction.waits]


def _counters(timeline: Timeline) -> Iterator[Event]:
    """Steps at every start and end of an instruction."""
    changes: dict[float, list[float]] = {0.0: [0, 0.0]}
    for lane in timeline.lanes:
        for piece in lane:
            if piece.busy_us <= 0:
                continue
            for at, sign in ((piece.started_us, 1), (piece.ended_us, -1)):
                change = changes.setdefault(at, [0, 0.0])
                change[0] += sign
                change[1] += sign * piece.gb_s
    busy, gb_s = 0.0, 0.0
    for at in sorted(changes):
        busy += changes[at][0]
        gb_s += changes[at][1]
        about = {"ph": "C", "pid": _PROCESS, "ts": at}
        yield about | {"name": "busy workers", "args": {"workers": int(busy)}}
        yield about | {"name": "read", "args": {"GB/s": round(max(0.0, gb_s), 2)}}
