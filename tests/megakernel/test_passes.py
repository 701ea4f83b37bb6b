"""Each pass by the IR it leaves, against golden files, and by the plans it refuses."""

from pathlib import Path

import msgspec
import pytest
from filecheck.matcher import Matcher
from filecheck.options import Options

from megakernel.passes.assign import contiguous, dealt
from megakernel.passes.context import PlanError
from megakernel.pipeline import STAGE_NAMES, compile_program, ir_after
from megakernel.plan import OpPlan
from megakernel.program import Opcode
from megakernel.schedule_error import ScheduleError
from megakernel.tiles import k_bounds
from megakernel.validate import validate
from tests.megakernel.compiler_cases import small_machine, small_plan, small_shape

GOLDEN = Path(__file__).parent.parent / "golden" / "ir"


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_golden_ir(stage: str, tmp_path: Path):
    printed = tmp_path / "ir.mlir"
    printed.write_text(str(ir_after(small_shape(), small_machine(), 4, stage, small_plan())))
    golden = GOLDEN / f"{stage.replace('-', '_')}.mlir"
    assert Matcher.from_opts(Options(str(golden), str(printed))).run() == 0


def test_fusing_leaves_one_op_a_wave():
    module = ir_after(small_shape(num_layers=2), small_machine(), 1, "fuse")
    names = [op.name for op in module.body.block.ops if op.name not in ("mk.weight", "mk.vector")]
    layer = ["mk.kv", "mk.fused_linear", "mk.attention", *["mk.fused_linear"] * 3]
    assert names == ["mk.tokens", "mk.embed", *layer, *layer, "mk.fused_linear", "mk.output"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": OpPlan(tile_columns=24)}, r"layers\.0\.qkv: tile_columns must be .* multiple of 16, got 24"),
        ({"gate_up": OpPlan(tile_columns=48)}, "multiple of 32, got 48"),
        ({"head": OpPlan(tile_columns=300)}, "multiple of 256, got 300"),
        ({"o": OpPlan(tile_columns=0)}, "positive multiple of 1, got 0"),
        ({"o": OpPlan(tile_columns=16, num_k_tiles=3)}, "num_k_tiles must be 1 to 2, got 3"),
        ({"attention": OpPlan(tile_columns=1, num_k_tiles=2)}, "num_k_tiles must be 1 to 1"),
        ({"o": OpPlan(tile_columns=32, tile_workers=(0,))}, "one worker for each of its tiles"),
        ({"o": OpPlan(tile_columns=32, tile_workers=(0, 3))}, "worker 3 is not one of 3"),
        ({"mlp": OpPlan(tile_columns=32)}, "unknown roles mlp; roles are embed, qkv"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(changes: dict[str, OpPlan], message: str):
    with pytest.raises(PlanError, match=message):
        compile_program(small_shape(), "f", small_machine(), 4, small_plan(**changes))


def test_a_plan_without_a_role_is_refused():
    plan = small_plan()
    del plan.ops["down"]
    with pytest.raises(PlanError, match="says nothing of down"):
        compile_program(small_shape(), "f", small_machine(), 4, plan)


def test_tiles_run_where_the_plan_says():
    plan = small_plan(
        down=OpPlan(tile_columns=16, num_k_tiles=2, tile_workers=(2, 0, 1, 1, 0, 2, 2, 1)),
        o=OpPlan(tile_columns=16, tile_workers=(2, 2, 0, 2)),
    )
    program = compile_program(small_shape(), "f", small_machine(), 4, plan)
    validate(program)
    placed: dict[tuple[str, Opcode], dict[tuple[int, int], int]] = {}
    for worker, sequence in enumerate(program.workers):
        for i in sequence:
            placed.setdefault((program.ops[i.op].name, i.opcode), {})[i.n0 // 16, i.part] = worker
    assert placed["layers.0.o", Opcode.LINEAR] == {(0, 0): 2, (1, 0): 2, (2, 0): 0, (3, 0): 2}
    assert [placed["layers.0.down", Opcode.LINEAR_PARTIAL][n, k] for n in range(4) for k in range(2)] == [
        2, 0, 1, 1, 0, 2, 2, 1,
    ]  # fmt: skip
    assert placed["layers.0.down", Opcode.REDUCE] == {(0, 0): 2, (1, 0): 1, (2, 0): 0, (3, 0): 2}


def test_runs_are_contiguous_and_equal():
    assert contiguous(7, 3) == (0, 0, 0, 1, 1, 2, 2)
    assert contiguous(2, 4) == (0, 2)


def test_the_first_split_of_each_head_group_has_a_worker_of_its_own():
    workers = dealt(num_tiles=12, num_parts=4, num_workers=4)
    assert workers[::4] == (0, 1, 2)
    assert all(sorted(workers[group : group + 4]) == [0, 1, 2, 3] for group in (0, 4, 8))


@pytest.mark.parametrize(
    ("in_features", "num_k_tiles", "bounds"),
    [(96, 2, (0, 32, 96)), (128, 2, (0, 64, 128)), (10, 3, (0, 3, 6, 10)), (64, 1, (0, 64))],
)
def test_k_tiles_are_whole_quantization_blocks(in_features: int, num_k_tiles: int, bounds: tuple[int, ...]):
    assert k_bounds(in_features, num_k_tiles) == bounds


@pytest.mark.parametrize("num_workers", [2, 3, 5])
def test_every_wait_is_needed(num_workers: int):
    program = compile_program(small_shape(num_layers=2), "f", small_machine(num_workers), 4, small_plan())
    validate(program)
    num_waits = 0
    for worker, sequence in enumerate(program.workers):
        for index, instruction in enumerate(sequence):
            for wait in instruction.waits:
                num_waits += 1
                fewer = tuple(other for other in instruction.waits if other != wait)
                changed = (*sequence[:index], msgspec.structs.replace(instruction, waits=fewer))
                workers = list(program.workers)
                workers[worker] = (*changed, *sequence[index + 1 :])
                with pytest.raises(ScheduleError):
                    validate(msgspec.structs.replace(program, workers=tuple(workers)))
    assert num_waits > 0


def test_one_worker_needs_no_barriers():
    program = compile_program(small_shape(num_layers=2), "f", small_machine(1), 4, small_plan())
    assert program.num_counters == 0
    assert all(not i.waits and i.signal == -1 for i in program.workers[0])
