"""Scratch memory: which pages hold what when.

An instruction holds its weight tile, its input and its output (`footprint.py`). The weights may be loaded
`live_from` instructions ahead, into pages that earlier inputs, outputs and weights have left.
"""

from collections.abc import Callable, Hashable, Mapping
from functools import reduce
from operator import or_

import msgspec

from megakernel.footprint import PageNeeds, footprint, page_needs
from megakernel.k_blocks import split_loads
from megakernel.machine import Machine
from megakernel.plan import OpPlan, Plan
from megakernel.program import Instruction, Op, Opcode, PageRole, PageUse, Program
from megakernel.weight_formats import op_formats


class ScratchError(ValueError):
    """A tile that does not fit a worker's scratch memory; names the op, the need and the capacity."""


def plan_pages(
    program: Program, machine: Machine, plan: Plan | None = None, formats: Mapping[str, str] | None = None
) -> Program:
    """The program with every instruction's pages, replacing any it had.

    Weights are held from up to `Plan.prefetch_instructions` ahead, but never more than the role's `stages`
    tiles at once, and later where pages are short. On a GPU what is counted are instructions with weights,
    and nothing but pages limits them: a loader streams past ops that have none. Raises ScratchError.
    """
    paged = msgspec.structs.replace(program, num_pages=machine.num_pages, page_bytes=machine.page_bytes)
    if machine.kind == "cuda":
        paged = split_loads(paged, machine, plan, formats)
        needs = _NeedsByTile(paged, machine, formats)
        depth = plan.prefetch_instructions if plan is not None else 1
        workers = tuple(
            _allocate(worker, needs, _AheadOfLoads(depth), machine.num_pages, _alike_in_layers(program))
            for worker in paged.workers
        )
        return msgspec.structs.replace(paged, workers=workers)
    needs = _NeedsByTile(paged, machine, formats)
    depths = _AheadOfInstructions([_prefetch_depth(op, plan) for op in program.ops])
    workers = tuple(_allocate(worker, needs, depths, machine.num_pages) for worker in program.workers)
    return msgspec.structs.replace(paged, workers=workers)


def role_of(op: Op) -> str:
    """The last part of an op's name, which `Plan.ops` is keyed by."""
    return op.name.rpartition(".")[2]


def _prefetch_depth(op: Op, plan: Plan | None) -> int:
    if plan is None:
        return 1
    stages = plan.ops[role_of(op)].stages if role_of(op) in plan.ops else OpPlan(tile_columns=1).stages
    return max(0, min(plan.prefetch_instructions, stages - 1))


def _alike_in_layers(program: Program) -> Callable[[Instruction], Hashable]:
    roles = [role_of(op) for op in program.ops]
    return lambda one: (roles[one.op], one.opcode, one.n0, one.part, one.k0, one.r0)


class _AheadOfInstructions:
    """The first instruction from which on weights may be loaded: so many before their own, by op."""

    def __init__(self, depths: list[int]) -> None:
        self._depths = depths

    def __call__(self, index: int, instruction: Instruction) -> int:
        return max(0, index - self._depths[instruction.op])


