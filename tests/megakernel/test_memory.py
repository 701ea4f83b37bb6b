"""Footprints and stages; pages never overlap or leave the scratch memory, and are held as early as can be."""

from itertools import product

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.footprint import (
    Footprint,
    attention_footprint,
    attention_row_chunk,
    footprint,
    linear_footprint,
    max_stages,
    page_needs,
)
from megakernel.machine import Machine, load_machine
from megakernel.memory import ScratchError, plan_pages
from megakernel.model.shape import ModelShape
from megakernel.plan import ROLES, OpPlan, Plan
from megakernel.program import Instruction, Opcode, PageRole, Program
from megakernel.schedule import geometry_of
from megakernel.shapes import SHAPES
from tests.megakernel.model.model_files import tiny_shape
from tests.megakernel.programs import Recipe, build_program

L20 = msgspec.structs.replace(load_machine("l20"), kind="cpu", reserved_bytes=0)
"""Its figures, planned as a CPU is: of an SM `test_footprint_cuda.py` tells."""


def small_machine(num_pages: int, page_bytes: int = 1024) -> Machine:
    return msgspec.structs.replace(
        L20, name="small", num_workers=3, scratch_bytes=num_pages * page_bytes, page_bytes=page_bytes
    )


def plan_of(prefetch: int, stages: int) -> Plan:
    return Plan(
        ops={role: OpPlan(tile_columns=16, stages=stages) for role in ROLES}, prefetch_instructions=prefetch
    )


def program_of(**recipe: object) -> Program:
    return build_program(tiny_shape("llama"), Recipe(**recipe))


def test_k_splitting_halves_a_weight_stage_and_doubles_the_stages():
    whole = linear_footprint(columns=32, k=2048, rows=1, weight_bits=5.0, input_bits=9.0)
    split = linear_footprint(columns=32, k=1024, rows=1, weight_bits=5.0, input_bits=9.0)
    assert whole.weight_stage_bytes == 32 * 2048 * 5 // 8 == 2 * split.weight_stage_bytes
    assert whole.input_bytes == 2 * split.input_bytes
    assert (max_stages(whole, L20), max_stages(split, L20)) == (2, 4)
    assert split.total_bytes(2) <= whole.total_bytes(2) // 2 + whole.output_bytes


@pytest.mark.parametrize(("rows", "chunk"), [(1, 1), (8, 8), (16, 16), (64, 16)])
def test_rows_are_a_dimension_of_the_footprint_up_to_a_chunk(rows, chunk):
    needed = linear_footprint(columns=64, k=512, rows=rows, weight_bits=4.5, input_bits=9.0)
    assert needed.input_bytes == chunk * 512 * 9 // 8
    assert needed.output_bytes == chunk * 64 * 4


def test_stages_are_what_is_left_beside_input_and_output():
    machine = small_machine(10)
    assert max_stages(Footprint(weight_stage_bytes=2048, input_bytes=1, output_bytes=1025), machine) == 3
    assert max_stages(Footprint(weight_stage_bytes=9000, input_bytes=1, output_bytes=1), machine) == 0
    assert max_stages(Footprint(weight_stage_bytes=1, input_bytes=9000, output_bytes=9000), machine) == 0
    assert max_stages(Footprint(weight_stage_bytes=0, input_bytes=5, output_bytes=5), machine) == 1


def test_columns_of_qkv_are_counted_in_their_own_format():
    shape = tiny_shape("llama")
    program = program_of(tile_columns={"qkv": 10_000})
    (op,) = (op for op in program.ops if op.name == "layers.0.qkv")
    formats = dict(zip(op.weights, ("Q4_1", "Q8_0", "F16"), strict=True))
    instruction = next(i for worker in program.workers for i in worker if i.op == op.index)
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    bits = shape.hidden_size * (5.0 * q + 8.5 * kv + 16.0 * kv)
    assert footprint(program, instruction, formats).weight_stage_bytes == bits // 8


