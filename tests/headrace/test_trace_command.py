"""`headrace trace` end to end on a tiny model: a trace, a picture, a table; and what it refuses."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headrace.cli import app
from megakernel.build import BuildError, find_compiler
from tests.megakernel.compiler_cases import cpu_machine
from tests.megakernel.model.model_files import random_tensors, tiny_shape, write_gguf

try:
    find_compiler()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("headrace.trace_step.load_machine", lambda _: cpu_machine(2))
    monkeypatch.setattr("megakernel.compiled.build", quick_build)
    shape = tiny_shape("llama")
    write_gguf(tmp_path / "model.gguf", shape, random_tensors(shape))
    return str(tmp_path / "model.gguf")


def quick_build(source: str, **options: object) -> Path:
    from megakernel.build import build

    return build(source, **options | {"extra_flags": ("-O0",)})


def run(*arguments: str):
    return CliRunner().invoke(app, ["trace", *arguments])


def test_a_step_becomes_a_trace_a_picture_and_a_table(model: str, tmp_path: Path):
    folder = tmp_path / "out"
    done = run("--model", model, "--rows", "3", "--context", "40", "--steps", "5", "--out", str(folder))
    assert done.exit_code == 0, done.output
    assert "median of 5 steps" in done.output
    for word in ("gate_up", "waiting us", "GB/s", "bubbles:", "ui.perfetto.dev"):
        assert word in done.output
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    done_by = {event["tid"] for event in events if event["ph"] == "X"}
    assert done_by == {0, 1}
    assert {"embed", "layers.1.down", "head"} <= {event["name"] for event in events}
    root = ElementTree.parse(folder / "timeline.svg").getroot()
    text = "".join(root.itertext())
    assert "3 rows after 40 tokens" in text
    assert "worker 1" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "257"], "a step has 1 to 256 rows, not 257"),
        (["--context", "4096"], "4096 tokens of context: the model takes 0 to 127"),
    ],
)
def test_what_cannot_be_traced_is_refused_with_the_limit(model: str, options: list[str], message: str):
    done = run("--model", model, *options)
    assert done.exit_code == 1
    assert message in done.output


def test_an_unknown_model_is_one_clear_line():
    done = run("--model", "nothing.gguf")
    assert done.exit_code == 1
    assert "no model at `nothing.gguf`" in done.output
