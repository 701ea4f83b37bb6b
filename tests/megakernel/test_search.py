"""List scheduling and the search: deterministic, cached, and never worse than where they began."""

import math
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakernel.cost import simulate
from megakernel.cuda_limits import check_cuda_programs
from megakernel.default_plan import default_plan
from megakernel.footprint import max_stages
from megakernel.judge import truncated, with_head_for
from megakernel.machine import Machine, load_machine
from megakernel.memory import ScratchError
from megakernel.model.shape import ModelShape
from megakernel.passes.context import PlanError
from megakernel.pipeline import compile_program
from megakernel.plan import ROLES, OpPlan, Plan
from megakernel.program import Opcode, Program, fits_heads
from megakernel.schedule import (
    balanced,
    geometry_of,
    k_tile_choices,
    list_schedule,
    role_shapes,
    tile_footprint,
)
from megakernel.search import Budget, Progress, SearchResult, refine, search
from megakernel.shapes import SHAPES
from megakernel.tilings import CONTIGUOUS, Tilings
from megakernel.validate import validate
from tests.megakernel.model.model_files import tiny_shape

L20 = load_machine("l20")
EIGHT = msgspec.structs.replace(
    L20, name="eight", kind="cpu", num_workers=8, scratch_bytes=48 * 1024, reserved_bytes=0
)
SHAPE = tiny_shape("qwen3", num_layers=4, hidden_size=256, intermediate_size=512)


