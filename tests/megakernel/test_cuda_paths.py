"""Paths of SMs: every instruction of a program comes back out of them, whatever is shared or rolled up."""

from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.cuda_paths import Loop, Operands, instructions_of_path, paths_of
from megakernel.machine import load_machine
from megakernel.pipeline import compile_program
from megakernel.plan import Plan
from megakernel.program import Op, Opcode, PageRole, Program
from megakernel.schedule import list_schedule
from megakernel.shapes import SHAPES
from tests.megakernel.model.model_files import tiny_shape

GPU = load_machine("l20")


def describe(op: Op) -> Operands:
    return Operands((), {"layer": op.layer})


def numbers_of(program: Program, worker: int) -> list[tuple[int, Opcode, int]]:
    """(op, opcode, tile number) by the program itself."""
    widths: Counter[tuple[int, Opcode]] = Counter()
    for instruction in (i for own in program.workers for i in own):
        tile = instruction.op, instruction.opcode
        widths[tile] = max(widths[tile], instruction.n1 - instruction.n0)
    found = []
    for instruction in program.workers[worker]:
        column = instruction.n0 // widths[instruction.op, instruction.opcode]
        match instruction.opcode:
            case Opcode.ATTENTION:
                number = instruction.part * program.geometry.num_kv_heads + instruction.n0
            case Opcode.LINEAR_PARTIAL:
                number = column * instruction.num_parts + instruction.part
            case _:
                number = column
        found.append((instruction.op, instruction.opcode, number))
    return found


def pages_of(program: Program, worker: int) -> list[tuple[int | None, int | None]]:
    """Of each instruction the first page of its weights, and how far ahead they may be loaded."""
    found = []
    for index, instruction in enumerate(program.workers[worker]):
        uses = [use for use in instruction.pages if use.role is PageRole.WEIGHTS]
        found.append((uses[0].first, index - uses[0].live_from) if uses else (None, None))
    return found


def pages_of_path(path) -> list[tuple[int | None, int | None]]:
    found = []
    for part in path.parts:
        is_loop = isinstance(part, Loop)
        for _ in range(part.first, part.end) if is_loop else range(1):
            for call in part.calls if is_loop else (part,):
                pages, ahead = call.weight_pages or (None,), call.ahead or (None,)
                found += [(pages[j % len(pages)], ahead[j % len(ahead)]) for j in range(call.count)]
    return found


def check(program: Program) -> None:
    paths = paths_of(program, describe)
    assert sorted(worker for path in paths for worker in path.workers) == list(range(len(program.workers)))
    for path in paths:
        for worker in path.workers:
            assert instructions_of_path(program, path, worker) == numbers_of(program, worker)
            assert pages_of_path(path) == pages_of(program, worker)


@pytest.mark.parametrize("model", ["llama-3.2-1b", "qwen3-1.7b"])
@pytest.mark.parametrize("machine", ["l20", "h100"])
def test_whole_models(machine, model):
    gpu, shape = load_machine(machine), SHAPES[model]
    program = compile_program(shape, "x", gpu, 1, list_schedule(shape, gpu, 1))
    check(program)
    loops = [part for path in paths_of(program, describe) for part in path.parts if isinstance(part, Loop)]
    assert max(loop.end - loop.first for loop in loops) >= shape.num_layers - 2


@settings(max_examples=30, deadline=None)
@given(
    num_workers=st.integers(1, 7),
    bucket=st.sampled_from([1, 4, 16]),
    num_layers=st.integers(1, 5),
    turns=st.lists(st.integers(0, 6), min_size=7, max_size=7),
    stages=st.integers(1, 4),
)
def test_any_assignment(num_workers, bucket, num_layers, turns, stages):
    """Tiles dealt from other workers on, and loaded less or further ahead."""
    gpu = msgspec.structs.replace(GPU, name="toy", num_workers=num_workers)
    shape = tiny_shape("qwen3", num_layers=num_layers, hidden_size=192, intermediate_size=320)
    plan = list_schedule(shape, gpu, bucket)
    ops = {}
    for (role, op_plan), turn in zip(plan.ops.items(), turns, strict=True):
        workers = op_plan.tile_workers
        if workers is not None:
            workers = tuple((worker + turn) % num_workers for worker in workers)
        ops[role] = msgspec.structs.replace(op_plan, tile_workers=workers, stages=stages)
    check(compile_program(shape, "x", gpu, bucket, Plan(ops=ops, prefetch_instructions=stages - 1)))
