"""The socket between a prefill worker and its ranks: who may come, and what a killed worker leaves."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prefill_workers import rank_channel
from prefill_workers.rank_channel import (
    ChannelError,
    Export,
    ExportSettings,
    FromRank,
    Hello,
    Opened,
    RankClient,
    RankHub,
    Released,
    Settled,
)
from tests.tensorrt import DOUBLE, has_real_tensorrt


def settings_of(name: str) -> ExportSettings:
    return ExportSettings(
        socket_name=name,
        staging_path="",
        num_ranks=1,
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        tokens_per_block=1,
        wire_dtype="float32",
    )


def until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


class Hub:
    def __init__(self) -> None:
        self.name = f"headrace-ranks-test-{os.getpid()}-{threading.get_ident()}"
        self.told: list[FromRank] = []
        self.lost: list[str] = []
        self.hub = RankHub(self.name, self.told.append, self.lost.append)

    def client(self, rank: int, role: str, settled: Callable[[int], None] | None = None) -> RankClient:
        return RankClient(settings_of(self.name), Hello(rank=rank, role=role), on_settled=settled)


@pytest.fixture
def hub():
    made = Hub()
    yield made
    made.hub.close()


def test_what_is_told_reaches_all_and_is_answered_by_each(hub: Hub) -> None:
    clients = [hub.client(0, "scheduler")]
    for rank in range(2):
        client = hub.client(
            rank, "worker", lambda number, rank=rank: clients[1 + rank].tell(Released(number, rank))
        )
        clients.append(client)
    assert [hello.rank for hello in hub.hub.wait_for(2, 20)] == [0, 1]
    hub.hub.tell(Export(number=7, first_token=0, end_token=1, offset=0, lease_s=60.0))
    until(lambda: len(hub.told) == 3)
    assert sorted(one.rank for one in hub.told if isinstance(one, Opened)) == [0, 0, 1]
    assert all(client.export(7) is not None for client in clients)
    hub.hub.tell(Settled(7))
    until(lambda: len(hub.told) == 5)
    assert set(hub.told[3:]) == {Released(7, 0), Released(7, 1)}
    assert all(client.export(7) is None for client in clients)
    clients[2].close()
    until(lambda: hub.lost == ["the worker of rank 1"])
    for client in clients[:2]:
        client.close()


def test_a_process_of_another_user_is_nobody(hub: Hub, monkeypatch) -> None:
    """It is let go at once, and its going is no rank's."""
    own = os.geteuid()
    monkeypatch.setattr(rank_channel.os, "geteuid", lambda: own + 1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(f"\0{hub.name}")
        stranger.settimeout(20)
        assert stranger.recv(10) == b""
    with pytest.raises(ChannelError, match=r"ranks \[\] of 1"):
        hub.hub.wait_for(1, 0.1)
    assert hub.lost == []


def test_a_worker_that_is_gone_is_said_to_be() -> None:
    with pytest.raises(ChannelError, match="the prefill worker is gone: headrace-ranks-nobody"):
        RankClient(settings_of("headrace-ranks-nobody"), Hello(rank=0, role="worker"))


@pytest.mark.skipif(has_real_tensorrt(), reason="a real TensorRT-LLM is installed")
def test_a_killed_worker_leaves_nothing(tmp_path: Path) -> None:
    """Neither a file nor a name: its engine had no chance to clean up."""
    program = textwrap.dedent(
        """
        import time
        from prefill_workers.torch_engine import TorchPrefillEngine
        from tests.prefill_workers.test_trtllm import WEIGHTS, Rig
        rig = Rig(TorchPrefillEngine(WEIGHTS, "tiny", 4, 16, 64, 1).layout)
        print(rig.engine._hub._listener.getsockname()[1:].decode(), flush=True)
        time.sleep(600)
        """
    )
    path = os.pathsep.join([*sys.path, str(DOUBLE)])
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": path}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
    ) as worker:
        name = worker.stdout.readline().strip()
        assert name in bound_names()
        worker.send_signal(signal.SIGKILL)
    until(lambda: name not in bound_names())
    assert list(tmp_path.iterdir()) == []


def bound_names() -> set[str]:
    return {line.split()[-1].lstrip("@") for line in Path("/proc/net/unix").read_text().splitlines()}
