"""Where a step's time goes on a GPU: when each SM came to an instruction, could go on, and was done.

`python benchmarks/gpu_trace.py SHAPE FORMAT BATCH CONTEXT [--quick] [--json FILE] [--machine FILE]`.
Kernels are built with HEADRACE_TRACE, which costs a few percent. Shown by op, in microseconds, averaged over
layers and steps: what the SMs that take part spend in each phase. SMs' clocks do not agree, and the clock of
nanoseconds that they share ticks too rarely: they are aligned by the counters that several SMs wait for.
"""

import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "kernels"))

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from benchmarks.gpu_decode import WARM_UP_STEPS, decode_rows
from benchmarks.gpu_machine import described_run
from benchmarks.gpu_memory import opened
from benchmarks.gpu_models import GpuModel, compile_model
from benchmarks.gpu_steps import num_blocks_of
from benchmarks.gpu_table import Cell
from benchmarks.harness import parser, write_figures
from megakernel.cuda_driver import open_driver
from megakernel.cuda_runtime import CudaRuntime
from megakernel.gpu_machine import pick_machine
from megakernel.memory import role_of
from megakernel.pack_cuda import PACKED_FORMATS
from megakernel.program import Program
from megakernel.shapes import SHAPES
from megakernel.step import Rows

BEGUN, WAITED, STAGED, LANDED, MULTIPLIED, SIGNALLED = range(6)
"""`TraceEvent`"""
TRACE_FLAGS = ("-DHEADRACE_TRACE=1",)
TRACES, TRACES_QUICK = 10, 3
STEPS, STEPS_QUICK = 30, 10
LEAST_WAIT_US = 1.5
"""Who waited for less may have come after the last arrival: one look at a counter takes most of it."""
_ALIGNING_ROUNDS = 50

Clocks = npt.NDArray[np.float64]


class Run(msgspec.Struct, frozen=True):
    """Instructions [first, end) of an SM that are of one op; they run as one."""

    op: int
    sm: int
    first: int
    end: int


