"""The compile report: scratch memory without and with K-splitting, the predicted step, and where it goes."""

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from megakernel.bubbles import bubble_totals, bubbles, shown_totals
from megakernel.cost import Trace, bandwidth_bound_us, simulate
from megakernel.footprint import Footprint, max_stages
from megakernel.machine import Machine
from megakernel.memory import role_of
from megakernel.model.shape import ModelShape
from megakernel.plan import ROLES, OpPlan, Plan
from megakernel.program import Program
from megakernel.schedule import (
    RoleShape,
    geometry_of,
    k_tile_choices,
    num_loads,
    role_shapes,
    tile_footprint,
)
from megakernel.timeline import Timeline, bytes_read, simulated_timeline
from megakernel.work import DEFAULT_CONTEXT_TOKENS, work_of

_NUM_BUBBLES = 5
DOUBLE_BUFFERED = 2
"""Stages at which peaks are compared: one tile is computed while the next is loaded."""


class SplitRow(msgspec.Struct, frozen=True, kw_only=True):
    """One role's scratch memory at the same output tile, K whole and K split."""

    role: str
    tile_columns: int
    num_k_tiles: int
    whole: Footprint
    split: Footprint
    whole_stages: int
    split_stages: int


class RoleRow(msgspec.Struct, frozen=True, kw_only=True):
    """What a role's instructions do in a simulated step, all layers together."""

    role: str
    num_instructions: int
    load_bytes: float
    span_us: float
    """From its first start to its last end, summed over its ops. Neighbouring ops overlap."""
    worker_us: float
    """Time of all workers in its instructions."""


def split_rows(
    shape: ModelShape,
    machine: Machine,
    bucket: int,
    plan: Plan,
    formats: Mapping[str, str] | None = None,
) -> tuple[SplitRow, ...]:
    """By linear role. Where the plan leaves K whole, the comparison is with its smallest split; on a GPU it
    is of tiles loaded whole with tiles in blocks of K."""
    linear = [role for role in role_shapes(shape, formats, kind=machine.kind).values() if role.in_features]
    return tuple(_split_row(role, shape, machine, bucket, plan.ops[role.role]) for role in linear)


def _split_row(
    role: RoleShape, shape: ModelShape, machine: Machine, bucket: int, op_plan: OpPlan
) -> SplitRow:
    geometry = geometry_of(shape)
    smallest = next((choice for choice in k_tile_choices(role) if choice > 1), 1)
    num_k_tiles = op_plan.num_k_tiles if op_plan.num_k_tiles > 1 else smallest
    columns = min(op_plan.tile_columns, role.columns)
    whole_plan = OpPlan(tile_columns=columns)
    split_plan = OpPlan(tile_columns=columns, num_k_tiles=num_k_tiles)
    if machine.kind == "cuda":
        num_k_tiles = num_loads(role, op_plan, bucket, machine)
        whole_plan = OpPlan(tile_columns=columns, load_k=role.in_features)
        split_plan = op_plan
    whole = tile_footprint(role, geometry, whole_plan, bucket, machine)
    split = tile_footprint(role, geometry, split_plan, bucket, machine)
    return SplitRow(
        role=role.role,
        tile_columns=columns,
        num_k_tiles=num_k_tiles,
        whole=whole,
        split=split,
        whole_stages=max_stages(whole, machine),
        split_stages=max_stages(split, machine),
    )


def peak_bytes(footprints: Iterable[Footprint]) -> int:
    """Of the role that needs most, double-buffered."""
    return max(footprint.total_bytes(DOUBLE_BUFFERED) for footprint in footprints)


def role_rows(
    program: Program,
    machine: Machine,
    trace: Trace,
    formats: Mapping[str, str] | None = None,
    context_tokens: int = DEFAULT_CONTEXT_TOKENS,
) -> tuple[RoleRow, ...]:
    """In dependency order."""
    totals = {role: [0.0, 0.0, 0.0] for role in ROLES}
    spans: dict[int, tuple[float, float]] = {}
    for instructions, starts, ends in zip(program.workers, trace.starts_us, trace.ends_us, strict=True):
        for instruction, start, end in zip(instructions, starts, ends, strict=True):
            total = totals[role_of(program.ops[instruction.op])]
            total[0] += 1
            total[1] += work_of(program, machine, instruction, formats, context_tokens).load_bytes
            total[2] += end - start
            first, last = spans.get(instruction.op, (start, end))
            spans[instruction.op] = (min(first, start), max(last, end))
    span_us = dict.fromkeys(ROLES, 0.0)
    for index, (first, last) in spans.items():
        span_us[role_of(program.ops[index])] += last - first
    return tuple(
        RoleRow(
            role=role,
            num_instructions=int(count),
            load_bytes=load_bytes,
            span_us=span_us[role],
            worker_us=worker_us,
        )
        for role, (count, load_bytes, worker_us) in totals.items()
    )


