"""The double's monitor finds what it is there for: faults planted in the connector, and in the double."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prefill_workers.engine import PrefillFailed
from prefill_workers.layer_copies import LayerCopies
from prefill_workers.pool_layout import RankPool
from prefill_workers.torch_engine import TorchPrefillEngine
from tests.prefill_workers.exports import Exported, job, random_tokens
from tests.prefill_workers.test_trtllm import WEIGHTS, Rig, keep

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRTLLM_DOUBLE_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


@pytest.fixture
def rig(log: Path, request) -> Iterator[Rig]:
    made = Rig(TorchPrefillEngine(WEIGHTS, "tiny", 400, 16, 256, 1).layout, **getattr(request, "param", {}))
    yield made
    made.engine.close()


def lines(log: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def violations(log: Path) -> list[str]:
    return [str(line["violation"]) for line in lines(log) if "violation" in line]


def test_where_all_is_well_it_says_each_time_that_nothing_is_held(rig: Rig, log: Path) -> None:
    rig.run([job(f"j{number}", random_tokens(100, number)) for number in range(4)])
    rig.assert_nothing_is_held()
    assert all(line == {"pid": os.getpid(), "num_used_blocks": 0} for line in lines(log))
    assert lines(log)


@pytest.mark.parametrize("rig", [{"tensor_parallel_size": 2}], indirect=True)
def test_a_connector_that_does_not_wait_before_a_step(rig: Rig, log: Path, monkeypatch) -> None:
    """Whatever comes of it: the executor ends, with all that it runs and all that comes later."""
    monkeypatch.setattr(LayerCopies, "fence", lambda self, stream: None)
    ends = rig.run([job(f"j{number}", random_tokens(200, number)) for number in range(3)])
    later = rig.run([job("later", random_tokens(5))])
    for _, end in (*ends.values(), *later.values()):
        assert isinstance(end, PrefillFailed)
        assert "lets the next one begin without a wait" in end.message
    assert violations(log)[0].startswith("rank 0 asked for KV of a step")


@pytest.mark.parametrize("rig", [{"num_blocks": 2}], indirect=True)
def test_a_copy_that_is_made_once_its_blocks_have_another_owner(rig: Rig, log: Path, monkeypatch) -> None:
    """The connector waits for an event that is none of its copies'."""
    read, may_read, is_reading = RankPool.read_at, threading.Event(), threading.Event()

    def late(self, layers, places, own) -> None:
        if own.shape[2] == 60 and layers.start == 0:
            is_reading.set()
            assert may_read.wait(10)
        read(self, layers, places, own)

    def waits_for_nothing(self, stream) -> None:
        stream.wait_event(stream.record_event())

    monkeypatch.setattr(RankPool, "read_at", late)
    monkeypatch.setattr(LayerCopies, "fence", waits_for_nothing)
    first, second = job("first", random_tokens(60)), job("second", random_tokens(63, 1))
    rig.engine.admit(first, keep(Exported(rig.engine.layout)))
    rig.until(is_reading.is_set)
    rig.until(lambda: not rig.executor._running)
    rig.engine.admit(second, keep(Exported(rig.engine.layout)))
    rig.until(lambda: rig.executor.monitor.snapshot() == [2, 2])
    assert rig.executor.monitor.violations == []
    may_read.set()
    rig.until(lambda: len(violations(log)) > 0)
    assert violations(log)[0] == "rank 0 reads blocks [0, 1] while, or after, they are overwritten"


def test_a_read_that_waits_for_no_event(rig: Rig, log: Path) -> None:
    pool, layout = rig.executor._workers[0]._copies._copier._pool, rig.engine.layout
    own = torch.empty(2, 5, layout.num_kv_heads, layout.head_dim)
    pool.read(0, torch.tensor([3]), 0, own)
    assert violations(log) == ["rank 0 reads blocks [3], and waited for no event"]


def test_a_read_of_another_kind_is_an_error(rig: Rig) -> None:
    pool = rig.executor._workers[0]._copies._copier._pool
    with pytest.raises(Exception, match="in a way that the monitor does not know"):
        pool.layer(0).clone()


def test_a_block_that_nobody_gives_back(rig: Rig, log: Path) -> None:
    release = rig.executor.blocks.release
    rig.executor.blocks.release = lambda block_ids: release(block_ids[1:])
    rig.run([job("one", random_tokens(100))])
    rig.until(lambda: rig.executor.error is not None)
    assert violations(log) == ["nothing runs, and 1 blocks are held, of 0 requests"]
