"""A tile's weights in blocks of K, one load each: so a tile of any width streams through an SM's memory.

Sums stay in registers from block to block. A block is a whole round of the consumer warps where it can be:
each takes every eighth unit of K, counted from 0, so what a row's sums are does not depend on blocks.
"""

from collections.abc import Iterator, Mapping

import msgspec

from megakernel.cuda_constants import NUM_CONSUMER_WARPS, ROW_CHUNK, ROW_TILE
from megakernel.footprint import Footprint, cuda_linear_footprint, page_needs
from megakernel.footprint_cuda import input_tile_bytes, weight_tile_bytes
from megakernel.machine import Machine
from megakernel.pack_cuda import common_format, unit_k
from megakernel.packing import GROUP
from megakernel.plan import OpPlan, Plan
from megakernel.program import Instruction, Opcode, Program
from megakernel.weight_formats import op_formats

_FLOATS = ("BF16", "F16")
_LOADS_IN_MEMORY, _ROUNDS_IN_MEMORY = 3, 4
"""So many loads are to fit an SM's memory at once, and so many rounds, where tiles can be so narrow."""
_LEAST_LOAD_K = 256
"""Unless all of K is less: a load costs a barrier."""
_WHOLE_INPUT_SHARE, _INPUT_SHARE = 0.45, 0.4
"""Of an SM's memory, what a row chunk's whole input may take, and two blocks of it where that is more."""


def most_columns(rows: int, stored: tuple[str, ...], k: int, machine: Machine) -> int:
    """Of a tile on an SM. A warp's sums of all columns stay in registers from load to load, and several of
    the smallest loads that keep all warps busy are to be in memory at once."""
    packed = common_format(stored, k)
    groups = 8 if rows <= ROW_TILE else 4 if packed in _FLOATS else 2
    round_k = min(k, NUM_CONSUMER_WARPS * unit_k(packed))
    fitting = machine.usable_bytes // _ROUNDS_IN_MEMORY // weight_tile_bytes(stored, GROUP, round_k)
    return GROUP * max(1, min(groups, fitting))


class KBlocks(msgspec.Struct, frozen=True):
    """Elements of K that are loaded at once, and those of the input that are staged at once: whole loads."""

    load_k: int
    input_k: int


def k_blocks(
    *,
    columns: int,
    k: int,
    rows: int,
    stored: tuple[str, ...],
    machine: Machine,
    loads_in_memory: int = _LOADS_IN_MEMORY,
) -> KBlocks:
    """Of a linear tile on an SM. Everything at once where it is small."""

    def of(blocks: KBlocks) -> Footprint:
        return cuda_linear_footprint(
            columns=columns, k=blocks.load_k, input_k=blocks.input_k, in_features=k, rows=rows, stored=stored
        )

    def fits(blocks: KBlocks) -> bool:
        return page_needs(of(blocks), machine.page_bytes).total <= machine.num_pages

    whole = of(KBlocks(k, k))
    load_bytes = machine.usable_bytes // loads_in_memory
    input_is_small = whole.input_bytes <= machine.usable_bytes * _WHOLE_INPUT_SHARE
    if input_is_small and whole.weight_stage_bytes <= load_bytes:
        return KBlocks(k, k)
    if rows > ROW_CHUNK and fits(KBlocks(k, k)):
        return KBlocks(k, k)  # all chunks of rows take the tile while it is there
    round_k = NUM_CONSUMER_WARPS * unit_k(common_format(stored, k))
    while round_k > _LEAST_LOAD_K and weight_tile_bytes(stored, columns, round_k) > load_bytes:
        round_k //= 2  # some warps have nothing of a load then
    rounds = max(1, load_bytes // weight_tile_bytes(stored, columns, round_k))
    if input_is_small:
        for fewer in range(rounds, 0, -1):
            if fits(blocks := KBlocks(min(k, fewer * round_k), k)):
                return blocks
    block_bytes = int(machine.usable_bytes * _INPUT_SHARE) // 2  # one is multiplied, and one on its way
    while True:
        for input_rounds in range(max(1, block_bytes // input_tile_bytes(round_k, rows)), 0, -1):
            rounds = min(rounds, input_rounds)
            blocks = KBlocks(min(k, rounds * round_k), min(k, input_rounds // rounds * rounds * round_k))
            if fits(blocks):
                return blocks
        if round_k <= _LEAST_LOAD_K:
            return blocks
        round_k //= 2
        rounds = max(1, load_bytes // weight_tile_bytes(stored, columns, round_k))


def planned_k_blocks(
    op_plan: OpPlan | None, *, columns: int, k: int, rows: int, stored: tuple[str, ...], machine: Machine
) -> KBlocks:
    """As the plan has them; as `k_blocks` does where it does not say."""
    if op_plan is not None and op_plan.load_k:
        return KBlocks(op_plan.load_k, op_plan.input_k or k)
    return k_blocks(columns=columns, k=k, rows=rows, stored=stored, machine=machine)


def split_loads(
    program: Program, machine: Machine, plan: Plan | None, formats: Mapping[str, str] | None
) -> Program:
    """The program, of a GPU, with linear tiles in blocks of K; more rows than a chunk go chunk by chunk."""
    planned = plan.ops if plan is not None else {}
    known: dict[tuple[int, int], KBlocks] = {}

    def parts(instruction: Instruction) -> Iterator[Instruction]:
        if instruction.opcode is not Opcode.LINEAR:
            yield instruction
            return
        op = program.ops[instruction.op]
        key = instruction.op, instruction.n1 - instruction.n0
        if key not in known:
            known[key] = planned_k_blocks(
                planned.get(op.name.rpartition(".")[2]),
                columns=instruction.n1 - instruction.n0,
                k=op.in_features,
                rows=program.bucket,
                stored=op_formats(op, formats),
                machine=machine,
            )
        yield from _blocks(instruction, op.in_features, known[key])

    workers = tuple(tuple(part for one in worker for part in parts(one)) for worker in program.workers)
    return msgspec.structs.replace(program, workers=workers)


def _blocks(instruction: Instruction, k: int, blocks: KBlocks) -> Iterator[Instruction]:
    if blocks.load_k >= k:
        yield instruction
        return
    for r0 in range(instruction.r0, instruction.r1, ROW_CHUNK):
        r1 = min(r0 + ROW_CHUNK, instruction.r1)
        for k0 in range(0, k, blocks.load_k):
            k1 = min(k, k0 + blocks.load_k)
            x0 = k0 // blocks.input_k * blocks.input_k
            is_first, is_last = k0 == 0 and r0 == instruction.r0, k1 == k and r1 == instruction.r1
            yield msgspec.structs.replace(
                instruction,
                opcode=Opcode.LINEAR if k1 == k else Opcode.LINEAR_ACCUMULATE,
                k0=k0,
                k1=k1,
                x0=x0 if blocks.input_k < k else 0,
                x1=min(k, x0 + blocks.input_k) if blocks.input_k < k else 0,
                r0=r0,
                r1=r1,
                waits=instruction.waits if is_first else (),
                signal=instruction.signal if is_last else -1,
            )