def compile_report(
    shape: ModelShape,
    machine: Machine,
    program: Program,
    plan: Plan,
    *,
    formats: Mapping[str, str] | None = None,
    baseline_us: float | None = None,
    context_tokens: int = DEFAULT_CONTEXT_TOKENS,
) -> str:
    """Text for a person. `baseline_us` is plain list scheduling's makespan, where a search was made."""
    trace = simulate(program, machine, formats, context_tokens)
    bound_us = bandwidth_bound_us(program, machine, formats, context_tokens)
    bytes_of = bytes_read(program, machine, formats, context_tokens)
    rows = split_rows(shape, machine, program.bucket, plan, formats)
    sections = [
        _memory_section(rows, machine, program.bucket),
        _makespan_section(trace, machine, program, bound_us, baseline_us, context_tokens),
        _role_section(role_rows(program, machine, trace, formats, context_tokens)),
        _bubble_section(simulated_timeline(program, trace, bytes_of)),
    ]
    return "\n\n".join(sections) + "\n"


def _memory_section(rows: Sequence[SplitRow], machine: Machine, bucket: int) -> str:
    whole = peak_bytes(row.whole for row in rows)
    split = peak_bytes(row.split for row in rows)
    shown = table(
        ("role", "columns", "K-tiles", "K whole", "stages", "K split", "stages", "less"),
        [
            (
                row.role,
                str(row.tile_columns),
                str(row.num_k_tiles),
                kib(row.whole.total_bytes(DOUBLE_BUFFERED)),
                str(row.whole_stages),
                kib(row.split.total_bytes(DOUBLE_BUFFERED)),
                str(row.split_stages),
                less(row.whole.total_bytes(DOUBLE_BUFFERED), row.split.total_bytes(DOUBLE_BUFFERED)),
            )
            for row in rows
        ],
    )
    return (
        f"Scratch memory of a worker of {machine.name}, {kib(machine.scratch_bytes)}, bucket {bucket}; two "
        f"stages of weights, input and output\n{shown}\n"
        f"Peak: {kib(whole)} with K whole, {kib(split)} with K split, {less(whole, split)} less.\n"
        "Stages are those that fit; 0: not even one does."
    )


def _makespan_section(
    trace: Trace,
    machine: Machine,
    program: Program,
    bound_us: float,
    baseline_us: float | None,
    context_tokens: int,
) -> str:
    total_us = trace.makespan_us * machine.num_workers
    stalls = trace.stalls
    shares = ", ".join(
        f"{name} {100 * value / total_us:.0f}%"
        for name, value in (
            ("busy", stalls.busy_us),
            ("at barriers", stalls.barrier_us),
            ("waiting for loads", stalls.load_us),
            ("idle at the end", stalls.idle_us),
        )
    )
    lines = [
        f"Predicted step of {program.bucket} rows at {context_tokens} tokens of context: "
        f"{trace.makespan_us:.0f} us",
        f"Bandwidth bound: {bound_us:.0f} us, {100 * bound_us / trace.makespan_us:.0f}% of the step",
        f"Workers: {shares}",
    ]
    if baseline_us is not None:
        lines.append(
            f"Plain list scheduling: {baseline_us:.0f} us; the search takes "
            f"{100 * (1 - trace.makespan_us / baseline_us):.1f}% off"
        )
    return "\n".join(lines)


def _role_section(rows: Sequence[RoleRow]) -> str:
    return table(
        ("role", "instructions", "loads MB", "span us", "worker us"),
        [
            (
                row.role,
                str(row.num_instructions),
                f"{row.load_bytes / 1e6:.1f}",
                f"{row.span_us:.0f}",
                f"{row.worker_us:.0f}",
            )
            for row in rows
        ],
    )


def _bubble_section(timeline: Timeline) -> str:
    total_us = sum(bubble.us for bubble in bubbles(timeline))
    share = 100 * total_us / timeline.total_us
    groups = [shown_totals(group, timeline) for group in bubble_totals(timeline)[:_NUM_BUBBLES]]
    heading = f"Predicted bubbles: {share:.1f}% of the workers' time"
    return "\n  ".join([heading, *groups])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width) for at, (cell, width) in enumerate(cells)
        )
        for cells in (zip(row, widths, strict=True) for row in (header, *rows))
    ]
    return "\n".join(lines)


def kib(num_bytes: int) -> str:
    return f"{num_bytes / 1024:.1f} KiB"


def less(before: int, after: int) -> str:
    return f"{100 * (1 - after / before):.0f}%"
