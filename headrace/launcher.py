"""Starts and ends supervisors from the command line's side."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection

import msgspec
import psutil

from cluster.config import HeadraceConfig
from headrace.ports import check_free, with_concrete_ports
from headrace.processes import cluster_processes, kill_all
from headrace.run_folder import LOCK, ClusterState, RunFolder, boot_id
from headrace.supervisor import EXIT_UNUSABLE, STOP_TIMEOUT_S, Launch

START_TIMEOUT_S = 600.0
"""A hub model may have to be downloaded, a large one read."""
_POLL_S = 0.1
_KILL_TIMEOUT_S = 10.0


class StartFailedError(Exception):
    """The supervisor ended, or was not ready in time. Handled by the command line."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def spawn(folder: RunFolder, config: HeadraceConfig, *, is_attached: bool) -> "subprocess.Popen[bytes]":
    """A supervisor in a session of its own, so that Ctrl-C in the terminal reaches only the command line.

    Attached, it ends when the returned process's `stdin` is closed. Clears away what a killed one left.
    Raises RunFolderError where a cluster runs in the folder, PortTakenError where a port is taken.
    """
    folder.create()
    lock = folder.lock()
    try:
        _clear(folder, keep=(LOCK,))  # it may listen on the very ports
        check_free(config)
        folder.create()
        launch = Launch(config=with_concrete_ports(config), is_attached=is_attached, lock_descriptor=lock)
        return _spawn(folder, launch)
    except BaseException:
        folder.remove()
        raise
    finally:
        os.close(lock)


def _spawn(folder: RunFolder, launch: Launch) -> "subprocess.Popen[bytes]":
    with folder.log.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "headrace.supervisor"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_child_environment(folder)},
            pass_fds=(launch.lock_descriptor,),
            start_new_session=True,
        )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended: `follow` says why
        process.stdin.write(msgspec.json.encode(launch) + b"\n")
        process.stdin.flush()
        if not launch.is_attached:
            process.stdin.close()
    return process


def _child_environment(folder: RunFolder) -> dict[str, str]:
    environment = {"HEADRACE_HOME": str(folder.path), "PYTHONUNBUFFERED": "1"}
    if path := os.environ.get("PYTHONPATH"):
        # Ray's workers run in other folders.
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(part) for part in path.split(os.pathsep))
    return environment


def follow(
    process: "subprocess.Popen[bytes]", folder: RunFolder, on_progress: Callable[[ClusterState], None]
) -> ClusterState:
    """Returns once the cluster is ready. Raises StartFailedError, with the log's tail, where it cannot be."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        state = folder.state()
        if state is not None and state.pid == process.pid:
            on_progress(state)
            if state.phase == "ready":
                return state
        if process.poll() is not None:
            raise StartFailedError(*_failure(folder))
        time.sleep(_POLL_S)
    raise StartFailedError(f"not ready after {START_TIMEOUT_S:.0f} s\n{folder.log_tail()}", 1)


def _failure(folder: RunFolder) -> tuple[str, int]:
    if (error := folder.error()) is not None:
        return error, EXIT_UNUSABLE
    return f"the cluster did not start; its log ends with\n{folder.log_tail()}", 1


def stop(folder: RunFolder) -> bool:
    """End the folder's cluster and whatever an earlier one left; returns whether there was anything.

    Raises StartFailedError where something does not end.
    """
    was_running = folder.is_locked()
    signalled: dict[int, psutil.Process] = {}
    deadline_s = time.monotonic() + STOP_TIMEOUT_S + _KILL_TIMEOUT_S
    while folder.is_locked() and time.monotonic() < deadline_s:
        # One that has just been started may not have written its state yet.
        state = folder.state()
        if state is not None and state.pid not in signalled:
            with contextlib.suppress(psutil.NoSuchProcess):
                signalled[state.pid] = psutil.Process(state.pid)
                signalled[state.pid].terminate()
        time.sleep(_POLL_S / 2)
    psutil.wait_procs(list(signalled.values()), timeout=max(1.0, deadline_s - time.monotonic()))
    return _clear(folder) or was_running


def _clear(folder: RunFolder, keep: Collection[str] = ()) -> bool:
    """Kill and remove what a cluster without a supervisor left; returns whether there was anything."""
    state = folder.state()
    session_id = None if state is None else _session_left_by(state)

    def find() -> list[psutil.Process]:
        return cluster_processes(session_id, folder.sockets)

    had_any = state is not None or bool(find())
    if left := kill_all(find, _KILL_TIMEOUT_S):
        raise StartFailedError(f"processes that do not end: {', '.join(str(p.pid) for p in left)}", 1)
    folder.remove(keep=keep)
    return had_any


def _session_left_by(state: ClusterState) -> int | None:
    """The dead supervisor's session; None where its number means another one by now."""
    if state.boot_id != boot_id():
        return None
    try:
        is_reused = psutil.Process(state.pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        is_reused = False
    return None if is_reused else state.pid
