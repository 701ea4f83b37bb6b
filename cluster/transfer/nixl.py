"""One NIXL agent, its registered memory, and the one thread that calls it (the extra `nixl`).

The thread sleeps while nothing is under way: NIXL's own progress thread would keep a core busy, so there is
none, and UCX moves only while somebody calls it. A receiver's thread polls its reads; over TCP a sender's
must take part, so it polls as long as hand-offs of its own are under way.
"""

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from importlib import metadata, util
from pathlib import Path
from typing import Any

from cluster.messages import Record
from cluster.transfer.nixl_memory import RegisteredMemory
from cluster.transfer.nixl_offer import memory_of

PACKAGES = ("nixl_cu13", "nixl_cu12")
"""What `pip install nixl` brings; the one for CUDA 12 or 13 matters not to host memory. The package `nixl`
itself looks for PyTorch's CUDA first, and imports PyTorch to ask."""
INSTALL = "pip install 'headrace[nixl]'"
MIN_PAUSE_S = 20e-6
MAX_PAUSE_S = 1e-3
"""Between polls: doubled while nothing moves."""
ABANDON_S = 60.0
"""A read without an end by then is cancelled."""
_DRAM = "DRAM"
_RDMA_DEVICES = Path("/sys/class/infiniband")

logger = logging.getLogger(__name__)


class NixlUnavailableError(Exception):
    """No agent can be made here; the message names the fix. Handled by the workers' start."""


class NixlReadError(Exception):
    """A read did not bring its bytes, or a remote agent could not be added."""


class _Read(Record, frozen=True, kw_only=True):
    handle: Any
    future: Future[None]
    until_s: float


def installed_package() -> str | None:
    """Which of PACKAGES is here, without importing it."""
    return next((name for name in PACKAGES if util.find_spec(name) is not None), None)


def has_rdma_device() -> bool:
    """InfiniBand, RoCE or EFA. Without one UCX moves bytes by TCP, which is slower than gRPC's stream:
    benchmarks/transfer.py."""
    with contextlib.suppress(OSError):
        return any(_RDMA_DEVICES.iterdir())
    return False


def installed_version() -> str | None:
    package = installed_package()
    return None if package is None else metadata.version(package.replace("_", "-"))