def intervals_overlap(worker: tuple[Instruction, ...]) -> bool:
    held: dict[tuple[int, int], int] = {}
    for index, instruction in enumerate(worker):
        for number, use in enumerate(instruction.pages):
            for time, page in product(
                range(use.live_from, index + 1), range(use.first, use.first + use.count)
            ):
                if held.setdefault((time, page), index * 4 + number) != index * 4 + number:
                    return True
    return False


@settings(max_examples=60, deadline=None)
@given(
    num_pages=st.integers(4, 40),
    prefetch=st.integers(0, 4),
    stages=st.integers(1, 4),
    bucket=st.sampled_from([1, 4, 16]),
    k_tiles=st.sampled_from([{}, {"down": 2, "qkv": 2}]),
    seed=st.integers(0, 5),
)
def test_pages_never_overlap_and_stay_in_the_scratch_memory(
    num_pages, prefetch, stages, bucket, k_tiles, seed
):
    machine = small_machine(num_pages)
    program = program_of(bucket=bucket, k_tiles=k_tiles, seed=seed)
    try:
        paged = plan_pages(program, machine, plan_of(prefetch, stages))
    except ScratchError:
        return  # test_what_does_not_fit_is_named_with_need_and_capacity
    assert (paged.num_pages, paged.page_bytes) == (num_pages, 1024)
    for worker in paged.workers:
        assert not intervals_overlap(worker)
        for index, instruction in enumerate(worker):
            needs = page_needs(footprint(paged, instruction), 1024)
            counts = {use.role: use.count for use in instruction.pages}
            assert counts.get(PageRole.WEIGHTS, 0) == needs.weights
            assert counts.get(PageRole.INPUT, 0) == needs.input
            assert counts.get(PageRole.OUTPUT, 0) == needs.output
            for use in instruction.pages:
                assert use.first >= 0
                assert use.first + use.count <= num_pages
                ahead = index - use.live_from
                assert ahead == 0 or use.role is PageRole.WEIGHTS
                assert ahead <= min(prefetch, stages - 1, index)


def without_pages(program: Program) -> list[list[Instruction]]:
    return [[msgspec.structs.replace(i, pages=()) for i in worker] for worker in program.workers]


def test_only_pages_change():
    program = program_of(bucket=2)
    paged = plan_pages(program, small_machine(40))
    assert without_pages(paged) == without_pages(program)


def test_with_room_enough_every_weight_is_held_as_early_as_the_plan_says():
    paged = plan_pages(program_of(), small_machine(2000), plan_of(3, 4))
    for worker in paged.workers:
        for index, instruction in enumerate(worker):
            for use in instruction.pages:
                if use.role is PageRole.WEIGHTS:
                    assert use.live_from == max(0, index - 3)


def weights_ahead(program: Program) -> int:
    """How many weight tiles are held before their own instruction."""
    return sum(
        use.live_from < index
        for worker in program.workers
        for index, instruction in enumerate(worker)
        for use in instruction.pages
        if use.role is PageRole.WEIGHTS
    )


def most_weights_ahead(
    worker: tuple[Instruction, ...], needs: list[int], totals: list[int], pages: int
) -> int:
    """The optimum one instruction ahead, pages counted but not placed: an upper bound, by brute force."""
    free = [pages - total for total in totals]
    best = 0
    for choice in product((False, True), repeat=len(worker) - 1):
        pairs = zip(choice, range(1, len(worker)), strict=True)
        if all(not early or needs[at] <= free[at - 1] for early, at in pairs):
            best = max(
                best, sum(early and needs[at] > 0 for early, at in zip(choice, range(1, 99), strict=False))
            )
    return best


