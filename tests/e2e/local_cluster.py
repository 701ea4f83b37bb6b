"""A real cluster, started and ended as a user would, and the proof that nothing of it is left."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from headrace.ports import free_ports, is_free
from headrace.probe import MetricsSnapshot, fetch_metrics
from tests.interruptible import INTERRUPTIBLE

COMMAND = [sys.executable, "-m", "headrace"]
UP_TIMEOUT_S, DOWN_TIMEOUT_S = 240, 90
FASTEST = ("--executor", "noop", "--prefill-replicas", "0")
MODEL = "smollm2-135m-instruct"


def shared_memory_names() -> set[str]:
    return set(os.listdir("/dev/shm"))


@dataclass
class LocalCluster:
    """`up` and `down` may be repeated: the ports and the folder stay the same."""

    home: Path
    http_port: int
    grpc_port: int
    model: str = MODEL
    more_env: dict[str, str] = field(default_factory=dict)
    session_ids: list[int] = field(default_factory=list)
    """Of every supervisor that ran here: all processes of a cluster are in its session."""
    _shared_memory_before: set[str] = field(default_factory=shared_memory_names)

    @classmethod
    def at(cls, home: Path) -> "LocalCluster":
        http_port, grpc_port = free_ports(2)
        return cls(home, http_port, grpc_port)

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "HEADRACE_HOME": str(self.home), "COLUMNS": "200", **self.more_env}

    @property
    def ports(self) -> tuple[str, ...]:
        return "--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port)

    def metrics(self) -> MetricsSnapshot:
        return fetch_metrics(self.http_url)

    def run(self, *arguments: str, timeout_s: float = 60) -> "subprocess.CompletedProcess[str]":
        """A `headrace` command, to its end."""
        return subprocess.run(
            [*COMMAND, *arguments], env=self.env, capture_output=True, text=True, timeout=timeout_s
        )

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """A `headrace` command that goes on until Ctrl-C."""
        return subprocess.Popen(
            [*INTERRUPTIBLE, *arguments],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def up(self, *options: str) -> None:
        done = self.run("up", "--detach", *self.ports, *options, timeout_s=UP_TIMEOUT_S)
        assert done.returncode == 0, done.stdout + done.stderr
        self.remember_session()

    def down(self) -> None:
        done = self.run("down", timeout_s=DOWN_TIMEOUT_S)
        assert done.returncode == 0, done.stdout + done.stderr

    def state(self) -> dict[str, object]:
        return json.loads((self.home / "state.json").read_text())

    def remember_session(self) -> int:
        pid = int(str(self.state()["pid"]))
        self.session_ids.append(pid)
        return pid

    def processes(self) -> list[psutil.Process]:
        """Whatever still runs of it, by session or by a path of its folder on the command line."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                return False
            in_session = os.getsid(process.pid) in self.session_ids
            return in_session or any(f"{self.home}/" in argument for argument in process.cmdline())
        except (psutil.Error, ProcessLookupError):
            return False

    def assert_nothing_left(self) -> None:
        assert [(process.pid, process.cmdline()) for process in self.processes()] == []
        assert not self.home.exists(), sorted(self.home.rglob("*"))
        assert all(is_free("0.0.0.0", port) for port in (self.http_port, self.grpc_port))
        assert shared_memory_names() <= self._shared_memory_before
