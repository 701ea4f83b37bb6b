"""Calls of SMs: every instruction of a program comes back out of them, whatever is shared or rolled up."""

from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.codegen_limits import CodegenError
from megakernel.cuda_calls import Call, Loop, Operands, calls_of, instructions_of, pattern_of
from megakernel.machine import load_machine
from megakernel.pipeline import compile_program
from megakernel.plan import Plan
from megakernel.program import Instruction, Op, Opcode, PageRole, Program
from megakernel.schedule import list_schedule
from megakernel.shapes import SHAPES
from tests.megakernel.model.model_files import tiny_shape

GPU = load_machine("l20")


def describe(op: Op) -> Operands:
    return Operands((), {"layer": op.layer})


def tiles_of(program: Program, worker: int) -> list[list[tuple[int, Instruction]]]:
    """Instructions with their index, those of one tile together."""
    found: list[list[tuple[int, Instruction]]] = [[]]
    for index, instruction in enumerate(program.workers[worker]):
        found[-1].append((index, instruction))
        if instruction.opcode is not Opcode.LINEAR_ACCUMULATE:
            found.append([])
    return found[:-1]


def numbers_of(program: Program, worker: int) -> list[tuple[int, Opcode, int]]:
    """(op, opcode, tile number) by the program itself."""
    widths: Counter[int] = Counter()
    for instruction in (i for own in program.workers for i in own):
        widths[instruction.op] = max(widths[instruction.op], instruction.n1 - instruction.n0)
    found = []
    for tile in tiles_of(program, worker):
        instruction = tile[-1][1]
        number = instruction.n0 // widths[instruction.op]
        if instruction.opcode is Opcode.ATTENTION:
            number = instruction.part * program.geometry.num_kv_heads + instruction.n0
        found.append((instruction.op, instruction.opcode, number))
    return found


def details_of(program: Program, worker: int) -> list[tuple[object, ...]]:
    """Of each tile its pages, how far ahead its weights may be loaded, its waits and its signal."""
    found = []
    for tile in tiles_of(program, worker):
        pages = [
            [use.first for _, instruction in tile for use in instruction.pages if use.role is role]
            for role in PageRole
        ]
        for role, firsts in zip(PageRole, pages, strict=True):
            if role is not PageRole.WEIGHTS:
                assert len(set(firsts)) <= 1
                del firsts[1:]
        ahead = [
            index - use.live_from
            for index, instruction in tile
            for use in instruction.pages
            if use.role is PageRole.WEIGHTS
        ]
        waits = [(wait.counter, wait.target) for wait in tile[0][1].waits]
        found.append((pages, ahead, waits, tile[-1][1].signal))
    return found


def details_of_calls(parts: list[Call | Loop], worker: int) -> list[tuple[object, ...]]:
    found = []
    for part in parts:
        calls = part.calls if isinstance(part, Loop) else (part,)
        for layer in range(len(calls[0].runs)):
            for call in calls:
                run = call.runs[layer][worker]
                for j in range(run.count if run else 0):

                    def of_tile(values: tuple[int, ...], count: int, j: int = j) -> list[int]:
                        return list(values[j * count : (j + 1) * count])

                    loads = call.num_loads
                    pages = [
                        of_tile(run.pages.get(role, ()), loads if role is PageRole.WEIGHTS else 1)
                        for role in PageRole
                    ]
                    waits = [(wait.counter, wait.target) for wait in run.waits] if j == 0 else []
                    signal = run.signal if j == run.count - 1 else -1
                    found.append((pages, of_tile(run.ahead, loads), waits, signal))
    return found


def check(program: Program) -> list[Call | Loop]:
    parts = calls_of(program, describe)
    for worker in range(len(program.workers)):
        assert instructions_of(program, parts, worker) == numbers_of(program, worker)
        assert details_of_calls(parts, worker) == details_of(program, worker)
    return parts


@pytest.mark.parametrize("model", ["llama-3.2-1b", pytest.param("qwen3-1.7b", marks=pytest.mark.slow)])
@pytest.mark.parametrize("machine", ["l20", "h100"])
def test_all_layers_of_a_whole_model_share_their_calls(machine, model):
    gpu, shape = load_machine(machine), SHAPES[model]
    parts = check(compile_program(shape, "x", gpu, 1, list_schedule(shape, gpu, 1)))
    loops = [part for part in parts if isinstance(part, Loop)]
    assert [(loop.first, loop.end) for loop in loops] == [(0, shape.num_layers)]
    assert sum(call.opcode is Opcode.ATTENTION for call in loops[0].calls) == 1


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


def test_ops_out_of_order_are_refused():
    shape = tiny_shape("llama", num_layers=2)
    gpu = msgspec.structs.replace(GPU, name="toy", num_workers=2)
    program = compile_program(shape, "x", gpu, 1)
    first = program.workers[0]
    returning = msgspec.structs.replace(program, workers=((*first, first[0]), *program.workers[1:]))
    with pytest.raises(CodegenError, match="worker 0 returns to embed after a later op"):
        calls_of(returning, describe)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 3))
def test_a_pattern_repeats_what_it_was_found_in(values, repeats):
    sequence = values + values[-2:] * repeats
    pattern = pattern_of(sequence)
    assert all(value == sequence[pattern.index(j)] for j, value in enumerate(sequence))
    assert pattern.length <= max(len(values), 1)
