"""K-tiles are the same in every bucket and, on a CPU, for any number of workers: equal bits hang on it."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megakernel.default_plan import default_plan
from megakernel.k_tiles import shared_k_tiles
from megakernel.machine import Machine, load_machine
from megakernel.memory import ScratchError
from megakernel.model.shape import ModelShape
from megakernel.pipeline import compile_program
from megakernel.plan import Plan
from megakernel.program import Opcode, Program
from megakernel.schedule import list_schedule
from megakernel.search import Budget, search
from megakernel.shapes import SHAPES
from megakernel.tilings import Tilings
from tests.megakernel.compiler_cases import cpu_machine, small_shape
from tests.megakernel.model.model_files import tiny_shape

LINEAR = ("qkv", "o", "gate_up", "down", "head")
KIB = 1024


def of_plan(plan: Plan) -> dict[str, int]:
    return {role: plan.ops[role].num_k_tiles for role in LINEAR}


def of_program(program: Program) -> set[tuple[str, int, int]]:
    """Each op with the K ranges that it sums."""
    return {
        (program.ops[i.op].name, i.k0, i.k1)
        for worker in program.workers
        for i in worker
        if i.opcode in (Opcode.LINEAR, Opcode.LINEAR_PARTIAL)
    }


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    kv_heads = draw(st.integers(1, 4))
    return small_shape(
        hidden_size=draw(st.sampled_from([64, 96, 576, 1024])),
        intermediate_size=32 * draw(st.integers(1, 64)),
        num_heads=kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([16, 64])),
        vocab_size=draw(st.integers(1, 3000)),
        has_tied_head=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes(),
    workers=st.sampled_from([1, 2, 3, 8]),
    other_workers=st.sampled_from([1, 2, 3, 8]),
    bucket=st.integers(1, 256),
    scratch=st.sampled_from([96 * KIB, 256 * KIB, 1024 * KIB]),
    weight_format=st.sampled_from(["Q4_1", "Q8_0", "F32"]),
)
def test_a_cpu_s_k_tiles_depend_on_neither_workers_nor_bucket(
    shape, workers, other_workers, bucket, scratch, weight_format
):
    formats = dict.fromkeys(weight_names(shape), weight_format)
    machine = cpu_machine(workers, scratch_bytes=scratch)
    expected = shared_k_tiles(shape, cpu_machine(other_workers, scratch_bytes=scratch), formats)
    assert of_plan(default_plan(shape, machine, bucket, formats)) == expected
    assert of_plan(list_schedule(shape, machine, bucket, formats)) == expected
    for role, ranked in zip(*tilings_of(shape, machine, bucket, formats), strict=True):
        assert {op_plan.num_k_tiles for op_plan in ranked} == {expected.get(role.role, 1)}


def weight_names(shape: ModelShape) -> list[str]:
    parts = ("q", "k", "v", "o", "gate", "up", "down")
    layers = [f"layers.{layer}.{part}" for layer in range(shape.num_layers) for part in parts]
    return ["embed", "head", *layers]


def tilings_of(shape, machine, bucket, formats):
    try:
        tilings = Tilings(shape, machine, bucket, formats)
    except ScratchError:
        assume(False)
    return tilings.roles, tilings.ranked


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_a_cpu_with_a_common_cache_leaves_k_whole(name: str, workers: int):
    assert set(shared_k_tiles(SHAPES[name], cpu_machine(workers)).values()) == {1}


def test_a_cpu_splits_k_as_little_as_its_scratch_allows():
    """16 columns of weights, 16 rows of activations quantized alike, 16 x 16 sums."""
    shape = small_shape(intermediate_size=4096)
    needed_bytes = 16 * 4096 * 5 // 8 + 16 * 4096 * 9 // 8 + 16 * 16 * 4
    formats = dict.fromkeys(weight_names(shape), "Q4_1")
    machine = cpu_machine(2, scratch_bytes=needed_bytes)
    assert shared_k_tiles(shape, machine, formats)["down"] == 1
    tighter = msgspec.structs.replace(machine, scratch_bytes=needed_bytes - 1024)
    assert shared_k_tiles(shape, tighter, formats)["down"] == 2


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("machine_name", ["l20", "l4", "rtx4090", "h100"])
def test_all_buckets_of_a_gpu_share_k_tiles(name: str, machine_name: str):
    shape, machine = SHAPES[name], load_machine(machine_name)
    expected = shared_k_tiles(shape, machine)
    for bucket in (1, 2, 4, 8, 16, 32, 64):
        assert of_plan(default_plan(shape, machine, bucket)) == expected
        assert of_plan(list_schedule(shape, machine, bucket)) == expected


@pytest.mark.parametrize("machine", [cpu_machine(2), cpu_machine(3), load_machine("l20")], ids=str)
def test_a_search_changes_no_k_tiles(machine: Machine, tmp_path: Path):
    shape = tiny_shape("qwen3", num_layers=4, hidden_size=256, intermediate_size=512)
    for bucket in (1, 16):
        found = search(
            shape, "f", machine, bucket, compile_program, budget=Budget(evaluations=6), folder=tmp_path
        )
        for plan in (found.plan, found.baseline, *found.finalists):
            assert of_plan(plan) == shared_k_tiles(shape, machine)


def test_programs_sum_the_same_ranges_of_k():
    shape = small_shape(intermediate_size=2048)
    programs = [
        compile_program(shape, "f", cpu_machine(workers, scratch_bytes=48 * KIB), bucket)
        for workers in (1, 2, 3, 8)
        for bucket in (1, 7, 64, 256)
    ]
    assert any(k0 > 0 for _, k0, _ in of_program(programs[0]))
    assert all(of_program(program) == of_program(programs[0]) for program in programs)


def test_what_fits_no_k_tile_is_refused_with_the_role():
    with pytest.raises(ScratchError, match="qkv: no tile of 16 columns or more fits the 1024 scratch bytes"):
        shared_k_tiles(small_shape(), cpu_machine(2, scratch_bytes=1024))
