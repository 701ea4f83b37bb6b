"""Workers killed as a crash would, and waited for."""

import time

import psutil
import pytest

from tests.e2e.local_cluster import LocalCluster

_REPLICA = "ray::ServeReplica:headrace:"


def kill_replica(cluster: LocalCluster, deployment: str) -> None:
    replicas = [p for p in cluster.processes() if p.cmdline()[0].startswith(_REPLICA + deployment)]
    assert len(replicas) == 1
    replicas[0].send_signal(psutil.signal.SIGKILL)


def wait_for_workers(cluster: LocalCluster, role: str, timeout_s: float = 90.0) -> None:
    """Until a replica killed before has been replaced, for the tests that come after."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if cluster.metrics().total("headrace_worker_metrics_up", role=role) == 1:
            return
        time.sleep(0.5)
    pytest.fail(f"no {role} worker came back within {timeout_s} s")
