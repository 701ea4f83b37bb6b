"""A cluster comes up, says so, and goes without a trace, whoever ends it and however."""

import os
import signal
import subprocess
import threading
import time

import pytest

from headrace.probe import is_ready
from megakernel.artifact_folder import open_artifact
from tests.e2e.local_cluster import DOWN_TIMEOUT_S, FASTEST, UP_TIMEOUT_S, LocalCluster

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(UP_TIMEOUT_S + 2 * DOWN_TIMEOUT_S)]


def start_in_foreground(cluster: LocalCluster, *options: str) -> "subprocess.Popen[str]":
    """Returns when it is ready; keeps reading what it prints, or it would block."""
    process = cluster.start("up", *cluster.ports, *FASTEST, *options)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("ready in"):
            threading.Thread(target=process.stdout.read, daemon=True).start()
            cluster.remember_session()
            return process
    raise AssertionError("".join(lines))


def test_commands_around_a_running_cluster(cluster):
    again = cluster.run("up", "--detach", *cluster.ports)
    assert again.returncode == 0
    assert "already up" in again.stdout

    elsewhere = cluster.run("up", "--http-port", str(cluster.http_port + 7))
    assert elsewhere.returncode == 2
    assert cluster.http_url in elsewhere.stderr

    status = cluster.run("status")
    assert status.returncode == 0, status.stderr
    assert status.stdout.count("accepting") == 2
    assert status.stdout.rstrip().endswith("ready")

    doctor = cluster.run("doctor")
    assert "a cluster of yours is up" in doctor.stdout


def test_chat_answers_an_argument_and_standard_input(cluster):
    answer = cluster.run("chat", "Say hello.", "--max-tokens", "8", "--seed", "1")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()
    assert "TTFT" in answer.stderr
    assert "tok/s" in answer.stderr
    too_long = cluster.run("chat", "word " * 9000, "--max-tokens", "8")
    assert too_long.returncode == 1
    assert "8192" in too_long.stderr
    assert "Traceback" not in too_long.stderr


@pytest.mark.slow
def test_a_second_folder_is_a_second_cluster(cluster, own_cluster):
    taken = own_cluster.run("up", "--http-port", str(cluster.http_port))
    assert taken.returncode == 2
    assert f"port {cluster.http_port} is in use" in taken.stderr
    assert "--http-port" in taken.stderr
    assert not own_cluster.home.exists()

    own_cluster.up(*FASTEST)
    assert is_ready(own_cluster.http_url)
    assert is_ready(cluster.http_url)
    own_cluster.down()
    own_cluster.assert_nothing_left()
    assert is_ready(cluster.http_url)


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_to_the_foreground_command_ends_everything(own_cluster, signum):
    process = start_in_foreground(own_cluster, "--config", os.devnull)
    assert is_ready(own_cluster.http_url)
    process.send_signal(signum)
    assert process.wait(DOWN_TIMEOUT_S) == 0
    own_cluster.assert_nothing_left()


def test_a_killed_supervisor_leaves_nothing_after_down(own_cluster):
    own_cluster.up(*FASTEST)
    os.kill(own_cluster.session_ids[-1], signal.SIGKILL)
    assert own_cluster.run("status").returncode == 1
    own_cluster.down()
    own_cluster.assert_nothing_left()


@pytest.mark.slow
def test_up_clears_away_what_a_killed_supervisor_left(own_cluster):
    own_cluster.up(*FASTEST)
    os.kill(own_cluster.session_ids[-1], signal.SIGKILL)
    own_cluster.up(*FASTEST)
    assert is_ready(own_cluster.http_url)
    own_cluster.down()
    own_cluster.assert_nothing_left()


@pytest.mark.slow
def test_a_killed_foreground_command_takes_its_cluster_along(own_cluster):
    process = start_in_foreground(own_cluster)
    process.kill()
    process.wait(10)
    deadline_s = time.monotonic() + DOWN_TIMEOUT_S
    while own_cluster.processes() and time.monotonic() < deadline_s:
        time.sleep(0.2)
    own_cluster.assert_nothing_left()


@pytest.mark.slow
def test_down_while_starting(own_cluster):
    process = own_cluster.start("up", "--detach", *own_cluster.ports, *FASTEST)
    while not (own_cluster.home / "state.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    own_cluster.remember_session()
    own_cluster.down()
    assert process.wait(DOWN_TIMEOUT_S) != 0
    own_cluster.assert_nothing_left()


@pytest.mark.slow
def test_down_while_compiling_leaves_no_half_artifact(own_cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    artifacts = tmp_path / "cache" / "headrace" / "artifacts"
    process = own_cluster.start("up", "--detach", *own_cluster.ports)
    while not list(artifacts.glob(".*.new/step.cpp")):
        assert process.poll() is None
        time.sleep(0.05)
    own_cluster.remember_session()
    own_cluster.down()
    assert process.wait(DOWN_TIMEOUT_S) != 0
    own_cluster.assert_nothing_left()
    for path in artifacts.iterdir():  # one that was complete before the stop came may stay
        open_artifact(path).verify()


@pytest.mark.slow
def test_a_model_that_cannot_be_served_fails_in_one_line(own_cluster, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(60))
    done = own_cluster.run(
        "up", "--detach", "--model", str(broken), *own_cluster.ports, timeout_s=UP_TIMEOUT_S
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert str(broken) in done.stderr
    own_cluster.assert_nothing_left()
