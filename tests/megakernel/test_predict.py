"""Predictions: figures against bytes counted by hand, text against JSON, and what is wrong named."""

import io
import math
from contextlib import redirect_stdout
from itertools import pairwise, product
from pathlib import Path

import msgspec
import pytest

from megakernel.__main__ import main
from megakernel.artifact import packed_formats
from megakernel.graph import uniform_formats, usual_formats
from megakernel.machine import Machine, load_machine
from megakernel.predict import Prediction, Question, predict
from megakernel.predict_assumptions import LABEL, assumptions_of
from megakernel.predict_text import shown
from megakernel.report import kib
from megakernel.schedule import fewest_k_tiles, list_schedule
from megakernel.search import SearchResult
from megakernel.shapes import SHAPES
from tests.megakernel.model.model_files import tiny_shape

SMOLLM = SHAPES["smollm2-135m"]
SMALL_L20 = msgspec.structs.replace(load_machine("l20"), name="small", num_workers=12, bandwidth_gb_s=113.0)
BATCHES, CONTEXTS = (1, 3, 9), (64, 512)


@pytest.fixture(scope="module")
def machine_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("machines") / "small.json"
    path.write_bytes(msgspec.json.encode(SMALL_L20))
    return path


@pytest.fixture(scope="module")
def printed(machine_file: Path) -> tuple[str, Prediction]:
    """What the command prints, and what it writes."""
    written = machine_file.with_name("prediction.json")
    lists = ["--batch", "9,1,3,1", "--context", "512,64"]
    output = io.StringIO()
    with redirect_stdout(output):
        arguments = [
            "--machine",
            str(machine_file),
            "--model",
            "smollm2-135m",
            *lists,
            "--json",
            str(written),
        ]
        assert main(["predict", *arguments]) == 0
    return output.getvalue(), msgspec.json.decode(written.read_bytes(), type=Prediction)


def question(machine: Machine = SMALL_L20, **changes: object) -> Question:
    shape = tiny_shape("qwen3", num_layers=2)
    asked = Question(
        model="tiny",
        shape=shape,
        formats=packed_formats(shape, usual_formats(shape), "cuda"),
        machine=machine,
        batches=(1, 2),
        contexts=(16, 64),
    )
    return msgspec.structs.replace(asked, **changes)


def test_every_batch_and_context_is_there_once_ascending(printed):
    _, prediction = printed
    cells = [(step.batch, step.context_tokens) for step in prediction.steps]
    assert cells == list(product(BATCHES, CONTEXTS))
    assert [schedule.batch for schedule in prediction.schedules] == list(BATCHES)


def test_more_rows_and_more_context_take_longer(printed):
    _, prediction = printed
    steps = {(step.batch, step.context_tokens): step for step in prediction.steps}
    for batch in BATCHES:
        for near, far in pairwise(CONTEXTS):
            assert steps[batch, near].predicted_ms < steps[batch, far].predicted_ms
    for context in CONTEXTS:
        for few, many in pairwise(BATCHES):
            assert steps[few, context].predicted_ms < steps[many, context].predicted_ms


def test_no_step_is_faster_than_its_bound(printed):
    _, prediction = printed
    for step in prediction.steps:
        assert step.predicted_ms >= step.bound_ms > 0
        assert step.ratio == pytest.approx(step.predicted_ms / step.bound_ms, abs=0.01)
        assert 0 < step.bubble_share < 1


def test_the_bound_is_the_bytes_of_packed_weights_and_kv(printed):
    """SmolLM2-135M by hand: Q4_1 has 20 bytes for 32 weights, Q8_0 34."""
    _, prediction = printed
    layer = 576 * (576 + 2 * 192) + 576 * 576 + 3 * 576 * 1536
    for step in prediction.steps:
        embedding_rows = step.batch * 576 * 34 // 32
        assert step.weight_bytes == 30 * layer * 20 // 32 + 49152 * 576 * 34 // 32 + embedding_rows
        assert step.kv_bytes == step.batch * step.context_tokens * 30 * 2 * 3 * 64 * 2
        assert step.bound_ms == pytest.approx((step.weight_bytes + step.kv_bytes) / 113.0e6, abs=1e-4)


