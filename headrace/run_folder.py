"""The folder of one running cluster: who runs it, where it answers, and everything it must not leave behind.

One folder, one cluster. The supervisor holds a lock on it for as long as it lives, so whether a cluster runs
is never guessed from a process id. Two clusters on one machine have two folders (`HEADRACE_HOME`).
"""

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import msgspec

Phase = Literal["redis", "ray", "compile", "deploy", "answer", "ready", "stopping"]
"""What the supervisor is at: starting Redis and Ray, awaiting the compiled model, starting the deployments,
awaiting a first token, then serving."""

_MAX_SOCKET_PARENT_CHARS = 21
"""HAProxy takes socket paths of 97 characters, 76 of them below the folder; Ray 107, 64 of them below."""
_LOCK_TRIES, _LOCK_RETRY_S = 5, 0.05
LOG, ERROR, LOCK = "supervisor.log", "error.txt", "lock"
_ENTRIES = ("state.json", LOG, ERROR, "redis", "ray", "haproxy", "catalogues", "fetched", "measuring", LOCK)
"""All that a cluster ever puts into its folder. Nothing else is removed: the folder's path is the user's."""


class RunFolderError(Exception):
    """The folder cannot be used, or a cluster holds it; the message says which. For the command line."""


class BuildProgress(msgspec.Struct, frozen=True):
    """Of the model's compilation, which also runs while Ray starts."""

    what: str
    fraction: float


class ClusterState(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor tells the other commands. Read through `RunFolder.state`."""

    pid: int
    """The supervisor's; also the session id of every process of the cluster."""
    boot_id: str
    """Of the kernel that gave the pid: after a reboot it names somebody else."""
    phase: Phase
    model: str
    host: str
    """What the router listens on; see `reachable_host`."""
    http_port: int
    grpc_port: int
    redis_url: str | None
    """Holds a password; None until Redis is there."""
    started_unix_s: float
    phase_seconds: dict[str, float]
    progress: BuildProgress | None = None
    execution: str = ""
    """What runs the model, for a person; empty until it is decided."""
    note: str = ""
    """What the user should know of that decision."""

    @property
    def http_url(self) -> str:
        return f"http://{self.reachable_host}:{self.http_port}"

    @property
    def grpc_address(self) -> str:
        return f"{self.reachable_host}:{self.grpc_port}"

    @property
    def reachable_host(self) -> str:
        """Where this machine reaches it: listening on all interfaces is no address to call."""
        if self.host in ("0.0.0.0", "::", ""):  # noqa: S104
            return "127.0.0.1"
        return f"[{self.host}]" if ":" in self.host else self.host


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def default_run_folder() -> Path:
    """`HEADRACE_HOME`, else one per user in the machine's temporary folder.

    Not XDG_RUNTIME_DIR: logging out empties that, under a cluster that was detached to stay.
    """
    home = os.environ.get("HEADRACE_HOME")
    return Path(home).absolute() if home else Path(f"/tmp/headrace-{os.getuid()}")  # noqa: S108 - 0700, owner checked


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def log(self) -> Path:
        return self.path / LOG

    @property
    def measuring_lock(self) -> Path:
        """Held by the worker that measures its step table."""
        return self.path / "measuring"

    @property
    def catalogues(self) -> Path:
        """Where uploads are kept unless the configuration names another folder."""
        return self.path / "catalogues"

    @property
    def fetched_catalogues(self) -> Path:
        """What workers of this machine keep of other machines' catalogues."""
        return self.path / "fetched"

    @property
    def sockets(self) -> Path:
        """Where Ray, HAProxy and Redis live: the folder itself, or, where that is too long for the path of
        a socket, a short one derived from it."""
        if len(str(self.path)) <= _MAX_SOCKET_PARENT_CHARS:
            return self.path
        digest = hashlib.sha256(f"{os.getuid()}\0{self.path}".encode()).hexdigest()[:8]
        return Path(f"/tmp/hr-{digest}")  # noqa: S108 - 0700, owner checked

    def create(self) -> None:
        """Raises RunFolderError where a folder is not ours alone."""
        _make_private(self.path)
        _make_private(self.sockets)

    def lock(self) -> int:
        """Take the folder; returns the descriptor whose last copy, in whatever process, holds the lock.

        Raises RunFolderError where a cluster holds it.
        """
        descriptor = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        for remaining_tries in reversed(range(_LOCK_TRIES)):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not remaining_tries:
                    os.close(descriptor)
                    raise RunFolderError(f"a cluster already runs in {self.path}") from None
                time.sleep(_LOCK_RETRY_S)  # `is_locked` of another command holds it for an instant
            else:
                break
        return descriptor

    def is_locked(self) -> bool:
        """Whether a supervisor lives here."""
        try:
            with (self.path / LOCK).open("rb") as handle:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def write_state(self, state: ClusterState) -> None:
        with tempfile.NamedTemporaryFile(dir=self.path, prefix="state.json.", delete=False) as file:
            file.write(msgspec.json.encode(state))
        os.replace(file.name, self.path / "state.json")

    def state(self) -> ClusterState | None:
        """None where no cluster was started here, or what it wrote is of another version."""
        try:
            return msgspec.json.decode((self.path / "state.json").read_bytes(), type=ClusterState)
        except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
            return None

    def write_error(self, message: str) -> None:
        """Why the supervisor gave up, for the command that started it."""
        (self.path / ERROR).write_text(message, encoding="utf-8")

    def error(self) -> str | None:
        try:
            return (self.path / ERROR).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def log_tail(self, num_lines: int = 30) -> str:
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return ""
        return "\n".join(lines[-num_lines:])

    def remove(self, *, keep: Collection[str] = ()) -> None:
        """Remove what a cluster put here but `keep`, and the folder where nothing else is in it."""
        for folder in {self.sockets, self.path}:
            for name in _ENTRIES:
                if name not in keep:
                    _remove(folder / name)
            for leftover in folder.glob("state.json.*"):
                _remove(leftover)
            _remove_if_empty(folder)


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise RunFolderError(f"cannot use {folder}: {error.strerror}; set HEADRACE_HOME elsewhere") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise RunFolderError(f"{folder} is not a folder of yours; set HEADRACE_HOME to one that is")
    if stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(0o700)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # somebody else's files are in it, or it is gone already