class NixlAgent:
    """Any thread may call any method; what they ask of NIXL is done by the agent's own."""

    def __init__(self, num_bytes: int) -> None:
        """Takes half a second, with the import 0.7; 3 where PyTorch is not loaded yet.

        Raises NixlUnavailableError, with nothing left behind.
        """
        version = installed_version()
        if version is None:
            raise NixlUnavailableError(f"NIXL is not installed: {INSTALL}")
        self.version = version
        self.name = f"headrace-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            self.memory = RegisteredMemory(num_bytes)
        except OSError as error:
            message = f"no {num_bytes} bytes for NIXL: {error}; lower transfer.nixl_mb"
            raise NixlUnavailableError(message) from error
        self.metadata = b""
        self._wakes = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._reads: list[_Read] = []
        self._num_served = 0
        self._serves_until_s = 0.0
        self._pause_s = MIN_PAUSE_S
        self._is_closing = False
        self._agent: Any = None
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="nixl", daemon=True)
        self._thread.start()
        try:
            started.result()
        except BaseException as error:
            self.close()
            raise NixlUnavailableError(f"NIXL {version} does not start: {error}") from error

    # The receiver's side.

    def add_remote(self, remote_metadata: bytes) -> Future[None]:
        """`remote_metadata` as `check_offer` accepted it. The future raises NixlReadError."""

        def add() -> None:
            self._agent.add_remote_agent(remote_metadata)

        return self._ask(add)

    def remove_remote(self, name: str) -> Future[None]:
        """Not while reads from it are under way. One that NIXL dropped by itself may be removed, too."""

        def remove() -> None:
            with contextlib.suppress(Exception):
                self._agent.remove_remote_agent(name)

        return self._ask(remove)

    def read(self, remote: str, address: int, start: int, num_bytes: int) -> Future[None]:
        """Copy the remote's [address, address + num_bytes) to `start` of our memory.

        Nothing is written there once the future is done. It raises NixlReadError.
        """
        assert 0 <= start <= start + num_bytes <= self.memory.num_bytes
        here = self.memory.address + start
        future: Future[None] = Future()
        # So that a cancelled wait does not end a read that goes on.
        future.set_running_or_notify_cancel()

        def begin() -> None:
            handle = None
            try:
                agent = self._agent
                local = agent.get_xfer_descs([(here, num_bytes, 0)], _DRAM)
                theirs = agent.get_xfer_descs([(address, num_bytes, 0)], _DRAM)
                handle = agent.initialize_xfer("READ", local, theirs, remote)
                agent.transfer(handle)
            except Exception as error:  # noqa: BLE001 - NIXL's own kinds have no common base
                if handle is not None:
                    _release(handle)
                future.set_exception(NixlReadError(f"the read did not start: {error}"))
            else:
                until_s = time.monotonic() + ABANDON_S
                self._reads.append(_Read(handle=handle, future=future, until_s=until_s))

        self._post(begin, future)
        return future

    # The sender's side.

    def begin_serving(self) -> None:
        """Take part in what others read, until `end_serving` was called as often."""
        with self._wakes:
            self._num_served += 1
            self._wakes.notify()

    def end_serving(self, linger_s: float = 0.0) -> None:
        """`linger_s`: a read may be under way, and ends sooner if we take part a while longer."""
        with self._wakes:
            self._num_served -= 1
            self._serves_until_s = max(self._serves_until_s, time.monotonic() + linger_s)

    def expect_reads(self) -> None:
        """Somebody is about to read: poll quickly again."""
        with self._wakes:
            self._pause_s = MIN_PAUSE_S
            self._wakes.notify()

    def close(self) -> None:
        """End what is under way with NixlReadError, then the agent, then the memory. Waits for the thread."""
        with self._wakes:
            self._is_closing = True
            self._wakes.notify()
        self._thread.join()
        self.memory.close()

    def _ask(self, call: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()

        def answer() -> None:
            try:
                call()
            except Exception as error:  # noqa: BLE001 - as above
                future.set_exception(NixlReadError(str(error)))
            else:
                future.set_result(None)

        self._post(answer, future)
        return future

    def _post(self, command: Callable[[], None], future: Future[None]) -> None:
        with self._wakes:
            if self._is_closing:
                future.set_exception(NixlReadError("the NIXL agent is closed"))
                return
            self._commands.append(command)
            self._pause_s = MIN_PAUSE_S
            self._wakes.notify()

    def _run(self, started: Future[None]) -> None:
        try:
            self._agent = _new_agent(self.name, self.memory)
            self.metadata = self._agent.get_agent_metadata()
            memory_of(self.metadata)
        except BaseException as error:  # noqa: BLE001 - raised to who starts us
            self._agent = None
            started.set_exception(error)
            return
        started.set_result(None)
        try:
            while self._wait_for_work():
                self._work()
        finally:
            self._end_all()

    def _wait_for_work(self) -> bool:
        """Sleep while nothing is under way, else for the pause between polls; False: the agent is closing."""
        with self._wakes:
            if self._is_under_way() and not self._commands:
                self._wakes.wait(self._pause_s)
                self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
            while not (self._commands or self._is_closing or self._is_under_way()):
                self._wakes.wait()
            return not self._is_closing

    def _is_under_way(self) -> bool:
        return bool(self._reads or self._num_served) or time.monotonic() < self._serves_until_s

    def _work(self) -> None:
        with self._wakes:
            commands, self._commands = self._commands, []
        for command in commands:
            command()
        under_way = self._reads
        self._reads = [read for read in under_way if not self._has_ended(read)]
        if commands or len(self._reads) < len(under_way):
            self._pause_s = MIN_PAUSE_S
        with contextlib.suppress(Exception):  # a message that is none; nobody sends any
            self._agent.get_new_notifs()

    def _has_ended(self, read: _Read) -> bool:
        try:
            state = self._agent.check_xfer_state(read.handle)
            error = "it failed" if state == "ERR" else None
        except Exception as raised:  # noqa: BLE001 - as above
            state, error = "ERR", str(raised)
        if state == "PROC":
            if time.monotonic() < read.until_s:
                return False
            error = f"it had not ended after {ABANDON_S:g} s"
        _release(read.handle)
        if error is None:
            read.future.set_result(None)
        else:
            read.future.set_exception(NixlReadError(error))
        return True

    def _end_all(self) -> None:
        for read in self._reads:
            _release(read.handle)
            read.future.set_exception(NixlReadError("the NIXL agent is closed"))
        self._reads = []
        # With it go its connections: what was under way writes no more.
        self._agent = None
        with self._wakes:
            self._is_closing = True
            commands, self._commands = self._commands, []
        for command in commands:  # each says to its future that there is no agent
            command()


def _new_agent(name: str, memory: RegisteredMemory) -> Any:
    try:
        import nixl_cu13._api as api
    except ModuleNotFoundError:
        import nixl_cu12._api as api
    if "NIXL_LOG_LEVEL" not in os.environ:
        logging.getLogger("nixl").setLevel(logging.WARNING)
    # One thread calls it, so no lock of its own.
    agent = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    agent.register_memory([(memory.address, memory.num_bytes, 0, "")], _DRAM)
    return agent


def _release(handle: Any) -> None:
    """A request still under way is cancelled."""
    with contextlib.suppress(Exception):
        handle.release()
