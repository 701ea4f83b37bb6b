"""What a traced step says, of clocks that do not agree: known times are found again."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import gpu_trace
from benchmarks.gpu_decode import decode_rows
from benchmarks.gpu_memory import host_view, opened
from benchmarks.gpu_steps import num_blocks_of
from benchmarks.gpu_table import Cell
from benchmarks.gpu_trace import (
    BEGUN,
    LANDED,
    MULTIPLIED,
    SIGNALLED,
    STAGED,
    TRACE_FLAGS,
    WAITED,
    Trace,
    figures_of,
    inner_layers,
    phases,
    read_trace,
    runs_of,
    shown,
)
from megakernel.cuda_arguments import TRACE_EVENTS, TRACE_ROLES
from megakernel.emulation import build_emulation
from megakernel.program import Opcode
from tests.megakernel.compilers import needs_compiler
from tests.megakernel.emulated_model import toy_gpu
from tests.megakernel.fake_cuda import FakeDriver, emulated
from tests.megakernel.test_gpu_parts import tiny_shape
from tests.megakernel.test_gpu_reference import compiled_for

CYCLES_A_US = 1500.0
STEP_US = 200.0
WAIT_US, STAGE_US, LAND_US, WORK_US, SIGNAL_US, AHEAD_US = 3.0, 0.5, 0.25, 2.0, 0.4, 5.0


@pytest.fixture(scope="module")
def program():
    return compiled_for(tiny_shape(), "Q4_0", (4,))[0].programs[0]


def true_times(program, late_us=0.0):
    """[SMs, roles, instructions, events]: op after op, the same on every SM; SM 0 comes `late_us` later to
    its waits, and goes on as much later."""
    count = max(len(worker) for worker in program.workers)
    us = np.full((len(program.workers), TRACE_ROLES, count, TRACE_EVENTS), np.nan)
    for run in runs_of(program):
        at = 20.0 + run.op * 8.0
        late = late_us if run.sm == 0 else 0.0
        if any(instruction.waits for instruction in program.workers[run.sm][run.first : run.end]):
            us[run.sm, 0, run.first, BEGUN] = at - WAIT_US if not late else at + late - 0.5
        else:
            us[run.sm, 0, run.first, BEGUN] = at + late
        us[run.sm, 0, run.first, WAITED] = at + late
        us[run.sm, 1, run.first : run.end, BEGUN] = at - AHEAD_US
        us[run.sm, 1, run.first : run.end, WAITED] = at - AHEAD_US + 1.0
        us[run.sm, 0, run.first, STAGED] = at + late + STAGE_US
        us[run.sm, 0, run.first, LANDED] = at + late + STAGE_US + LAND_US
        us[run.sm, 0, run.end - 1, MULTIPLIED] = at + late + STAGE_US + LAND_US + WORK_US
        us[run.sm, 0, run.end - 1, SIGNALLED] = at + late + STAGE_US + LAND_US + WORK_US + SIGNAL_US
    return us


def words_of(us, seed=0):
    """As SMs tell it whose clocks began at random, beside one of microseconds."""
    rng = np.random.default_rng(seed)
    num_sms, roles, count, events = us.shape
    begins = rng.integers(0, 2**32, num_sms)
    words = np.zeros((num_sms, roles, count + 1, events), dtype=np.uint32)
    for sm in range(num_sms):

        def cycles(at_us, sm=sm):
            return (begins[sm] + np.round(at_us * CYCLES_A_US).astype(np.int64)) % 2**32

        told = ~np.isnan(us[sm])
        words[sm, :, :count][told] = cycles(us[sm][told])
        for role, (begun_us, ended_us) in enumerate(((5.0 + sm * 0.1, STEP_US), (4.0, STEP_US - 20.0))):
            for word, at_us in ((0, begun_us), (2, ended_us)):
                words[sm, role, count, word] = cycles(np.array(at_us))
                words[sm, role, count, word + 1] = (2**32 - 3000 + int(at_us) * 1000) % 2**32
    return words


def test_a_program_is_runs_of_ops(program):
    runs = list(runs_of(program))
    for sm, worker in enumerate(program.workers):
        own = [run for run in runs if run.sm == sm]
        assert [run.first for run in own] == [0, *(run.end for run in own[:-1])]
        assert own[-1].end == len(worker)
        for run in own:
            assert {instruction.op for instruction in worker[run.first : run.end]} == {run.op}


def test_known_times_are_found_again(program):
    us = true_times(program)
    trace = read_trace(program, words_of(us))
    assert trace.cycles_a_us == pytest.approx(CYCLES_A_US, rel=1e-2)
    scale = trace.cycles_a_us / CYCLES_A_US
    found = trace.us * scale + np.nanmin(us)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(us))
    np.testing.assert_allclose(found, us, rtol=0, atol=0.01)
    assert trace.misaligned_us < 0.01


def test_clocks_are_aligned_beside_an_sm_that_comes_late(program):
    """It looks at its counters after the last arrival: what it saw then aligns nothing."""
    us = true_times(program, late_us=0.25)
    trace = read_trace(program, words_of(us))
    others = trace.us[1:] * trace.cycles_a_us / CYCLES_A_US
    np.testing.assert_allclose(others - np.nanmin(others), us[1:] - np.nanmin(us[1:]), rtol=0, atol=0.01)


def test_phases_are_between_events(program):
    us = true_times(program)
    trace = Trace(program=program, us=us, cycles_a_us=CYCLES_A_US, misaligned_us=0.0)
    found = phases([trace, trace], range(tiny_shape().num_layers))
    qkv = found["qkv"]
    assert qkv["sms"] == len(
        {run.sm for run in runs_of(program) if program.ops[run.op].name == "layers.0.qkv"}
    )
    expected = {
        "span": STAGE_US + LAND_US + WORK_US + SIGNAL_US,
        "skew": 0.0,
        "wait": WAIT_US,
        "stage": STAGE_US,
        "land": LAND_US,
        "land_max": LAND_US,
        "work": WORK_US,
        "signal": SIGNAL_US,
        "body": STAGE_US + LAND_US + WORK_US + SIGNAL_US,
        "load_ahead": AHEAD_US,
        "issued_ahead": AHEAD_US - 1.0,
    }
    assert {name: qkv[name] for name in expected} == pytest.approx(expected)
    assert found["embed"]["wait"] == pytest.approx(0.0)


def test_what_was_not_told_is_left_out(program):
    us = true_times(program)
    for run in runs_of(program):
        if program.workers[run.sm][run.first].opcode is Opcode.ATTENTION:
            us[run.sm, :, run.first : run.end, STAGED : MULTIPLIED + 1] = np.nan
            us[run.sm, 1, run.first : run.end] = np.nan
    trace = Trace(program=program, us=us, cycles_a_us=CYCLES_A_US, misaligned_us=0.0)
    found = phases([trace], [0])
    assert np.isnan(found["attention"]["work"])
    assert found["attention"]["body"] == pytest.approx(STAGE_US + LAND_US + WORK_US + SIGNAL_US)
    figures = figures_of(Cell("tiny", 4, 20), "Q4_0", found)
    assert figures["trace_Q4_0_tiny_batch4_ctx20_qkv_work_us"] == pytest.approx(WORK_US)
    assert figures["trace_Q4_0_tiny_batch4_ctx20_qkv_sms"] == found["qkv"]["sms"]
    assert "trace_Q4_0_tiny_batch4_ctx20_attention_work_us" not in figures
    json.dumps(figures, allow_nan=False)
    lines = {line.split()[0]: line.split()[1:] for line in shown(found).splitlines()}
    assert lines["attention"][lines["op"].index("work")] == "-"
    assert len({len(line) for line in shown(found).splitlines()}) == 1


def test_layers_with_the_same_neighbours_are_averaged():
    assert list(inner_layers(28)) == list(range(1, 27))
    assert list(inner_layers(2)) == [0, 1]


@needs_compiler
def test_emulated_kernels_tell_all_of_their_instructions():
    compiled, source = compiled_for(tiny_shape(), "Q8_0", (4,))
    driver = FakeDriver(emulated(build_emulation(source, extra_flags=TRACE_FLAGS)))
    with opened(compiled, 4 * num_blocks_of(20), driver=driver, view=host_view) as runtime:
        rows = decode_rows(runtime, Cell("tiny", 4, 20))
        (trace,) = gpu_trace.traced(runtime, rows, 1)
        again = runtime.trace(rows)
        assert len(runtime.launch_ms(rows, 1)) == 1
    assert again.any(axis=(1, 2, 3)).all()
    for run in runs_of(trace.program):
        own = trace.us[run.sm, 0, run.first : run.end]
        assert own[0, BEGUN] < own[0, WAITED]
        assert np.isnan(own[-1, SIGNALLED]) or own[0, WAITED] < own[-1, SIGNALLED]
    found = phases([trace], inner_layers(tiny_shape().num_layers))
    for op in ("qkv", "o", "gate_up", "down", "head"):
        for name in ("wait", "stage", "land", "work", "body"):
            assert found[op][name] >= 0, (op, name)
    assert found["attention"]["body"] > 0


@needs_compiler
def test_the_command_shows_and_keeps_phases(monkeypatch, tmp_path, capsys):
    compiled, source = compiled_for(tiny_shape(), "Q4_0", (2,))
    asked = []

    def compile_model(model, machine, *, extra_flags):
        asked.append((model.name, extra_flags))
        return SimpleNamespace(compiled=compiled, resource_problem=None)

    def opened_here(compiled, num_blocks):
        driver = FakeDriver(emulated(build_emulation(source, extra_flags=TRACE_FLAGS)))
        return opened(compiled, num_blocks, driver=driver, view=host_view)

    monkeypatch.setattr(gpu_trace, "open_driver", FakeDriver)
    monkeypatch.setattr(gpu_trace, "pick_machine", lambda facts, path: toy_gpu())
    monkeypatch.setattr(gpu_trace, "compile_model", compile_model)
    monkeypatch.setattr(gpu_trace, "opened", opened_here)
    monkeypatch.setattr(gpu_trace, "SHAPES", {"tiny": tiny_shape()})
    monkeypatch.setattr(gpu_trace, "TRACES_QUICK", 2)
    monkeypatch.setattr(gpu_trace, "STEPS_QUICK", 1)
    path = tmp_path / "trace.json"
    monkeypatch.setattr("sys.argv", ["x", "tiny", "Q4_0", "2", "20", "--quick", "--json", str(path)])
    gpu_trace.main()
    assert asked == [("tiny_Q4_0_rows2", ("-DHEADRACE_TRACE=1",))]
    said = capsys.readouterr().out
    assert "tiny_batch2_ctx20, Q4_0: 1.000 ms a step as traced" in said
    found = json.loads(path.read_text())
    assert found["runs"] == 2
    assert found["figures"]["trace_Q4_0_tiny_batch2_ctx20_qkv_work_us"] > 0
    assert found["machine"]["planned_for"] == "toy"


@needs_compiler
def test_kernels_without_a_trace_write_none():
    compiled, source = compiled_for(tiny_shape(), "Q8_0", (4,))
    driver = FakeDriver(emulated(build_emulation(source)))
    with opened(compiled, 4 * num_blocks_of(20), driver=driver, view=host_view) as runtime:
        assert not runtime.trace(decode_rows(runtime, Cell("tiny", 4, 20))).any()
