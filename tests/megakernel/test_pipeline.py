"""From a shape to a frozen program: complete, ordered, deterministic, and from the command line."""

from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.__main__ import main
from megakernel.dialect import parse
from megakernel.machine import load_machine
from megakernel.memory import plan_pages
from megakernel.model.shape import ModelShape
from megakernel.passes.context import PlanError
from megakernel.pipeline import compile_program, decode_program, encode_program, ir_after
from megakernel.plan import OpPlan, Plan
from megakernel.program import Instruction, Opcode, Program, Space, max_splits
from megakernel.schedule_error import Hazard, ScheduleError
from megakernel.shapes import SHAPES
from megakernel.validate import validate
from tests.megakernel.compiler_cases import small_machine, small_plan, small_shape


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    kv_heads = draw(st.integers(1, 4))
    return small_shape(
        num_layers=draw(st.integers(1, 3)),
        hidden_size=draw(st.sampled_from([32, 48, 96, 160])),
        intermediate_size=16 * draw(st.integers(1, 12)),
        num_heads=kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 16, 24, 64])),
        vocab_size=draw(st.integers(1, 1500)),
        max_context_tokens=draw(st.integers(1, 600)),
        has_qkv_bias=draw(st.booleans()),
        has_qk_norm=draw(st.booleans()),
        has_tied_head=draw(st.booleans()),
    )


@st.composite
def plans(draw: st.DrawFn, shape: ModelShape) -> Plan:
    def op(grain: int, k: int = 1) -> OpPlan:
        width, k_tiles = draw(st.integers(1, 5)), draw(st.integers(1, min(k, 3)))
        return OpPlan(tile_columns=grain * width, num_k_tiles=k_tiles)

    def blocks(features: int) -> int:
        return features if features % 32 else features // 32

    hidden, heads = blocks(shape.hidden_size), blocks(shape.num_heads * shape.head_dim)
    return Plan(
        ops={
            "embed": op(8),
            "qkv": op(shape.head_dim, hidden),
            "attention": op(1),
            "o": op(8, heads),
            "gate_up": op(32, hidden),
            "down": op(8, blocks(shape.intermediate_size)),
            "head": op(256, hidden),
        }
    )


def by_op(program: Program) -> dict[str, list[Instruction]]:
    found: dict[str, list[Instruction]] = {op.name: [] for op in program.ops}
    for worker in program.workers:
        for instruction in worker:
            found[program.ops[instruction.op].name].append(instruction)
    return found


def computed_once(program: Program) -> None:
    """Every column of an op, with all its K-tiles or splits, comes from one instruction each."""
    for name, instructions in by_op(program).items():
        op = next(op for op in program.ops if op.name == name)
        cells: Counter[tuple[Opcode, int, int]] = Counter()
        for i in instructions:
            is_attention = i.opcode is Opcode.ATTENTION
            pieces = range(i.part, max_splits(program), i.num_parts) if is_attention else (i.part,)
            cells.update((i.opcode, column, piece) for column in range(i.n0, i.n1) for piece in pieces)
        assert set(cells.values()) == {1}, name
        opcodes = {opcode for opcode, _, _ in cells}
        if Opcode.LINEAR_PARTIAL in opcodes:
            parts = instructions[0].num_parts
            assert opcodes == {Opcode.LINEAR_PARTIAL, Opcode.REDUCE}
            assert len(cells) == op.out_features * (parts + 1)
        elif Opcode.LINEAR in opcodes:
            assert len(cells) == op.out_features
        elif Opcode.ATTENTION in opcodes:
            assert len(cells) == program.geometry.num_kv_heads * max_splits(program)
        else:
            assert len(cells) == program.geometry.hidden_size


def runs_to_the_end(program: Program, order: list[int]) -> None:
    """Steps workers in an order of preference; only waits hold them back."""
    arrived: Counter[int] = Counter()
    at = [0] * len(program.workers)
    while any(position < len(program.workers[worker]) for worker, position in enumerate(at)):
        ready = [
            worker
            for worker in order
            if at[worker] < len(program.workers[worker])
            and all(
                arrived[wait.counter] >= wait.target for wait in program.workers[worker][at[worker]].waits
            )
        ]
        assert ready, "all workers wait"
        instruction = program.workers[ready[0]][at[ready[0]]]
        at[ready[0]] += 1
        arrived[instruction.signal] += 1


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_any_shape_and_plan_compile_to_a_program_that_is_proved(data: st.DataObject):
    shape = data.draw(shapes())
    plan = data.draw(st.none() | plans(shape))
    machine = small_machine(data.draw(st.integers(1, 7)))
    bucket = data.draw(st.sampled_from([1, 4, 64]))
    # Plans are drawn without a thought of scratch memory.
    pages = plan_pages if plan is None else None
    program = compile_program(shape, "f", machine, bucket, plan, split_tokens=64, page_planner=pages)
    computed_once(program)
    runs_to_the_end(program, data.draw(st.permutations(range(machine.num_workers))))
    validate(program, machine)


