"""What the command line says and how it exits; whole clusters are in tests/e2e."""

import pytest
from typer.testing import CliRunner

from headrace import __version__
from headrace.cli import app

USAGE = 2


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments, **options):
        return CliRunner().invoke(app, arguments, **options)

    return run


def test_version(run):
    assert run("version").output.strip() == __version__


def test_without_a_command_all_are_listed(run):
    output = run().output
    assert all(command in output for command in ("up", "down", "status", "chat", "doctor"))


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("[router]\nhttp_prot = 1", "did you mean `router.http_port`?"),
        ("[rooter]\nhttp_port = 1", "did you mean `router`?"),
        ("[router]\nhttp_port = 70000", "<= 65535"),
        ("[decode]\nexecutor = 'fast'", "executor"),
        ("not toml", "not valid TOML"),
    ],
)
def test_a_bad_configuration_is_one_clear_line(run, tmp_path, toml, expected):
    path = tmp_path / "config.toml"
    path.write_text(toml)
    result = run("up", "--config", str(path))
    assert result.exit_code == USAGE
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")


def test_a_missing_configuration_is_named(run, tmp_path):
    result = run("doctor", "--config", str(tmp_path / "none.toml"))
    assert result.exit_code == USAGE
    assert "none.toml" in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--http-port", "99999"),
        ("--http-port", "http"),
        ("--decode-replicas", "0"),
        ("--prefill-replicas", "-1"),
        ("--executor", "magic"),
        ("--no-such-option",),
    ],
)
def test_bad_options_are_usage_errors(run, tmp_path, options):
    result = run("up", *options)
    assert result.exit_code == USAGE
    assert "Traceback" not in result.output
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("command", [("status",), ("chat", "hello")])
def test_without_a_cluster_the_way_to_one_is_named(run, command):
    result = run(*command)
    assert result.exit_code == 1
    assert "headrace up" in result.stderr


def test_down_with_nothing_up_is_fine(run, tmp_path):
    result = run("down")
    assert result.exit_code == 0
    assert result.output.strip() == "nothing is up"
    assert not (tmp_path / "home").exists()


def test_chat_needs_something_to_say(run):
    result = run("chat", "--url", "http://127.0.0.1:9", "--model", "m", input="  \n")
    assert result.exit_code == USAGE
    assert "empty" in result.stderr
    assert run("chat", "hi", "--url", "http://127.0.0.1:9").exit_code == USAGE


def test_chat_with_nobody_there(run):
    result = run("chat", "hi", "--url", "http://127.0.0.1:9", "--model", "m")
    assert result.exit_code == 1
    assert "127.0.0.1:9" in result.stderr


def test_doctor_fails_for_a_model_that_is_not_there(run):
    result = run("doctor", "--model", "/no/such/model.gguf", "--http-port", "0", "--grpc-port", "0")
    assert result.exit_code == 1
    line = next(line for line in result.output.splitlines() if line.startswith("problem"))
    assert "/no/such/model.gguf" in line
