"""Measuring what a step costs leaves an engine as it was, also one that lets go of a prompt later."""

import time

import pytest

from prefill_workers.engine import Held
from prefill_workers.rank_channel import RankClient
from prefill_workers.step_table import measure_step_table
from prefill_workers.torch_engine import TorchPrefillEngine
from tests.prefill_workers.test_trtllm import BLOCK, WEIGHTS, Rig


@pytest.fixture
def slow_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    settle = RankClient._settle

    def late(self, number: int) -> None:
        time.sleep(0.1)
        settle(self, number)

    monkeypatch.setattr(RankClient, "_settle", late)


def test_an_engine_whose_ranks_are_slow_to_let_go(slow_ranks) -> None:
    """There is staging memory for one measurement at a time; the pool is the whole one afterwards."""
    layout = TorchPrefillEngine(WEIGHTS, "tiny", 4, 16, 64, 1).layout
    rig = Rig(layout, staging_bytes=70 * layout.bytes_per_token, num_blocks=10)
    table = measure_step_table(rig.engine, 64, WEIGHTS.shape.vocab_size)
    assert [cost.rows for cost in table] == [16, 64]
    assert rig.engine.held == Held(num_jobs=0)
    assert rig.engine.free_kv_tokens == 10 * BLOCK
    rig.engine.close()
