"""Scratch memory: what a tile needs of it, how many weight stages fit, and which pages hold what when.

The constraint has three dimensions, as in the Ada-MK paper (arXiv 2605.11581): the hardware's capacity, the
model's shapes, and the row bucket. An instruction holds its weight tile, its input and its output. The
weights may be loaded `live_from` instructions ahead, into pages that earlier inputs, outputs and weights have
left. K-splitting halves a weight tile, and so doubles the tiles that can be in flight.
"""

from collections.abc import Mapping

import msgspec

from megakernel.machine import Machine
from megakernel.plan import OpPlan, Plan
from megakernel.program import Geometry, Instruction, Op, Opcode, PageRole, PageUse, Program
from megakernel.weight_formats import activation_bits, column_bits, op_formats

ROW_CHUNK = 16
"""Rows whose input and output are in scratch memory at once; larger buckets take a tile chunk by chunk."""
KV_CHUNK_TOKENS = 32
"""Tokens of K and V that attention has in scratch memory at once, while as many again are loaded."""
_FLOAT_BYTES = 4
_KV_ELEMENT_BYTES = 2


class ScratchError(ValueError):
    """A tile that does not fit a worker's scratch memory; names the op, the need and the capacity."""


class Footprint(msgspec.Struct, frozen=True, kw_only=True):
    """Scratch bytes of one instruction."""

    weight_stage_bytes: int
    input_bytes: int
    output_bytes: int

    def total_bytes(self, stages: int) -> int:
        return stages * self.weight_stage_bytes + self.input_bytes + self.output_bytes


class PageNeeds(msgspec.Struct, frozen=True):
    weights: int
    input: int
    output: int

    @property
    def total(self) -> int:
        return self.weights + self.input + self.output


def linear_footprint(*, columns: int, k: int, rows: int, weight_bits: float, input_bits: float) -> Footprint:
    """Of a linear tile: `weight_bits` and `input_bits` are an element's, `rows` the bucket's."""
    chunk = min(rows, ROW_CHUNK)
    return Footprint(
        weight_stage_bytes=_bytes(columns * k * weight_bits),
        input_bytes=_bytes(chunk * k * input_bits),
        output_bytes=chunk * columns * _FLOAT_BYTES,
    )