def test_ops_and_buffers_have_their_names():
    program = compile_program(small_shape(num_layers=2), "f", small_machine(), 4, small_plan())
    layers = [f"layers.{i}.{role}" for i in range(2) for role in ("qkv", "attention", "o", "gate_up", "down")]
    assert [op.name for op in program.ops] == ["embed", *layers, "head"]
    assert {buffer.name: (buffer.space, buffer.columns) for buffer in program.buffers} == {
        "token": (Space.INPUT, 1),
        "hidden": (Space.ACTIVATION, 64),
        "queries": (Space.ACTIVATION, 64),
        "layers.0.kv": (Space.KV, 64),
        "layers.1.kv": (Space.KV, 64),
        "attention": (Space.ACTIVATION, 2 * 4 * 18),
        "mlp": (Space.ACTIVATION, 96),
        "down.parts": (Space.ACTIVATION, 128),
        "logits": (Space.OUTPUT, 700),
        "head_stats": (Space.OUTPUT, 9),
    }


def test_ops_name_their_weights():
    program = compile_program(small_shape(), "f", small_machine(), 4, small_plan())
    ops = {op.name.rpartition(".")[2]: op for op in program.ops}
    assert ops["embed"].weights == ("embed",)
    assert ops["qkv"].weights == ("layers.0.q", "layers.0.k", "layers.0.v")
    assert ops["qkv"].biases == ("layers.0.q_bias", "layers.0.k_bias", "layers.0.v_bias")
    assert ops["qkv"].head_norms == ("layers.0.q_norm", "layers.0.k_norm")
    assert ops["gate_up"].weights == ("layers.0.gate", "layers.0.up")
    assert (ops["gate_up"].norm, ops["head"].norm) == ("layers.0.mlp_norm", "final_norm")
    assert ops["head"].weights == ("embed",)


def test_equal_inputs_give_equal_bytes_that_decode_to_the_program():
    first, second = (compile_program(small_shape(), "f", small_machine(), 4, small_plan()) for _ in range(2))
    assert encode_program(first) == encode_program(second)
    assert decode_program(encode_program(first)) == second


def test_bytes_that_are_no_program_are_refused():
    with pytest.raises(msgspec.DecodeError):
        decode_program(b"\x80")


@pytest.mark.parametrize("bucket", [0, 4097])
def test_a_bucket_out_of_bounds_is_refused(bucket: int):
    with pytest.raises(PlanError, match="a bucket has 1 to 4096 rows"):
        compile_program(small_shape(), "f", small_machine(), bucket)


def test_an_unknown_pass_is_named():
    with pytest.raises(ValueError, match="no pass is called `fold`; there are graph, fuse, tile"):
        ir_after(small_shape(), small_machine(), 1, "fold")


def test_compiling_leaves_the_cached_graph_as_it_was():
    before = compile_program(small_shape(), "f", small_machine(), 1, small_plan())
    compile_program(small_shape(), "f", small_machine(2), 64, small_plan(down=OpPlan(tile_columns=16)))
    assert compile_program(small_shape(), "f", small_machine(), 1, small_plan()) == before


def test_a_full_model_compiles_for_a_whole_gpu():
    program = compile_program(SHAPES["qwen3-1.7b"], "f", load_machine("l20"), 1)
    assert len(program.workers) == 92
    whole = [[i for i in worker if i.opcode is not Opcode.LINEAR_ACCUMULATE] for worker in program.workers]
    tiles = [Counter((i.op, i.opcode) for i in worker) for worker in whole]
    for wave in {wave for worker in tiles for wave in worker}:
        shares = [worker[wave] for worker in tiles]
        assert max(shares) - min(shares) <= 1


def test_the_command_prints_a_summary_and_writes_the_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "program"
    assert main(["compile", "smollm2-135m", "--machine", "l4", "--bucket", "8", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    program = decode_program(out.read_bytes())
    assert program.bucket == 8
    assert "ops           152" in printed
    assert f"counters      {program.num_counters}" in printed
    assert "proved        no deadlock, no race in" in printed


def test_the_command_writes_nothing_that_is_not_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise ScheduleError(Hazard.RAW, "of this test")

    monkeypatch.setattr("megakernel.__main__.validate", refuse)
    out = tmp_path / "program"
    assert main(["compile", "smollm2-135m", "--machine", "l4", "--out", str(out)]) == 2
    assert not out.exists()


def test_the_command_reports_scratch_memory_and_time(capsys: pytest.CaptureFixture[str]):
    assert main(["compile", "smollm2-135m", "--machine", "l20", "--report"]) == 0
    printed = capsys.readouterr().out
    assert "gate_up" in printed
    assert "stages" in printed


def test_the_command_prints_the_ir_of_a_pass(capsys: pytest.CaptureFixture[str]):
    assert main(["compile", "smollm2-135m", "--machine", "l4", "--stop-after", "tile"]) == 0
    assert "tile_columns" in str(parse(capsys.readouterr().out))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.gguf"], "no model at `nothing.gguf`"),
        (["smollm2-135m", "--machine", "l5"], "unknown machine 'l5'"),
        (["smollm2-135m", "--machine", "l4", "--stop-after", "fold"], "no pass is called `fold`"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["compile", *arguments]) == 2
    assert message in capsys.readouterr().err
