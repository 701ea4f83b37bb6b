"""The processes of a cluster: found by their session, ended in order, and none left.

The supervisor leads a session of its own, and nothing that it starts leaves that session, also not when its
parent dies. A kernel does not give a session's id to another while one member lives, so the id finds exactly
the cluster's processes, as long as the machine has not been restarted since.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

_POLL_S = 0.05


def _is_of_session(process: psutil.Process, session_id: int) -> bool:
    try:
        return os.getsid(process.pid) == session_id and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, PermissionError, psutil.Error):
        return False


def _mentions(process: psutil.Process, folders: Sequence[Path]) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE or process.uids().real != os.getuid():
            return False
        return any(
            argument == str(folder) or f"{folder}/" in argument
            for argument in process.cmdline()
            for folder in folders
        )
    except psutil.Error:
        return False


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs: a process that ended but was not yet waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _own_ancestry() -> set[int]:
    return {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}


def cluster_processes(session_id: int | None, socket_folder: Path) -> list[psutil.Process]:
    """All live members of the session, and any process whose command line names a file of Ray, HAProxy or
    Redis in `socket_folder`; never this process or one that it runs under."""
    spared = _own_ancestry()
    folders = [socket_folder / name for name in ("ray", "haproxy", "redis")]
    return [
        process
        for process in psutil.process_iter()
        if process.pid not in spared
        and ((session_id is not None and _is_of_session(process, session_id)) or _mentions(process, folders))
    ]


def kill_all(find: Callable[[], list[psutil.Process]], timeout_s: float = 5.0) -> list[psutil.Process]:
    """SIGKILL what `find` finds until it finds nothing; returns what is left when time is up."""
    deadline_s = time.monotonic() + timeout_s
    while remaining := find():
        for process in remaining:
            try:
                process.kill()
            except psutil.Error:
                continue
        if time.monotonic() > deadline_s:
            return remaining
        psutil.wait_procs(remaining, timeout=_POLL_S)
    return []


def listener_of(port: int) -> str | None:
    """Who listens on a TCP port, as `name (pid n)`; None where that cannot be seen."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.Error:
        return None
    for connection in connections:
        if not connection.laddr or connection.laddr.port != port or connection.status != psutil.CONN_LISTEN:
            continue
        if connection.pid:
            try:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
            except psutil.Error:
                return None
    return None