def attention_footprint(*, kv_heads: int, geometry: Geometry, rows: int) -> Footprint:
    """Of one attention instruction: queries and two chunks of K and V in, its heads' partial results out."""
    chunk = min(rows, ROW_CHUNK)
    heads = kv_heads * (geometry.num_heads // geometry.num_kv_heads)
    keys_and_values = 2 * kv_heads * geometry.head_dim * KV_CHUNK_TOKENS * _KV_ELEMENT_BYTES
    return Footprint(
        weight_stage_bytes=0,
        input_bytes=chunk * heads * geometry.head_dim * _FLOAT_BYTES + 2 * keys_and_values,
        output_bytes=chunk * heads * (geometry.head_dim + 2) * _FLOAT_BYTES,
    )


def footprint(
    program: Program, instruction: Instruction, formats: Mapping[str, str] | None = None
) -> Footprint:
    """Of an instruction of a program; `formats` by weight name, usual ones where it does not say."""
    op = program.ops[instruction.op]
    rows = instruction.r1 - instruction.r0
    columns = instruction.n1 - instruction.n0
    match instruction.opcode:
        case Opcode.ATTENTION:
            return attention_footprint(kv_heads=columns, geometry=program.geometry, rows=rows)
        case Opcode.EMBED:  # row by row: a token's weights in, its activations out
            bits = column_bits(op, program.geometry, op_formats(op, formats), 0, columns)
            return Footprint(
                weight_stage_bytes=0, input_bytes=_bytes(bits), output_bytes=columns * _FLOAT_BYTES
            )
        case Opcode.REDUCE:  # part by part, on top of the sum
            sums = min(rows, ROW_CHUNK) * columns * _FLOAT_BYTES
            return Footprint(weight_stage_bytes=0, input_bytes=sums, output_bytes=sums)
        case _:
            stored = op_formats(op, formats)
            bits = column_bits(op, program.geometry, stored, instruction.n0, instruction.n1)
            return linear_footprint(
                columns=columns,
                k=num_k(op, instruction),
                rows=rows,
                weight_bits=bits / columns,
                input_bits=activation_bits(stored),
            )


def num_k(op: Op, instruction: Instruction) -> int:
    """Elements of K that a linear instruction multiplies."""
    if instruction.opcode is Opcode.LINEAR_PARTIAL:
        return instruction.k1 - instruction.k0
    return op.in_features


def page_needs(needed: Footprint, page_bytes: int) -> PageNeeds:
    return PageNeeds(
        -(-needed.weight_stage_bytes // page_bytes),
        -(-needed.input_bytes // page_bytes),
        -(-needed.output_bytes // page_bytes),
    )


def max_stages(needed: Footprint, machine: Machine) -> int:
    """Weight tiles that fit beside input and output; 0 where not even one does.

    A tile without weights counts as one stage if it fits.
    """
    needs = page_needs(needed, machine.page_bytes)
    left = machine.num_pages - needs.input - needs.output
    if left < 0:
        return 0
    return left // needs.weights if needs.weights else 1


def plan_pages(
    program: Program, machine: Machine, plan: Plan | None = None, formats: Mapping[str, str] | None = None
) -> Program:
    """The program with every instruction's pages, replacing any it had.

    Weights are held from up to `Plan.prefetch_instructions` ahead, but never more than the role's `stages`
    tiles at once, and later where pages are short. Raises ScratchError.
    """
    needs = _NeedsByTile(program, machine, formats)
    depths = [_prefetch_depth(op, plan) for op in program.ops]
    workers = tuple(_allocate(worker, needs, depths, machine.num_pages) for worker in program.workers)
    return msgspec.structs.replace(
        program, workers=workers, num_pages=machine.num_pages, page_bytes=machine.page_bytes
    )


def role_of(op: Op) -> str:
    """The last part of an op's name, which `Plan.ops` is keyed by."""
    return op.name.rpartition(".")[2]


def _prefetch_depth(op: Op, plan: Plan | None) -> int:
    if plan is None:
        return 1
    stages = plan.ops[role_of(op)].stages if role_of(op) in plan.ops else OpPlan(tile_columns=1).stages
    return max(0, min(plan.prefetch_instructions, stages - 1))


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
                f"or more K-tiles"
            )
        return needs


def _allocate(
    worker: tuple[Instruction, ...], needs_of: _NeedsByTile, depths: list[int], num_pages: int
) -> tuple[Instruction, ...]:
    """Pages are bits of an integer; `held[t]` are those in use while instruction t runs.

    In order of instructions, so that what is already placed never reaches beyond the last one: at its own
    time an instruction shares the pages with nobody, and only its early weights must find gaps.
    """
    every = (1 << num_pages) - 1
    held: list[int] = []
    placed: list[Instruction] = []
    for index, instruction in enumerate(worker):
        needs = needs_of(instruction)
        depth = depths[instruction.op] if needs.weights else 0
        for live_from in range(max(0, index - depth), index + 1):
            taken = 0
            for time in range(live_from, index):
                taken |= held[time]
            firsts = _place(every, taken, needs, num_pages)
            if firsts is not None:
                break
        assert firsts is not None, "what fits in all pages has a place when nothing else is held"
        weights, source, result = firsts
        early = _mask(weights, needs.weights)
        for time in range(live_from, index):
            held[time] |= early
        held.append(early | _mask(source, needs.input) | _mask(result, needs.output))
        uses = (
            PageUse(PageRole.WEIGHTS, weights, needs.weights, live_from),
            PageUse(PageRole.INPUT, source, needs.input, index),
            PageUse(PageRole.OUTPUT, result, needs.output, index),
        )
        pages = tuple(use for use in uses if use.count)
        placed.append(msgspec.structs.replace(instruction, pages=pages))
    return tuple(placed)


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


def _bytes(bits: float) -> int:
    return -int(-bits // 8)
