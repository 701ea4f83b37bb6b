"""Runs one redis-server for an owner, and outlives both just long enough to clean up after them.

Run as a script by `embedded.EmbeddedRedis`, with nothing but the standard library:

    python -I -S redis_guard.py OWNER_PID REDIS_SERVER DIRECTORY < configuration, NUL, then a pipe kept open

It ends the server and removes DIRECTORY when that pipe closes, when the owner dies (by any signal), when
the server dies, or on SIGTERM. It is a process of its own because nothing in a killed owner can
clean up; it has one thread, so the server can safely be tied to it with PR_SET_PDEATHSIG, which goes by
the thread that forks.
"""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
from types import FrameType

PR_SET_PDEATHSIG = 1
STOP_TIMEOUT_S = 2.0
MAX_CONFIG_BYTES = 65536
WITHOUT_PIDFD_POLL_MS = 500
LOG_NAME = "redis.log"
MAX_LOG_BYTES = 2000


def read_config(stdin_fd: int) -> bytes:
    """What comes before the NUL; the owner sends nothing after it."""
    config = b""
    while not config.endswith(b"\0"):
        part = os.read(stdin_fd, 4096)
        if not part or len(config) + len(part) > MAX_CONFIG_BYTES:
            raise SystemExit("no configuration came")
        config += part
    return config[:-1]


def die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start_server(redis_server: str, directory: str, config: bytes) -> "subprocess.Popen[bytes]":
    """The configuration goes through a pipe: a command line is readable by every user."""
    with open(os.path.join(directory, LOG_NAME), "wb") as log:
        server = subprocess.Popen(  # noqa: S603 - the path is our own finding
            [redis_server, "-"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=directory,
            preexec_fn=die_with_parent,
        )
    assert server.stdin is not None
    with contextlib.suppress(BrokenPipeError), server.stdin as stdin:
        stdin.write(config)
    return server


def open_pidfd(pid: int) -> int | None:
    """A descriptor that turns readable when the process ends, or None where there is no such thing."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def wait_for_an_end(owner_pid: int, server: "subprocess.Popen[bytes]", stdin_fd: int) -> None:
    pidfds = [open_pidfd(owner_pid), open_pidfd(server.pid)]
    poll = select.poll()
    poll.register(stdin_fd, select.POLLIN)
    for pidfd in pidfds:
        if pidfd is not None:
            poll.register(pidfd, select.POLLIN)
    timeout_ms = WITHOUT_PIDFD_POLL_MS if None in pidfds else None
    while os.getppid() == owner_pid and server.poll() is None:
        if poll.poll(timeout_ms):
            return


def stop_server(server: "subprocess.Popen[bytes]") -> None:
    server.terminate()
    try:
        server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def tell_what_it_logged(directory: str) -> None:
    """To the owner, who may be waiting for a server that never came; too short to block on the pipe."""
    with contextlib.suppress(OSError), open(os.path.join(directory, LOG_NAME), "rb") as log:
        sys.stderr.buffer.write(log.read()[-MAX_LOG_BYTES:])


def exit_on_signal(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


def main(owner_pid: int, redis_server: str, directory: str) -> None:
    signal.signal(signal.SIGTERM, exit_on_signal)
    stdin_fd = sys.stdin.fileno()
    try:
        server = start_server(redis_server, directory, read_config(stdin_fd))
        try:
            wait_for_an_end(owner_pid, server, stdin_fd)
        finally:
            stop_server(server)
            tell_what_it_logged(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