def test_text_and_json_have_the_same_figures(printed):
    text, prediction = printed
    lines = [line.split() for line in text.splitlines()]
    for step in prediction.steps:
        assert [
            str(step.batch),
            str(step.context_tokens),
            f"{step.predicted_ms:.3f}",
            f"{step.bound_ms:.3f}",
            f"{step.ratio:.2f}",
            f"{100 * step.bubble_share:.1f}%",
            f"{step.weight_bytes / 1e6:.1f}",
            f"{step.kv_bytes / 1e6:.1f}",
        ] in lines
    for schedule in prediction.schedules:
        rows = (("list-scheduled", schedule.planned), ("fewest K-tiles", schedule.least_split))
        for name, figures in rows:
            (row,) = (line for line in lines if line[:-6] == [str(schedule.batch), *name.split()])
            assert row[-4:] == [
                *kib(figures.peak_bytes).split(),
                f"{100 * figures.bubble_share:.1f}%",
                f"{figures.predicted_ms:.3f}",
            ]
    assert text.endswith("\n".join(prediction.assumptions) + "\n")


def test_every_assumption_is_called_one(printed):
    _, prediction = printed
    assert all(line.startswith(LABEL) for line in prediction.assumptions)
    told = " ".join(prediction.assumptions)
    for word in (
        *("bandwidth: 113 GB/s", "load latency: 0.7 us", "sync cost: 1 us", "instruction cost: 0.2 us"),
        *("mma rate: Q4_1 649,457, Q8_0 649,457", "attention rate: 325,000", "host: no time"),
        *("weights: Q4_1 (down, gate, k, o, q, up, v), Q8_0 (embed)", "schedule: list-scheduled"),
    ):
        assert word in told


def test_schedules_keep_to_the_scratch_memory(printed):
    _, prediction = printed
    for schedule in prediction.schedules:
        for figures in (schedule.planned, schedule.least_split):
            assert SMALL_L20.reserved_bytes < figures.peak_bytes <= SMALL_L20.scratch_bytes
            assert figures.stages.keys() == {"qkv", "o", "gate_up", "down", "head"}
        assert schedule.tiles.split_bytes <= schedule.tiles.whole_bytes
        assert schedule.tiles.split_stages >= schedule.tiles.whole_stages
        at_512 = next(
            step for step in prediction.steps if (step.batch, step.context_tokens) == (schedule.batch, 512)
        )
        assert schedule.planned.predicted_ms == at_512.predicted_ms


def test_a_prediction_survives_json():
    prediction = predict(question(), ("assumption: none",))
    assert msgspec.json.decode(msgspec.json.encode(prediction), type=Prediction) == prediction
    assert prediction == predict(question(), ("assumption: none",))


def test_a_longer_context_than_usual_judges_short_models_at_their_own():
    shape = question().shape
    assert question().schedule_context == min(512, shape.max_context_tokens)
    short = msgspec.structs.replace(shape, max_context_tokens=40)
    assert question(shape=short).schedule_context == 40


def test_a_gpu_takes_k_whole():
    shape, machine = SHAPES["qwen3-1.7b"], load_machine("l20")
    assert set(fewest_k_tiles(shape, machine, 16).values()) == {1}
    plan = list_schedule(shape, machine, 16)
    assert {plan.ops[role].num_k_tiles for role in fewest_k_tiles(shape, machine, 16)} == {1}


def test_a_format_for_all_matrices_counts_as_it_is_packed():
    shape = question().shape
    bytes_by_format = {}
    for name in ("W4G128", "Q8_0", "BF16", "F32"):
        stored = uniform_formats(shape, name)
        packed = packed_formats(shape, stored, "cuda")
        asked = question(formats=packed, batches=(1,), contexts=(16,))
        (step,) = predict(asked).steps
        bytes_by_format[name] = step.weight_bytes
        told = [line for line in assumptions_of(asked, stored) if line.startswith(f"{LABEL}packing: ")]
        assert told == (
            [f"{LABEL}packing: F32 matrices are packed as BF16, and count as that"] * (name == "F32")
        )
    assert bytes_by_format["W4G128"] < bytes_by_format["Q8_0"] < bytes_by_format["BF16"]
    assert bytes_by_format["F32"] == bytes_by_format["BF16"]