class _AheadOfLoads:
    """As many instructions with weights before their own, and those without that lie between. Asked in order,
    of instructions with weights."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._loads: list[int] = []

    def __call__(self, index: int, instruction: Instruction) -> int:
        del instruction
        self._loads.append(index)
        before = len(self._loads) - 2 - self._depth
        return self._loads[before] + 1 if before >= 0 else 0


class _NeedsByTile:
    """Page needs, computed once for tiles that are alike in all layers."""

    def __init__(self, program: Program, machine: Machine, formats: Mapping[str, str] | None) -> None:
        self._program = program
        self._machine = machine
        self._formats = formats
        self._stored = [(role_of(op), op_formats(op, formats)) for op in program.ops]
        self._known: dict[tuple[object, ...], PageNeeds] = {}

    def __call__(self, instruction: Instruction) -> PageNeeds:
        key = (
            self._stored[instruction.op],
            instruction.opcode,
            instruction.n0,
            instruction.n1,
            instruction.k1 - instruction.k0,
            instruction.x1 - instruction.x0,
            instruction.r1 - instruction.r0,
        )
        needs = self._known.get(key)
        if needs is None:
            needs = self._known[key] = self._compute(instruction)
        return needs

    def _compute(self, instruction: Instruction) -> PageNeeds:
        needed = footprint(self._program, instruction, self._formats)
        needs = page_needs(needed, self._machine.page_bytes)
        if needs.total > self._machine.num_pages:
            op = self._program.ops[instruction.op]
            raise ScratchError(
                f"{op.name}: columns [{instruction.n0}, {instruction.n1}) of "
                f"{instruction.r1 - instruction.r0} rows need {needed.total_bytes(1)} bytes "
                f"({needed.weight_stage_bytes} weights, {needed.input_bytes} input, {needed.output_bytes} "
                f"output), {needs.total} pages; a worker of {self._machine.name} has "
                f"{self._machine.num_pages} pages of {self._machine.page_bytes} bytes: take narrower tiles "
                f"or less of K at once"
            )
        return needs


def _allocate(
    worker: tuple[Instruction, ...],
    needs_of: _NeedsByTile,
    first_of: Callable[[int, Instruction], int],
    num_pages: int,
    key_of: Callable[[Instruction], Hashable] | None = None,
) -> tuple[Instruction, ...]:
    """Pages are bits of an integer; `held[t]` are those in use while instruction t runs.

    In order of instructions, so that what is already placed never reaches beyond the last one: at its own
    time an instruction shares the pages with nobody, and only its early weights must find gaps. Instructions
    of one key are placed as the one before was, where that is free: so layers come to be alike.
    """
    every = (1 << num_pages) - 1
    held: list[int] = []
    placed: list[Instruction] = []
    known: dict[Hashable, tuple[int, int]] = {}  # by key, how far ahead and where the last weights were
    for index, instruction in enumerate(worker):
        needs = needs_of(instruction)
        kept = _kept(worker[index - 1], placed[-1]) if index else ()
        reserved = reduce(or_, (_mask(use.first, use.count) for use in kept), 0)
        if kept:
            needs = PageNeeds(needs.weights, 0, 0)
        earliest = first_of(index, instruction) if needs.weights else index
        key = key_of(instruction) if key_of is not None else index
        ahead, before = known.get(key, (0, -1))
        firsts = None
        if before >= 0 and index - ahead >= earliest:
            live_from = index - ahead
            wanted = _mask(before, needs.weights)
            if not (_taken(held, live_from, index) | reserved) & wanted:
                firsts = _place(every & ~reserved, every & ~reserved & ~wanted, needs, num_pages)
        if firsts is None:
            for live_from in range(earliest, index + 1):
                firsts = _place(every & ~reserved, _taken(held, live_from, index), needs, num_pages)
                if firsts is not None:
                    break
        assert firsts is not None, "what fits in all pages has a place when nothing else is held"
        weights, source, result = firsts
        if needs.weights:
            known[key] = index - live_from, weights
        early = _mask(weights, needs.weights)
        for time in range(live_from, index):
            held[time] |= early
        held.append(early | reserved | _mask(source, needs.input) | _mask(result, needs.output))
        uses = (
            PageUse(PageRole.WEIGHTS, weights, needs.weights, live_from),
            PageUse(PageRole.INPUT, source, needs.input, index),
            PageUse(PageRole.OUTPUT, result, needs.output, index),
            *(msgspec.structs.replace(use, live_from=index) for use in kept),
        )
        pages = tuple(use for use in uses if use.count)
        placed.append(msgspec.structs.replace(instruction, pages=pages))
    return tuple(placed)


def _kept(before: Instruction, placed: Instruction) -> tuple[PageUse, ...]:
    """Of a tile that goes on after an instruction, what stays where it is: input and output."""
    if before.opcode is not Opcode.LINEAR_ACCUMULATE:
        return ()
    return tuple(use for use in placed.pages if use.role is not PageRole.WEIGHTS)


def _taken(held: list[int], start: int, end: int) -> int:
    return reduce(or_, held[start:end], 0)


def _place(every: int, taken: int, needs: PageNeeds, num_pages: int) -> tuple[int, int, int] | None:
    """First pages of weights, input and output: weights lowest, activations highest, to keep gaps whole."""
    weights = _lowest_run(every & ~taken, needs.weights)
    if weights is None:
        return None
    left = every & ~_mask(weights, needs.weights)
    source = _highest_run(left, needs.input, num_pages)
    if source is None:
        return None
    result = _highest_run(left & ~_mask(source, needs.input), needs.output, num_pages)
    return None if result is None else (weights, source, result)


def _mask(first: int, count: int) -> int:
    return ((1 << count) - 1) << first


def _run_starts(free: int, count: int) -> int:
    """Bits at which a run of `count` free pages begins."""
    starts, length = free, 1
    while length < count and starts:
        step = min(length, count - length)
        starts &= starts >> step
        length += step
    return starts


def _lowest_run(free: int, count: int) -> int | None:
    if count == 0:
        return 0
    starts = _run_starts(free, count)
    return (starts & -starts).bit_length() - 1 if starts else None


def _highest_run(free: int, count: int, num_pages: int) -> int | None:
    if count == 0:
        return num_pages
    starts = _run_starts(free, count)
    return starts.bit_length() - 1 if starts else None