class Trace(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Of one step: [SMs, roles, instructions, events], microseconds of one clock; NaN: not told."""

    program: Program
    us: Clocks
    cycles_a_us: float
    misaligned_us: float
    """By how much SMs that went on together seem apart, nine times of ten: they look at counters at different
    times, so most of it is no error of the alignment. NaN where no two waited together."""


def read_trace(program: Program, words: npt.NDArray[np.uint32]) -> Trace:
    """`words`: as `CudaRuntime.trace` gives them."""
    count = words.shape[2] - 1
    clocks = words[:, :, count, :4].astype(np.int64)
    cycles = (clocks[..., 2] - clocks[..., 0]) % 2**32
    nanoseconds = (clocks[..., 3] - clocks[..., 1]) % 2**32
    rate = float(cycles.sum() / nanoseconds.sum()) * 1e3
    # Both roles of an SM have its clock: since its consumers began; its loader may have begun before.
    since = (words[:, :, :count].astype(np.int64) - clocks[:, :1, None, :1] + 2**31) % 2**32 - 2**31
    us = np.where(words[:, :, :count] == 0, np.nan, since / rate)
    # The end of a role is the better meeting point of both clocks: no SM is still starting.
    began_us = (clocks[:, 0, 3] - clocks[0, 0, 3] + 2**31) % 2**32 - 2**31
    began_us = began_us / 1e3 - cycles[:, 0] / rate
    offsets, misaligned_us = _aligned(us, began_us, list(_shared_waits(program, us)))
    us = us + offsets[:, None, None, None]
    return Trace(program=program, us=us - np.nanmin(us), cycles_a_us=rate, misaligned_us=misaligned_us)


def runs_of(program: Program) -> Iterator[Run]:
    for sm, instructions in enumerate(program.workers):
        first = 0
        for end in range(1, len(instructions) + 1):
            if end == len(instructions) or instructions[end].op != instructions[first].op:
                yield Run(instructions[first].op, sm, first, end)
                first = end


def _shared_waits(program: Program, us: Clocks) -> Iterator[list[Run]]:
    """Runs of different SMs that went on as one counter reached one number of arrivals."""
    groups: dict[tuple[int, int], list[Run]] = defaultdict(list)
    for run in runs_of(program):
        targets: dict[int, int] = {}
        for instruction in program.workers[run.sm][run.first : run.end]:
            for wait in instruction.waits:
                targets[wait.counter] = max(wait.target, targets.get(wait.counter, 0))
        waited_us = us[run.sm, 0, run.first, WAITED] - us[run.sm, 0, run.first, BEGUN]
        if len(targets) == 1 and waited_us > LEAST_WAIT_US:
            groups[next(iter(targets.items()))].append(run)
    yield from (runs for runs in groups.values() if len(runs) > 1)


def _aligned(us: Clocks, began_us: Clocks, groups: Sequence[Sequence[Run]]) -> tuple[Clocks, float]:
    """When each SM began, by the clock of all: SMs of one group went on at the same time, but for noise, so
    medians by group and by SM in turn. Those that never waited with others stay where `began_us` has them."""
    if not groups:
        return began_us, float("nan")
    sms = np.array([run.sm for runs in groups for run in runs])
    group = np.repeat(np.arange(len(groups)), [len(runs) for runs in groups])
    waited = np.array([us[run.sm, 0, run.first, WAITED] for runs in groups for run in runs])
    of_group = [np.flatnonzero(group == index) for index in range(len(groups))]
    of_sm = [(sm, np.flatnonzero(sms == sm)) for sm in np.unique(sms)]
    offsets = began_us.copy()
    released = np.zeros(len(groups))
    for _ in range(_ALIGNING_ROUNDS):
        seen = waited + offsets[sms]
        released = np.array([np.median(seen[members]) for members in of_group])
        behind = released[group] - waited
        for sm, members in of_sm:
            offsets[sm] = np.median(behind[members])
    return offsets, float(np.quantile(np.abs(waited + offsets[sms] - released[group]), 0.9))


def phases(traces: Sequence[Trace], layers: Sequence[int]) -> dict[str, dict[str, float]]:
    """By role of op, averages over traces of one program and over layers; ops outside layers as they are."""
    program = traces[0].program
    groups: dict[tuple[str, int], list[Run]] = defaultdict(list)
    for run in runs_of(program):
        op = program.ops[run.op]
        if op.layer in layers or op.layer < 0:
            groups[role_of(op), op.layer].append(run)
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for (name, _), runs in groups.items():
        found[name] += [_phases(trace.us, runs) for trace in traces]
    return {
        name: {key: _mean(np.array([one[key] for one in each])) for key in each[0]}
        for name, each in found.items()
    }


def _phases(us: Clocks, runs: Sequence[Run]) -> dict[str, float]:
    sm = np.array([run.sm for run in runs])
    first, last = np.array([run.first for run in runs]), np.array([run.end - 1 for run in runs])
    begun, waited = us[sm, 0, first, BEGUN], us[sm, 0, first, WAITED]
    staged, landed = us[sm, 0, first, STAGED], us[sm, 0, first, LANDED]
    multiplied, signalled = us[sm, 0, last, MULTIPLIED], us[sm, 0, last, SIGNALLED]
    ended = np.where(np.isnan(signalled), multiplied, signalled)
    load_begun, load_issued = us[sm, 1, first, BEGUN], us[sm, 1, last, WAITED]
    return {
        "sms": float(len(runs)),
        "span": _most(ended) + _most(-waited),
        "skew": _most(waited) + _most(-waited),
        "wait": _mean(waited - begun),
        "stage": _mean(staged - waited),
        "land": _mean(landed - staged),
        "land_max": _most(landed - staged),
        "work": _mean(multiplied - landed),
        "work_max": _most(multiplied - landed),
        "body": _mean(ended - waited),
        "body_max": _most(ended - waited),
        "signal": _mean(signalled - multiplied),
        "load_ahead": _mean(waited - load_begun),
        "issued_ahead": _mean(waited - load_issued),
    }


def _mean(values: Clocks) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _most(values: Clocks) -> float:
    known = values[~np.isnan(values)]
    return float(known.max()) if len(known) else float("nan")


def shown(found: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(found.values())))
    lines = ["op".ljust(16) + "".join(name.rjust(13) for name in names)]
    for op, values in found.items():
        lines.append(
            op.ljust(16)
            + "".join("-".rjust(13) if np.isnan(values[name]) else f"{values[name]:13.2f}" for name in names)
        )
    return "\n".join(lines)


def inner_layers(num_layers: int) -> range:
    """Without the first and the last, which have other neighbours; all where there are no others."""
    return range(1, num_layers - 1) if num_layers > 2 else range(num_layers)


def figures_of(cell: Cell, format: str, found: dict[str, dict[str, float]]) -> dict[str, float]:
    """What JSON can hold of it: what was not told is left out."""
    return {
        f"trace_{format}_{cell.name}_{op}_{name}" + ("" if name == "sms" else "_us"): value
        for op, values in found.items()
        for name, value in values.items()
        if not np.isnan(value)
    }


def traced(runtime: CudaRuntime, rows: Rows, num_traces: int) -> list[Trace]:
    """Of as many steps, each after a few others."""
    (program,) = runtime.compiled.programs
    return [read_trace(program, runtime.trace(rows, WARM_UP_STEPS)) for _ in range(num_traces)]


def main() -> None:
    options = parser("where a decode step's time goes on an NVIDIA GPU")
    options.add_argument("shape", choices=tuple(SHAPES))
    options.add_argument("format", choices=PACKED_FORMATS)
    options.add_argument("batch", type=int, metavar="BATCH")
    options.add_argument("context", type=int, metavar="CONTEXT")
    options.add_argument("--machine", metavar="FILE", help="a description of this GPU")
    chosen = options.parse_args()
    shape, format = chosen.shape, chosen.format
    cell = Cell(shape, chosen.batch, chosen.context)
    driver = open_driver()
    facts = driver.facts
    driver.close()
    machine = pick_machine(facts, chosen.machine)
    model = GpuModel(shape_name=shape, format=format, bucket=cell.batch)
    print(f"compiling {model.name} for {facts.name}", flush=True)
    built = compile_model(model, machine, extra_flags=TRACE_FLAGS)
    if built.resource_problem:
        print(f"  {built.resource_problem}", flush=True)
    with opened(built.compiled, cell.batch * num_blocks_of(cell.context)) as runtime:
        rows = decode_rows(runtime, cell)
        traces = traced(runtime, rows, TRACES_QUICK if chosen.quick else TRACES)
        steps = STEPS_QUICK if chosen.quick else STEPS
        step_ms = statistics.median(runtime.launch_ms(rows, WARM_UP_STEPS + steps)[WARM_UP_STEPS:])
    found = phases(traces, inner_layers(SHAPES[shape].num_layers))
    rate = statistics.median(trace.cycles_a_us for trace in traces)
    misaligned_us = statistics.median(trace.misaligned_us for trace in traces)
    print(f"{cell.name}, {format}: {step_ms:.3f} ms a step as traced, {rate:.0f} MHz")
    print(f"SMs that go on together are {misaligned_us:.2f} us apart or less, nine of ten")
    print(shown(found))
    figures = figures_of(cell, format, found)
    figures[f"traced_{format}_ms_{cell.name}"] = step_ms
    figures["sm_clock_mhz"] = rate
    write_figures(chosen.json, figures, len(traces), described_run(facts, machine, torch.version.cuda))


if __name__ == "__main__":
    main()
