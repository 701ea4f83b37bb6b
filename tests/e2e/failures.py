"""Workers killed and stopped as a crash or a busy machine would, and waited for."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.local_cluster import LocalCluster

_REPLICA = "ray::ServeReplica:headrace:"
_OURS = "/memfd:headrace"


def replica(cluster: LocalCluster, deployment: str) -> psutil.Process:
    """The only one of it."""
    replicas = [p for p in cluster.processes() if p.cmdline()[0].startswith(_REPLICA + deployment)]
    assert len(replicas) == 1
    return replicas[0]


def kill_replica(cluster: LocalCluster, deployment: str) -> None:
    replica(cluster, deployment).send_signal(psutil.signal.SIGKILL)


@contextlib.contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """It runs on at the end, unless it was killed."""
    process.suspend()
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def wait_for_workers(cluster: LocalCluster, role: str, timeout_s: float = 90.0) -> None:
    """Until a replica killed before has been replaced, for the tests that come after."""
    wait_until(
        lambda: cluster.metrics().total("headrace_worker_metrics_up", role=role) == 1,
        lambda: f"no {role} worker came back",
        timeout_s,
    )


def wait_until(is_so: Callable[[], bool], complaint: Callable[[], str], timeout_s: float = 90.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline_s:
            pytest.fail(f"after {timeout_s:g} s: {complaint()}")
        time.sleep(0.1)


class Belongings:
    """What a process has that could outlive it: children, memory files, names of Unix sockets."""

    def __init__(self, process: psutil.Process) -> None:
        self.processes = [process, *process.children(recursive=True)]
        names = {each: os.readlink(each) for each in Path(f"/proc/{process.pid}/fd").iterdir()}
        self.memory_files = {each.stat().st_ino for each, name in names.items() if _OURS in name}
        inodes = {name.removeprefix("socket:[").removesuffix("]") for name in names.values()}
        self.sockets = {name for inode, name in _named_sockets().items() if inode in inodes}

    def left_in(self, cluster: LocalCluster) -> list[str]:
        left = [f"process {process.pid}" for process in self.processes if process.is_running()]
        for process in cluster.processes():
            left += [f"memory file in {process.pid}" for _ in self.memory_files & _mapped(process.pid)]
        return left + sorted(self.sockets & set(_named_sockets().values()))


def _mapped(pid: int) -> set[int]:
    """Inodes of our memory files."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        return {int(line.split()[4]) for line in lines if _OURS in line}
    return set()


def _named_sockets() -> dict[str, str]:
    """Names by inode."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return {row[6]: row[7] for row in rows if len(row) == 8}
