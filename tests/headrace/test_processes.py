import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from headrace.processes import cluster_processes, is_alive, kill_all

NOWHERE = Path("/nonexistent/folder")
SLEEP = "import time; time.sleep(60)"
SPAWN_AND_SLEEP = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); {SLEEP}"


@pytest.fixture
def session():
    """A leader of a session of its own, with a child."""
    leader = subprocess.Popen([sys.executable, "-c", SPAWN_AND_SLEEP], start_new_session=True)
    while not psutil.Process(leader.pid).children():
        assert leader.poll() is None
        time.sleep(0.01)
    yield leader
    kill_all(lambda: cluster_processes(leader.pid, NOWHERE))
    leader.wait()


def test_a_session_is_found_whole_also_without_its_leader(session):
    assert len(cluster_processes(session.pid, NOWHERE)) == 2
    session.kill()
    session.wait()
    (orphan,) = cluster_processes(session.pid, NOWHERE)
    assert is_alive(orphan)
    assert kill_all(lambda: cluster_processes(session.pid, NOWHERE)) == []
    assert not is_alive(orphan)


def test_processes_are_found_by_the_files_they_name(tmp_path):
    named = subprocess.Popen([sys.executable, "-c", SLEEP, str(tmp_path / "redis" / "sock")])
    other = subprocess.Popen([sys.executable, "-c", SLEEP, str(tmp_path / "redish")])
    try:
        assert [process.pid for process in cluster_processes(None, tmp_path)] == [named.pid]
    finally:
        for process in (named, other):
            process.kill()
            process.wait()


def test_never_this_process_or_one_it_runs_under():
    own_session = os.getsid(0)
    found = {process.pid for process in cluster_processes(own_session, NOWHERE)}
    assert not found & {psutil.Process().pid, *(parent.pid for parent in psutil.Process().parents())}


def test_an_ended_process_is_not_alive():
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    watched = psutil.Process(process.pid)
    while is_alive(watched):
        time.sleep(0.01)
    assert watched.status() == psutil.STATUS_ZOMBIE
    process.wait()
    assert not is_alive(watched)
