import re

import msgspec
import pytest

from megakernel.cost import simulate
from megakernel.machine import load_machine
from megakernel.memory import ScratchError
from megakernel.pipeline import compile_program
from megakernel.plan import OpPlan, Plan
from megakernel.report import compile_report, peak_bytes, role_rows, split_rows
from megakernel.schedule import list_schedule
from megakernel.shapes import SHAPES
from tests.megakernel.model.model_files import tiny_shape

L20 = load_machine("l20")
QWEN = SHAPES["qwen3-1.7b"]


@pytest.mark.parametrize("bucket", [1, 16])
def test_k_splitting_halves_the_peak_of_qwen3_on_an_l20(bucket):
    rows = split_rows(QWEN, L20, bucket, list_schedule(QWEN, L20, bucket))
    assert [row.role for row in rows] == ["qkv", "o", "gate_up", "down", "head"]
    whole, split = peak_bytes(row.whole for row in rows), peak_bytes(row.split for row in rows)
    assert split <= 0.5 * whole
    assert split <= L20.scratch_bytes
    for row in rows:
        assert row.split_stages >= max(2, row.whole_stages)
        assert row.split.output_bytes == row.whole.output_bytes


def test_a_tile_of_one_stage_has_three_in_blocks_of_half_of_k():
    plan = list_schedule(QWEN, L20, 1)
    narrow = Plan(ops=plan.ops | {"gate_up": OpPlan(tile_columns=32, load_k=1024)})
    (gate_up,) = (row for row in split_rows(QWEN, L20, 1, narrow) if row.role == "gate_up")
    assert (gate_up.whole_stages, gate_up.split_stages, gate_up.num_k_tiles) == (1, 3, 2)


def test_the_report_of_a_small_model_says_all_of_it():
    shape = tiny_shape("llama", num_layers=2)
    machine = msgspec.structs.replace(L20, num_workers=4)
    plan = list_schedule(shape, machine, 2)
    program = compile_program(shape, "f", machine, 2, plan)
    trace = simulate(program, machine)
    text = compile_report(shape, machine, program, plan, baseline_us=2 * trace.makespan_us)
    assert "99.0 KiB, bucket 2" in text
    assert f"{trace.makespan_us:.0f} us" in text
    assert "the search takes 50.0% off" in text
    assert "Bandwidth bound" in text
    assert re.search(
        r"Predicted bubbles: \d+\.\d% of the workers' time\n  \d+ waits for other workers before", text
    )
    assert "list scheduling" not in compile_report(shape, machine, program, plan)


def test_role_rows_account_for_every_instruction_and_byte():
    shape = tiny_shape("qwen2", num_layers=2)
    machine = msgspec.structs.replace(L20, num_workers=4)
    program = compile_program(shape, "f", machine, 1, list_schedule(shape, machine, 1))
    trace = simulate(program, machine)
    rows = role_rows(program, machine, trace)
    assert sum(row.num_instructions for row in rows) == sum(map(len, program.workers))
    (down,) = (row for row in rows if row.role == "down")
    assert down.load_bytes == 2 * shape.hidden_size * shape.intermediate_size * 5 / 8
    assert all(0 < row.span_us <= trace.makespan_us for row in rows)


def test_a_plan_without_room_has_no_report():
    machine = msgspec.structs.replace(L20, scratch_bytes=L20.reserved_bytes + 1024)
    with pytest.raises(ScratchError):
        list_schedule(QWEN, machine, 1)
