"""`headrace compile`, and what becomes of a configuration that names its artifacts."""

import itertools
import re
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from cluster.config import config_from_mapping
from headrace.artifacts import executable
from headrace.cli import app
from headrace.execution import ExecutionError
from megakernel.artifact_folder import open_artifact
from megakernel.build import BuildError, build, find_compiler
from megakernel.manifest import WEIGHTS, ArtifactDamagedError, ArtifactMismatchError
from megakernel.model.load import open_model
from megakernel.runtime import Runtime
from megakernel.step_rows import BLOCK_TOKENS, decode_rows
from tests.megakernel.model.model_files import random_tensors, tiny_shape, write_gguf

MODEL = "smollm2-135m-instruct"
PLAN = r"(?P<name>\S.*?) +(?P<predicted_us>\d+) +(?P<measured_us>\d+)(?P<taken>  <- taken)?"
"""A line of what a search measured."""


@pytest.fixture(scope="session")
def model():
    return open_model(MODEL)


@pytest.fixture(scope="session")
def compiled():
    """In the session's cache, which clusters of other tests share."""
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    return CliRunner().invoke(app, ["compile"], env={"COLUMNS": "200"})


@pytest.fixture
def folder(compiled, model):
    return executable(config_from_mapping({}), model).artifacts.decode


def test_it_says_what_it_made(compiled, folder):
    assert compiled.exit_code == 0, compiled.output
    assert str(folder) in compiled.output
    assert MODEL in compiled.output
    assert "MEASURED MS" in compiled.output
    again = CliRunner().invoke(app, ["compile"], env={"COLUMNS": "200"})
    assert again.exit_code == 0
    assert "compiled before" in " ".join(again.output.split())


def test_up_finds_what_was_compiled(compiled, model):
    made = executable(config_from_mapping({}), model)
    assert not made.was_built
    assert made.execution.config.decode.executor == "megakernel"
    assert made.execution.config.model.kv_dtype == "float16"
    open_artifact(folder_of(made)).verify()


def folder_of(made):
    return Path(made.artifacts.decode)


def test_a_shipped_folder_serves_where_there_is_no_compiler(folder, model, tmp_path, monkeypatch):
    shipped = shutil.copytree(folder, tmp_path / "shipped")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.delenv("CXX", raising=False)
    made = executable(config_from_mapping({"model": {"artifact": str(shipped)}}), model)
    assert made.artifacts.decode == str(shipped)
    assert made.execution.config.decode.num_threads == open_artifact(shipped).manifest.num_workers


def test_without_a_compiler_the_cache_serves_or_else_pytorch(folder, model, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert executable(config_from_mapping({}), model).artifacts.decode == folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    made = executable(config_from_mapping({}), model)
    assert (made.artifacts.decode, made.execution.config.decode.executor) == (None, "torch")
    assert "no C++ compiler" in made.execution.obstacle.reason
    with pytest.raises(ExecutionError, match=r"no C\+\+ compiler"):
        executable(config_from_mapping({"decode": {"executor": "megakernel"}}), model)
    failed = CliRunner().invoke(app, ["compile"])
    assert failed.exit_code == 1
    assert "apt-get install g++" in failed.stderr


def test_a_compiler_that_fails_is_pytorch_with_its_words(model, tmp_path, monkeypatch):
    bad = tmp_path / "c++"
    bad.write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo bad 1.0 && exit 0\necho this compiler is broken >&2\nexit 1\n"
    )
    bad.chmod(0o755)
    monkeypatch.setenv("CXX", str(bad))
    made = executable(config_from_mapping({}), model)
    assert made.execution.config.decode.executor == "torch"
    assert made.execution.config.model.kv_dtype == "float32"
    assert "this compiler is broken" in made.execution.obstacle.reason