def test_a_search_is_made_within_its_budget_and_said_so(monkeypatch: pytest.MonkeyPatch):
    asked = question(search_s=7.5, batches=(2,), contexts=(16,))
    baseline = list_schedule(asked.shape, asked.machine, 2, asked.formats)
    down = baseline.ops["down"]
    assert down.tile_workers is not None
    alone = msgspec.structs.replace(down, tile_workers=(0,) * len(down.tile_workers))
    found = msgspec.structs.replace(baseline, ops=baseline.ops | {"down": alone})
    budgets = []

    def search(*arguments: object, **options: object) -> SearchResult:
        budgets.append(options["budget"])
        return SearchResult(
            plan=found,
            baseline=baseline,
            finalists=(found,),
            predicted_us=1.0,
            baseline_us=1.0,
            bandwidth_bound_us=1.0,
            evaluations=17,
            is_complete=True,
        )

    monkeypatch.setattr("megakernel.predict.search", search)
    searched = predict(asked)
    assert [budget.seconds for budget in budgets] == [7.5]
    listed = predict(msgspec.structs.replace(asked, search_s=0.0))
    assert searched.steps[0].predicted_ms > listed.steps[0].predicted_ms  # one worker has all of down
    assert len(budgets) == 1
    assert "searched, 17 plans" in shown(searched)
    assert [schedule.num_searched for schedule in (*searched.schedules, *listed.schedules)] == [17, None]
    (line,) = (line for line in assumptions_of(asked, asked.formats) if "schedule:" in line)
    assert "searched, up to 7.5 s a batch" in line


def test_a_machine_that_is_slower_takes_longer():
    half = msgspec.structs.replace(SMALL_L20, bandwidth_gb_s=SMALL_L20.bandwidth_gb_s / 1024)
    for fast, slow in zip(predict(question()).steps, predict(question(half)).steps, strict=True):
        assert slow.predicted_ms > fast.predicted_ms
        assert slow.bound_ms == pytest.approx(1024 * fast.bound_ms, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"--model": "qwen3-1.7"},
            "unknown model 'qwen3-1.7', did you mean 'qwen3-1.7b'?; known are smollm2-135m,",
        ),
        ({"--machine": "l5"}, "unknown machine 'l5'; known are cpu, h100, h100-ada, h200, l20, l4, rtx4090"),
        ({"--machine": "nowhere.json"}, "cannot read the machine file 'nowhere.json'"),
        ({"--format": "Q4_2"}, "unknown format 'Q4_2', did you mean 'Q4_"),
        ({"--format": "bf16"}, "unknown format 'bf16', did you mean 'BF16'?; known are F32,"),
        ({"--batch": "0"}, "--batch: 0 rows; kernels of l20 take 1 to 64"),
        ({"--batch": "1,-2"}, "--batch: -2 rows"),
        ({"--batch": "65"}, "--batch: 65 rows; kernels of l20 take 1 to 64"),
        ({"--batch": "1;2"}, "--batch: '1;2' is no whole number; give rows such as 1,2,4"),
        ({"--batch": "1,"}, "--batch: '' is no whole number"),
        ({"--context": "8193"}, "--context: 8193 tokens; smollm2-135m take 1 to 8192"),
        ({"--context": "0"}, "--context: 0 tokens"),
        ({"--search": "-1"}, "--search: -1 seconds; give 0 (list scheduling) or more"),
        ({"--search": str(math.inf)}, "--search: inf seconds"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]):
    options = {"--machine": "l20", "--model": "smollm2-135m", "--batch": "1"} | changes
    assert main(["predict", *(f"{name}={value}" for name, value in options.items())]) == 2
    assert message in capsys.readouterr().err


def test_a_machine_without_room_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cramped = msgspec.structs.replace(SMALL_L20, scratch_bytes=SMALL_L20.reserved_bytes + 2048)
    path = tmp_path / "cramped.json"
    path.write_bytes(msgspec.json.encode(cramped))
    assert main(["predict", "--machine", str(path), "--model", "smollm2-135m"]) == 2
    assert "no tile of" in capsys.readouterr().err