class Counting:
    """`compile_program`, and how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self,
        shape: ModelShape,
        fingerprint: str,
        machine: Machine,
        bucket: int,
        plan: Plan,
        *,
        formats: Mapping[str, str] | None,
    ) -> Program:
        self.calls += 1
        return compile_program(shape, fingerprint, machine, bucket, plan, formats=formats)


def run(folder: Path, **options: object) -> SearchResult:
    options = {"budget": Budget(evaluations=8)} | options
    return search(SHAPE, "f", EIGHT, 1, compile_program, folder=folder, **options)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 9))
def test_longest_first_is_within_four_thirds_of_the_least_possible(costs, num_workers):
    workers = balanced([float(cost) for cost in costs], num_workers)
    loads = [0] * num_workers
    for cost, worker in zip(costs, workers, strict=True):
        loads[worker] += cost
    descending = sorted(costs, reverse=True)
    least = max(math.ceil(sum(costs) / num_workers), max(costs, default=0))
    if len(costs) > num_workers:
        least = max(least, descending[num_workers - 1] + descending[num_workers])
    assert max(loads) <= least * (4 / 3) + 1e-9 or len(costs) <= num_workers


def test_each_role_has_what_its_tiles_need():
    roles = role_shapes(SHAPES["qwen3-1.7b"])
    assert tuple(roles) == ROLES
    assert {role: (r.in_features, r.columns, r.granule, r.count) for role, r in roles.items()} == {
        "embed": (0, 2048, 16, 1),
        "qkv": (2048, 4096, 128, 28),
        "attention": (0, 8, 1, 28),
        "o": (2048, 2048, 16, 28),
        "gate_up": (2048, 12288, 32, 28),
        "down": (6144, 2048, 16, 28),
        "head": (2048, 151936, 256, 1),
    }


def test_k_tiles_are_whole_blocks():
    role = role_shapes(SHAPES["smollm2-135m"])["qkv"]
    assert k_tile_choices(role) == (1, 2, 3, 6, 9, 18)
    assert k_tile_choices(msgspec.structs.replace(role, in_features=100)) == (1,)


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen3-1.7b"])
@pytest.mark.parametrize("machine", ["l20", "h100"])
@pytest.mark.parametrize("bucket", [1, 64])
def test_list_schedule_fits_the_scratch_memory(name, machine, bucket):
    shape, target = SHAPES[name], load_machine(machine)
    plan = list_schedule(shape, target, bucket)
    for role in role_shapes(shape, kind=target.kind).values():
        op_plan = plan.ops[role.role]
        if role.in_features:
            needed = tile_footprint(role, geometry_of(shape), op_plan, bucket, target)
            assert max_stages(needed, target) >= op_plan.stages
        if op_plan.tile_workers is not None:
            assert set(op_plan.tile_workers) <= set(range(target.num_workers))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("machine", ["l20", "h100"])
@pytest.mark.parametrize("bucket", [1, 64])
def test_on_a_gpu_a_head_may_be_of_several_tiles(name, machine, bucket):
    """QKV tiles that are planned or tried are whole heads or equal parts of one; on an H100 K stays whole."""
    shape, target = SHAPES[name], load_machine(machine)
    plans = [list_schedule(shape, target, bucket), default_plan(shape, target, bucket)]
    tilings = Tilings(shape, target, bucket, known=plans)
    ranked = dict(zip((role.role for role in tilings.roles), tilings.ranked, strict=True))["qkv"]
    widths = {plan.tile_columns for plan in (*ranked, *(plan.ops["qkv"] for plan in plans))}
    assert all(fits_heads(width, shape.head_dim) for width in widths)
    assert min(widths) == 16
    if machine == "h100":
        assert plans[0].ops["qkv"].num_k_tiles == 1


def test_busiest_sms_have_few_columns_of_qkv():
    """4,096 columns on 132 SMs: of tiles of 16 some have two, of 32 one."""
    shape, target = SHAPES["qwen3-1.7b"], load_machine("h100")
    assert list_schedule(shape, target, 1).ops["qkv"].tile_columns == 32


def test_a_gpu_is_searched_within_what_its_kernels_take(tmp_path):
    """Every plan that is tried compiles: a tile that the kernels do not take would end the search."""
    gpu = msgspec.structs.replace(L20, name="toy", num_workers=8)
    found = search(
        SHAPE, "toy", gpu, 4, compile_program, budget=Budget(evaluations=40, seconds=600), folder=tmp_path
    )
    assert found.is_complete
    for plan in (found.plan, *found.finalists):
        program = compile_program(SHAPE, "toy", gpu, 4, plan)
        validate(program)
        check_cuda_programs([program], machine=gpu)


def test_a_start_with_other_k_tiles_is_refused():
    plan = list_schedule(SHAPE, EIGHT, 1)
    down = msgspec.structs.replace(plan.ops["down"], num_k_tiles=plan.ops["down"].num_k_tiles + 1)
    other = msgspec.structs.replace(plan, ops=plan.ops | {"down": down})
    with pytest.raises(PlanError, match=r"down: a plan has \d K-tiles, all programs have \d"):
        Tilings(SHAPE, EIGHT, 1, known=[other])


def test_a_model_that_cannot_fit_is_refused_with_the_role():
    machine = msgspec.structs.replace(EIGHT, name="tight", scratch_bytes=2048)
    with pytest.raises(ScratchError, match=r"qkv: .*2048 scratch bytes of a worker of tight"):
        list_schedule(SHAPE, machine, 1)
    with pytest.raises(ScratchError, match="of tight"):
        Tilings(SHAPE, machine, 1)


def test_list_schedule_compiles_to_a_program_that_is_proved_safe():
    validate(compile_program(SHAPE, "f", EIGHT, 2, list_schedule(SHAPE, EIGHT, 2)), EIGHT)


def test_attention_s_first_splits_are_spread_over_workers():
    """At a short context only they have work: on few workers attention would crawl."""
    shape = msgspec.structs.replace(SHAPE, num_layers=1, max_context_tokens=2048)
    program = compile_program(shape, "f", EIGHT, 1, list_schedule(shape, EIGHT, 1))
    busy = {
        worker
        for worker, instructions in enumerate(program.workers)
        for instruction in instructions
        if instruction.opcode is Opcode.ATTENTION and instruction.part < 4
    }
    assert len(busy) == 8


def test_every_place_in_the_search_space_compiles():
    tilings = Tilings(SHAPE, EIGHT, 1)
    shape = msgspec.structs.replace(SHAPE, num_layers=1)
    for rank in range(3):
        ranks = tuple(min(rank, len(ranked) - 1) for ranked in tilings.ranked)
        for turn in (CONTIGUOUS, 0, 5):
            program = compile_program(shape, "f", EIGHT, 1, tilings.plan(ranks, (turn,) * len(ranks), rank))
            validate(program, EIGHT)


def test_equal_seeds_give_equal_plans(tmp_path):
    first, again = run(tmp_path / "a", seed=3), run(tmp_path / "b", seed=3)
    assert first == again
    assert first.is_complete
    assert first.evaluations == 8


def test_the_result_is_never_worse_than_list_scheduling(tmp_path):
    for seed in range(2):
        result = run(tmp_path, seed=seed)
        assert result.bandwidth_bound_us <= result.predicted_us <= result.baseline_us
        program = compile_program(SHAPE, "f", EIGHT, 1, result.plan)
        assert simulate(program, EIGHT).makespan_us == result.predicted_us
        validate(program, EIGHT)
        assert result.gain == pytest.approx(1 - result.predicted_us / result.baseline_us)


def test_a_given_start_is_judged_too(tmp_path):
    start = default_plan(SHAPE, EIGHT, 1)
    result = run(tmp_path, starts=[start])
    start_us = simulate(compile_program(SHAPE, "f", EIGHT, 1, start), EIGHT).makespan_us
    assert result.predicted_us <= start_us * 1.02


def test_equal_questions_are_answered_from_the_cache(tmp_path):
    compile_counted = Counting()
    results = [
        search(
            SHAPE, "f", EIGHT, 1, compile_counted, folder=tmp_path, seed=seed, budget=Budget(evaluations=4)
        )
        for seed in (0, 0, 1)
    ]
    assert results[0] == results[1]
    calls = compile_counted.calls
    (path, _) = sorted((tmp_path / "schedules").iterdir())
    path.write_bytes(b"{")
    for seed in (0, 1):
        search(
            SHAPE, "f", EIGHT, 1, compile_counted, folder=tmp_path, seed=seed, budget=Budget(evaluations=4)
        )
    assert 1.3 * calls < compile_counted.calls < 1.7 * calls


def test_attention_is_assigned_for_the_splits_that_programs_have(tmp_path):
    shape = msgspec.structs.replace(SHAPE, max_context_tokens=512)
    compile_split = partial(compile_program, split_tokens=96)
    result = search(shape, "f", EIGHT, 1, compile_split, folder=tmp_path, budget=Budget(evaluations=3))
    program = compile_split(shape, "f", EIGHT, 1, result.plan)
    assert program.split_tokens == 96
    assert {len(plan.ops["attention"].tile_workers or ()) % 6 for plan in result.finalists} == {0}


def test_time_ends_a_search_and_the_result_says_so(tmp_path):
    now = iter(range(10_000))
    budget = Budget(evaluations=1000, seconds=12.0)
    result = run(tmp_path, budget=budget, clock=lambda: float(next(now)))
    assert not result.is_complete
    assert 0 < result.evaluations < 12
    assert result.predicted_us <= result.baseline_us


def test_progress_counts_up_and_the_best_only_falls(tmp_path):
    seen: list[Progress] = []
    run(tmp_path, on_progress=seen.append)
    assert [progress.evaluations for progress in seen] == list(range(1, 9))
    assert all(later.best_us <= earlier.best_us for earlier, later in pairwise(seen))


def test_a_large_vocabulary_is_cut_with_its_assignment():
    shape = SHAPES["qwen3-1.7b"]
    cut = truncated(shape)
    assert (cut.num_layers, cut.vocab_size) == (3, 38144)
    plan = list_schedule(shape, L20, 1)
    shorter = with_head_for(plan, cut.vocab_size).ops["head"]
    whole = plan.ops["head"]
    tiles = -(-38144 // whole.tile_columns)
    assert shorter.tile_workers == whole.tile_workers[: tiles * whole.num_k_tiles]
    assert truncated(SHAPE).vocab_size == SHAPE.vocab_size


def test_refinement_takes_what_measures_fastest():
    plans = [Plan(ops={"embed": OpPlan(tile_columns=n)}) for n in (1, 2, 3, 4)]
    times = {1: 5.0, 2: 3.0, 4: 3.0}

    def measure(plan: Plan) -> float:
        columns = plan.ops["embed"].tile_columns
        if columns == 3:
            raise ScratchError("does not fit")
        return times[columns]

    refined = refine(plans, measure)
    assert refined.plan == plans[1]
    assert refined.measured_us == (5.0, 3.0, math.inf, 3.0)
    with pytest.raises(ScratchError, match="does not fit"):
        refine(plans[2:3], measure)
    with pytest.raises(ScratchError, match="no plan was given"):
        refine([], measure)
