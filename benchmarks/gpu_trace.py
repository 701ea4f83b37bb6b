"""Where a step's time goes on a GPU: when each SM came to an instruction, could go on, and was done.

Kernels are built with HEADRACE_TRACE, which costs a few percent. Shown by op, microseconds, averaged over
layers: what the SMs that take part spend in each phase, and from when the first is let go to when the last
has signalled.
"""

from collections import defaultdict
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.memory import role_of
from megakernel.program import Program

EVENTS = 8
"""`kTraceEvents`"""
BEGUN, WAITED, STAGED, LANDED, MULTIPLIED, SIGNALLED = range(6)
TRACE_FLAGS = ("-DHEADRACE_TRACE=1",)

Clocks = npt.NDArray[np.float64]


class Trace(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Of one step: microseconds since the first SM began, by SM, role, instruction, event; NaN: not told."""

    program: Program
    us: Clocks
    cycles_a_us: float


def trace_bytes(program: Program) -> int:
    return len(program.workers) * 2 * (num_instructions(program) + 1) * EVENTS * 4


def num_instructions(program: Program) -> int:
    return max(len(worker) for worker in program.workers)


def read_trace(program: Program, words: npt.NDArray[np.uint32]) -> Trace:
    """`words`, as the kernel left them; memory was zeros before."""
    count = num_instructions(program)
    table = words.reshape(len(program.workers), 2, count + 1, EVENTS)
    clocks = table[:, :, count, :4].astype(np.int64)
    cycles = (clocks[..., 2] - clocks[..., 0]) % 2**32
    nanoseconds = (clocks[..., 3] - clocks[..., 1]) % 2**32
    rate = float(cycles.sum() / nanoseconds.sum()) * 1e3
    since = (table[:, :, :count, :].astype(np.int64) - clocks[:, :, None, None, 0]) % 2**32
    # The end of a role is the better meeting point of both clocks: no SM is still starting.
    start_us = clocks[..., 3] / 1e3 - cycles / rate
    us = since / rate + (start_us - start_us.min())[:, :, None, None]
    return Trace(program=program, us=np.where(table[:, :, :count, :] == 0, np.nan, us), cycles_a_us=rate)


def phases(trace: Trace, layers: Sequence[int]) -> dict[str, dict[str, float]]:
    """By role and opcode, averages over layers."""
    program = trace.program
    groups: dict[tuple[str, int], list[tuple[int, int, int]]] = defaultdict(list)
    for sm, instructions in enumerate(program.workers):
        at = 0
        while at < len(instructions):
            first = instructions[at]
            end = at + 1
            while end < len(instructions) and instructions[end].op == first.op:
                end += 1
            op = program.ops[first.op]
            groups[role_of(op), op.layer].append((sm, at, end))
            at = end
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for (name, layer), runs in groups.items():
        if layer in layers or layer < 0:
            found[name].append(_phases(trace.us, runs))
    return {
        name: {key: float(np.nanmean([one[key] for one in each])) for key in each[0]}
        for name, each in found.items()
    }


def _phases(us: Clocks, runs: Sequence[tuple[int, int, int]]) -> dict[str, float]:
    sm, first, last = (np.array(values) for values in zip(*runs, strict=True))
    last = last - 1
    begun, waited = us[sm, 0, first, BEGUN], us[sm, 0, first, WAITED]
    staged, landed = us[sm, 0, first, STAGED], us[sm, 0, first, LANDED]
    multiplied = us[sm, 0, last, MULTIPLIED]
    signalled = us[sm, 0, last, SIGNALLED]
    ended = np.where(np.isnan(signalled), multiplied, signalled)
    load_begun = us[sm, 1, first, BEGUN]
    load_ended = us[sm, 1, last, WAITED]

    def mean(values: Clocks) -> float:
        return float(np.nanmean(values)) if not np.all(np.isnan(values)) else float("nan")

    def most(values: Clocks) -> float:
        return float(np.nanmax(values)) if not np.all(np.isnan(values)) else float("nan")

    return {
        "sms": float(len(runs)),
        "span": most(ended) - float(np.nanmin(waited)),
        "wait": mean(waited - begun),
        "skew": most(waited) - float(np.nanmin(waited)),
        "stage": mean(staged - waited),
        "land": mean(landed - staged),
        "land_max": most(landed - staged),
        "work": mean(multiplied - landed),
        "work_max": most(multiplied - landed),
        "body": mean(ended - waited),
        "body_max": most(ended - waited),
        "signal": mean(signalled - multiplied),
        "load_ahead": mean(waited - load_begun),
        "issued_ahead": mean(waited - load_ended),
    }


def shown(found: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(found.values())))
    lines = ["op".ljust(16) + "".join(name.rjust(13) for name in names)]
    for op, values in found.items():
        lines.append(op.ljust(16) + "".join(f"{values[name]:13.2f}" for name in names))
    return "\n".join(lines)
