import os
import stat
from pathlib import Path

import pytest

from headrace.run_folder import (
    ERROR,
    LOG,
    ClusterState,
    RunFolder,
    RunFolderError,
    boot_id,
    default_run_folder,
)

SOCKET_PATH_CHARS = 97
"""Of HAProxy, which puts a suffix of its own behind its path."""
NODE_ID_CHARS = 56


def state(**changes):
    values = {
        "pid": os.getpid(),
        "boot_id": boot_id(),
        "phase": "ready",
        "model": "m",
        "host": "0.0.0.0",
        "http_port": 8000,
        "grpc_port": 8001,
        "redis_url": None,
        "started_unix_s": 1.0,
        "phase_seconds": {"ray": 2.0},
    }
    return ClusterState(**(values | changes))


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "home")
    folder.create()
    yield folder
    folder.remove()


def test_the_folder_is_private(folder):
    for path in (folder.path, folder.sockets):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_folder_that_others_can_read_is_made_private(tmp_path):
    path = tmp_path / "open"
    path.mkdir(mode=0o755)
    folder = RunFolder(path)
    folder.create()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    folder.remove()


def test_a_link_or_a_file_is_refused(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        folder = RunFolder(tmp_path / name)
        with pytest.raises(RunFolderError, match=f"{name}.*HEADRACE_HOME"):
            folder.create()
        assert not folder.sockets.exists()


@pytest.mark.parametrize("length", [10, 20, 22, 60, 200])
def test_sockets_fit_whatever_the_length(length):
    folder = RunFolder(Path("/" + "x" * (length - 1)))
    haproxy = folder.sockets / "haproxy" / ("n" * NODE_ID_CHARS) / "admin.sock"
    assert len(str(haproxy)) <= SOCKET_PATH_CHARS
    ray = folder.sockets / "ray" / "session_2026-11-23_14-11-38_586351_4194304" / "sockets" / "plasma_store"
    assert len(str(ray)) <= 107


def test_long_folders_never_share_their_sockets():
    names = [Path("/home/somebody/with/a/long/path") / str(index) for index in range(100)]
    assert len({RunFolder(name).sockets for name in names}) == 100


def test_state_survives_the_file(folder):
    assert folder.state() is None
    folder.write_state(state())
    assert folder.state() == state()
    (folder.path / "state.json").write_text('{"pid": "none"}')
    assert folder.state() is None


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("10.0.0.5", "http://10.0.0.5:8000"),
        ("::1", "http://[::1]:8000"),
    ],
)
def test_addresses_can_be_called(host, url):
    assert state(host=host).http_url == url


def test_one_holder_at_a_time(folder):
    assert not folder.is_locked()
    descriptor = folder.lock()
    assert folder.is_locked()
    with pytest.raises(RunFolderError, match="already runs"):
        RunFolder(folder.path).lock()
    os.close(descriptor)
    assert not folder.is_locked()


def test_a_folder_that_never_was_is_not_locked(tmp_path):
    assert not RunFolder(tmp_path / "nowhere").is_locked()


def test_only_what_a_cluster_put_there_is_removed(folder):
    folder.write_state(state())
    (folder.path / "ray").mkdir()
    (folder.path / "ray" / "log").write_text("x")
    (folder.path / "mine.txt").write_text("keep me")
    folder.remove()
    assert [path.name for path in folder.path.iterdir()] == ["mine.txt"]
    (folder.path / "mine.txt").unlink()
    folder.remove()
    assert not folder.path.exists()
    assert not folder.sockets.exists()


def test_log_and_error_outlive_a_failed_start(folder):
    folder.log.write_text("\n".join(f"line {index}" for index in range(50)))
    folder.write_error("why")
    folder.write_state(state())
    folder.remove(keep=(LOG, ERROR))
    assert folder.error() == "why"
    assert folder.log_tail(2) == "line 48\nline 49"
    assert folder.state() is None


def test_home_is_the_users_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
    assert default_run_folder() == tmp_path
    monkeypatch.delenv("HEADRACE_HOME")
    assert default_run_folder() == Path(f"/tmp/headrace-{os.getuid()}")