def test_a_given_folder_that_is_of_no_use_is_an_error(folder, model, tmp_path):
    shipped = shutil.copytree(folder, tmp_path / "shipped")
    config = config_from_mapping({"model": {"artifact": str(shipped)}})
    with pytest.raises(ArtifactMismatchError, match="the model to serve has other"):
        executable(config, msgspec.structs.replace(model, fingerprint="other"))
    with pytest.raises(ArtifactMismatchError, match="KV as float16, wanted is float32"):
        executable(config_from_mapping({"model": {"artifact": str(shipped), "kv_dtype": "float32"}}), model)
    (shipped / WEIGHTS).write_bytes(b"")
    with pytest.raises(ArtifactDamagedError, match=f"{WEIGHTS} has 0 bytes"):
        executable(config, model)


@pytest.fixture
def tiny_model_file(tmp_path):
    shape = tiny_shape("llama", num_layers=1, max_context_tokens=1024)
    write_gguf(tmp_path / "tiny.gguf", shape, random_tensors(shape))
    return tmp_path / "tiny.gguf"


@pytest.fixture
def search(tiny_model_file, tmp_path, monkeypatch):
    """What `compile --search` of a tiny model says at a load average; with a cache of its own."""
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))

    def quick_build(source, **options):
        return build(source, **options | {"extra_flags": ("-O0",)})

    def run(load_average):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr("megakernel.compiled.build", quick_build)  # of the plans that are compared
        monkeypatch.setattr("megakernel.plan_search.load_average", lambda: load_average)
        options = ["--model", str(tiny_model_file), "--threads", "2", "--out", str(tmp_path / "made")]
        said = CliRunner().invoke(app, ["compile", "--search", *options], env={"COLUMNS": "200"})
        assert said.exit_code == 0, said.output
        return said.stdout

    return run


@pytest.mark.slow
def test_a_search_says_what_it_predicted_and_measured_and_its_plan_is_what_runs(search, tmp_path):
    lines = search(load_average=0.1).splitlines()
    found = re.match(
        r"(\d+) plans searched: (\d+) us predicted, (\d+) by list scheduling, at least (\d+)", lines[0]
    )
    evaluations, predicted_us, listed_us, bound_us = map(int, found.groups())
    assert evaluations > 1
    assert 0 < bound_us <= predicted_us <= listed_us
    assert lines[1].split() == ["plan", "predicted", "us", "measured", "us"]
    plans = [re.fullmatch(PLAN, line) for line in itertools.takewhile(re.compile(PLAN).fullmatch, lines[2:])]
    measured_us = [int(plan["measured_us"]) for plan in plans]
    assert len(plans) > 1
    assert all(int(plan["predicted_us"]) > 0 for plan in plans)
    assert [int(plan["measured_us"]) for plan in plans if plan["taken"]] == [min(measured_us)]
    artifact = open_artifact(tmp_path / "made")
    artifact.verify()
    assert artifact.manifest.is_searched
    assert "searched schedule" in lines[2 + len(plans)]
    with Runtime(artifact.load(), 1, BLOCK_TOKENS) as runtime:
        assert np.isfinite(runtime.run(decode_rows(1, 0))).all()


@pytest.mark.slow
def test_a_busy_machine_is_searched_for_but_not_measured(search, tmp_path):
    said = search(load_average=1.7)
    assert "plans searched" in said
    assert "not measured: other work keeps this machine busy (load average 1.7 on 2 cores)" in said
    assert "measured us" not in said
    assert open_artifact(tmp_path / "made").manifest.is_searched


def test_out_writes_the_folder_it_is_given_and_nothing_else(tmp_path):
    (tmp_path / "mine").write_text("precious")
    failed = CliRunner().invoke(app, ["compile", "--out", str(tmp_path)])
    assert failed.exit_code == 1
    assert "holds other files" in failed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_bad_options_are_usage_errors():
    for options in (["--threads", "0"], ["--kv-dtype", "int8"]):
        assert CliRunner().invoke(app, ["compile", *options]).exit_code == 2