@pytest.mark.parametrize("num_pages", [14, 16, 20])
def test_as_many_weights_are_held_early_as_brute_force_finds_possible(num_pages):
    shape = msgspec.structs.replace(tiny_shape("llama"), num_layers=1)
    program = build_program(shape, Recipe(workers=4))
    machine = small_machine(num_pages)
    program = msgspec.structs.replace(program, workers=tuple(worker[:10] for worker in program.workers))
    paged = plan_pages(program, machine, plan_of(1, 2))
    possible = 0
    for worker in program.workers:
        needs = [page_needs(footprint(program, instruction), 1024) for instruction in worker]
        weights, totals = [need.weights for need in needs], [need.total for need in needs]
        possible += most_weights_ahead(worker, weights, totals, num_pages)
    assert weights_ahead(paged) == possible > 0


def test_pages_of_a_finished_input_become_weight_stages():
    """Activation -> weight reuse: where pages are short, some are an input's first and a weight's later."""
    program = program_of(bucket=16)
    needs = [page_needs(footprint(program, i), 256).total for worker in program.workers for i in worker]
    paged = plan_pages(program, small_machine(max(needs), page_bytes=256), plan_of(1, 2))
    roles: dict[tuple[int, int], set[PageRole]] = {}
    for number, worker in enumerate(paged.workers):
        for instruction in worker:
            for use in instruction.pages:
                for page in range(use.first, use.first + use.count):
                    roles.setdefault((number, page), set()).add(use.role)
    assert any({PageRole.INPUT, PageRole.WEIGHTS} <= seen for seen in roles.values())
    assert any({PageRole.INPUT, PageRole.OUTPUT} <= seen for seen in roles.values())


def test_what_does_not_fit_is_named_with_need_and_capacity():
    with pytest.raises(
        ScratchError, match=r"layers\.0\.\w+: columns .* need \d+ bytes .*small has 2 pages of 1024"
    ):
        plan_pages(program_of(), small_machine(2))


def test_a_large_bucket_of_a_whole_model_plans_within_capacity():
    shape = ModelShape(**(msgspec.structs.asdict(tiny_shape("llama")) | {"num_layers": 4}))
    program = build_program(shape, Recipe(bucket=64))
    paged = plan_pages(program, small_machine(64), plan_of(2, 3))
    opcodes = {instruction.opcode for worker in paged.workers for instruction in worker}
    assert {Opcode.EMBED, Opcode.LINEAR, Opcode.ATTENTION} <= opcodes


QWEN = geometry_of(SHAPES["qwen2.5-1.5b"])


@pytest.mark.parametrize(
    ("kib", "rows", "chunk"), [(99, 8, 8), (99, 12, 8), (99, 64, 8), (227, 64, 16), (40, 64, 1), (8, 64, 1)]
)
def test_attention_takes_as_many_rows_at_once_as_fit(kib, rows, chunk):
    """Six heads of 128 a KV head: 6,168 bytes a row, beside 32 KB of K and V."""
    size = {"kv_heads": 1, "geometry": QWEN, "rows": rows, "num_pages": kib, "page_bytes": 1024}
    assert attention_row_chunk(**size) == chunk
    assert attention_footprint(**size).output_bytes == chunk * 6 * 130 * 4


@settings(max_examples=80, deadline=None)
@given(
    heads=st.integers(1, 16),
    dim=st.sampled_from([16, 64, 128]),
    rows=st.integers(1, 80),
    num_pages=st.integers(1, 300),
)
def test_a_row_chunk_is_the_largest_power_of_two_that_fits(heads, dim, rows, num_pages):
    geometry = msgspec.structs.replace(QWEN, num_heads=2 * heads, num_kv_heads=2, head_dim=dim)
    size = {"kv_heads": 1, "geometry": geometry, "num_pages": num_pages, "page_bytes": 1024}

    def fits(chunk: int) -> bool:
        # With room for everything, as many rows as there are, up to 16, are taken at once.
        whole = attention_footprint(**size | {"rows": chunk, "num_pages": 10_000})
        return page_needs(whole, 1024).total <= num_pages

    chunk = attention_row_chunk(**size, rows=rows)
    assert chunk == 1 or fits(chunk)
    larger = [size for size in (2, 4, 8, min(rows, 16)) if chunk < size <= min(rows, 16)]
    assert not any(map(fits, larger))
