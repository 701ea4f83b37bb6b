"""`compile --search` on the CPU in hand: the best few plans are built, proved, run and compared."""

from pathlib import Path

import msgspec
import pytest

from megakernel.__main__ import main
from megakernel.build import BuildError, build, find_compiler
from megakernel.default_plan import default_plan
from megakernel.measure import Refinement, can_measure, refine_on_this_cpu
from megakernel.pipeline import decode_program
from megakernel.plan import Plan
from megakernel.plan_search import plans_to_measure
from megakernel.schedule import list_schedule
from megakernel.schedule_error import Hazard, ScheduleError
from megakernel.search_command import bar
from megakernel.step_rows import decode_rows, num_blocks
from tests.megakernel.compiler_cases import cpu_machine
from tests.megakernel.model.model_files import random_tensors, tiny_shape, write_gguf
from tests.tiny_model import tiny_weights

try:
    find_compiler()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)

MACHINE = cpu_machine(2)


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick builds, a cache of this test's own, and no probe."""

    def quick_build(source: str, **options: object) -> Path:
        return build(source, **options | {"extra_flags": ("-O0",)})

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("megakernel.compiled.build", quick_build)
    monkeypatch.setattr("megakernel.__main__.load_machine", lambda _: MACHINE)
    monkeypatch.setattr("megakernel.plan_search.load_average", lambda: 0.2)


def refined(plans: dict[str, Plan], **options: object) -> Refinement:
    weights = tiny_weights()
    return refine_on_this_cpu(plans, weights, "f", MACHINE, 2, split_tokens=16, context_tokens=40, **options)


def test_the_plan_that_measures_fastest_is_taken(monkeypatch: pytest.MonkeyPatch):
    shape, formats = tiny_weights().shape, tiny_weights().formats
    plans = {
        "list": list_schedule(shape, MACHINE, 2, formats, split_tokens=16),
        "default": default_plan(shape, MACHINE, 2, formats),
    }
    seen = []
    found = refined(plans, on_plan=lambda done, of: seen.append((done, of)))
    assert seen == [(0, 2), (1, 2), (2, 2)]
    fastest = min(found.plans, key=lambda plan: plan.measured_us)
    assert [plan.name for plan in found.plans if plan.is_chosen] == [fastest.name]
    assert found.plan == plans[fastest.name]
    assert all(plan.measured_us > 0 and plan.predicted_us > 0 for plan in found.plans)
    # What is known is not measured again, and so the answer stays.
    monkeypatch.setattr("megakernel.measure.measured_us", None)
    assert refined(plans) == found


def test_a_plan_that_is_not_proved_is_never_run(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise ScheduleError(Hazard.RAW, "of this test")

    monkeypatch.setattr("megakernel.measure.validate", refuse)
    monkeypatch.setattr("megakernel.measure.measured_us", None)
    with pytest.raises(ScheduleError, match="of this test"):
        refined({"default": default_plan(tiny_weights().shape, MACHINE, 2, tiny_weights().formats)})


def test_rows_fit_their_pool():
    for rows, context in ((1, 0), (1, 32), (33, 31), (64, 512)):
        made = decode_rows(rows, context)
        assert made.slots.max() < 32 * num_blocks(rows, context)
        assert made.slots.min() >= context
        assert made.block_tables.shape == (rows, max(1, -(-context // 32)))


def test_only_what_a_cpu_runs_is_measured():
    shape = tiny_shape("llama")
    assert can_measure(64, 127, shape)
    assert not can_measure(257, 0, shape)
    assert not can_measure(1, 128, shape)


def test_equal_plans_are_measured_once():
    shape = tiny_shape("llama")
    usual, listed = default_plan(shape, MACHINE, 1), list_schedule(shape, MACHINE, 1)

    class Found(msgspec.Struct):
        plan: Plan
        baseline: Plan
        finalists: tuple[Plan, ...]

    assert list(plans_to_measure(Found(usual, listed, (usual, listed)), usual)) == ["search", "finalist 2"]


def test_a_bar_fills_up():
    assert [bar(done, 4).count("#") for done in range(5)] == [0, 7, 15, 22, 30]


@pytest.mark.slow
def test_the_command_prints_predicted_and_measured_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    shape = tiny_shape("llama", num_layers=1, max_context_tokens=1024)
    write_gguf(tmp_path / "model.gguf", shape, random_tensors(shape))
    command = ["compile", str(tmp_path / "model.gguf"), "--machine", "cpu", "--search", "--out"]
    assert main([*command, str(tmp_path / "program")]) == 0
    said = capsys.readouterr().err
    assert "plans searched" in said
    assert "predicted us   measured us" in said
    assert said.count("<- taken") == 1
    assert "without search" in said
    decode_program((tmp_path / "program").read_bytes())
    # Again: the search and its measurements are known.
    monkeypatch.setattr("megakernel.measure.measured_us", None)
    assert main([*command, str(tmp_path / "again")]) == 0
    assert (tmp_path / "again").read_bytes() == (tmp_path / "program").read_bytes()


def test_a_busy_machine_is_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("megakernel.plan_search.load_average", lambda: 1.7)
    monkeypatch.setattr("megakernel.measure.measured_us", None)
    shape = tiny_shape("llama", num_layers=1, max_context_tokens=1024)
    write_gguf(tmp_path / "model.gguf", shape, random_tensors(shape))
    assert main(["compile", str(tmp_path / "model.gguf"), "--machine", "cpu", "--search"]) == 0
    assert "not measured: other work keeps this machine busy (load average 1.7 on 2 cores)" in (
        capsys.readouterr().err
    )


def test_a_shape_alone_is_searched_but_not_measured(capsys: pytest.CaptureFixture[str]):
    assert main(["compile", "smollm2-135m", "--machine", "cpu", "--search", "--stop-after", "tile"]) == 0
    captured = capsys.readouterr()
    assert "plans searched" in captured.err
    assert "measured us" not in captured.err
    assert "plans searched" not in captured.out
