"""The real engine and connector against the double: the same KV as PyTorch's engine, and nothing leaked."""

import itertools
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from unittest.mock import Mock

import msgspec
import numpy as np
import pytest

from cluster.block_hash import chain_hashes, chain_salt
from prefill_workers.copy_costs import CopyCosts
from prefill_workers.engine import Held, PrefillDone, PrefillFailed
from prefill_workers.piece_copier import PieceCopier
from prefill_workers.torch_engine import TorchPrefillEngine
from tests.prefill_workers.exports import Exported, job, random_tokens
from tests.tensorrt import use_double
from tests.tiny_model import tiny_weights

use_double()

from tensorrt_llm.executor import ModelSource  # noqa: E402 - where the double is was not known before
from tensorrt_llm.llmapi import LLM, KvCacheConfig, TorchLlmArgs  # noqa: E402

from prefill_workers.export_engine import EngineLostError, ExportEngine  # noqa: E402
from prefill_workers.kv_scales import KvScaleError  # noqa: E402
from prefill_workers.pool_layout import RankPool  # noqa: E402
from prefill_workers.rank_channel import ChannelError  # noqa: E402
from prefill_workers.trtllm_connector import ExportScheduler  # noqa: E402
from prefill_workers.trtllm_engine import TensorRtLlmSettings, start_engine  # noqa: E402

WEIGHTS = tiny_weights(1, num_layers=3, num_kv_heads=2, max_context_tokens=4096)
BLOCK = 32


@pytest.fixture
def torch_engine() -> TorchPrefillEngine:
    return TorchPrefillEngine(WEIGHTS, "tiny", 400, 16, 256, 1)


class Rig:
    def __init__(self, layout, **changes) -> None:
        ModelSource.known["tiny"] = WEIGHTS
        ModelSource.longest_delay_s = changes.pop("delay_s", 0.0)
        ModelSource.names_salts = changes.pop("names_salts", False)
        self.num_blocks = changes.pop("num_blocks", 200)
        settings = {
            "model": "tiny",
            "kv_dtype": "float32",
            "max_tokens_per_step": 64,
            "max_context_tokens": 4000,
            "max_running": 16,
            "staging_bytes": 8 << 20,
            "lease_s": 30.0,
            "start_timeout_s": 10.0,
            "index_block_tokens": 16,
        }
        layout = msgspec.structs.replace(layout, block_size_tokens=BLOCK)
        self.engine: ExportEngine = start_engine(
            TensorRtLlmSettings(**{**settings, **changes}), layout, self.num_blocks
        )
        self.executor = ModelSource.started[-1]

    def run(self, jobs, cancel: Callable[[], bool] = lambda: False) -> dict:
        """All of them at once; what each exported, and how it ended. Released at its end, or in between."""
        exported = {one.request_id: Exported(self.engine.layout) for one in jobs}
        ends, waiting, running = {}, list(jobs), set()
        while waiting or running:
            while waiting and self.engine.can_admit(waiting[0]):
                one = waiting.pop(0)
                self.engine.admit(one, keep(exported[one.request_id]))
                running.add(one.request_id)
            for end in self.engine.step():
                ends[end.request_id] = end
                self.engine.release(end.request_id)
                running.discard(end.request_id)
            for request_id in sorted(running):
                if cancel():
                    self.engine.release(request_id)
                    running.discard(request_id)
        return {name: (exported[name], end) for name, end in ends.items()}

    def until(self, is_so: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 60
        while not is_so():
            assert time.monotonic() < deadline_s
            self.engine.step()

    def assert_nothing_is_held(self) -> None:
        self.until(lambda: not self.engine.has_work())
        self.until(lambda: not self.executor._running and not self.executor._waiting)
        assert self.engine.free_kv_tokens == self.num_blocks * BLOCK
        assert self.engine.held == Held(num_jobs=0)
        assert self.engine.can_admit(job("as long as the pool", random_tokens(500)))
        assert self.executor.blocks.num_used_blocks == 0
        self.executor.blocks.check()
        assert self.executor.monitor.violations == []
        assert self.executor.error is None
        last = job("behind them all", random_tokens(5, 99))
        self.engine.admit(last, lambda _: None)
        self.until(lambda: self.engine._jobs[last.request_id].is_reported)
        assert self.executor._scheduler._pieces._requests == {}
        self.engine.release(last.request_id)


def keep(exported: Exported):
    """A chunk's memory is the engine's again once the job is released."""

    def export(chunk) -> None:
        data = memoryview(bytes(chunk.data))
        exported(type(chunk)(chunk.layer, chunk.first_token, chunk.num_tokens, data))

    return export


@pytest.fixture
def rig(torch_engine, request) -> Iterator[Rig]:
    made = Rig(torch_engine.layout, **getattr(request, "param", {}))
    yield made
    made.engine.close()


def expected(engine: TorchPrefillEngine, one) -> np.ndarray:
    exported = Exported(engine.layout)
    engine.admit(one, exported)
    while not engine.step():
        pass
    engine.release(one.request_id)
    return exported.kv(one.first_token, len(one.token_ids))


@pytest.fixture
def shortest_layerwise(monkeypatch, request) -> None:
    """What the ranks measure, one after the other: pieces of so many tokens or more go layer by layer."""
    tokens = itertools.cycle(request.param)
    costs = lambda _: CopyCosts(start_us=next(tokens) - 1.0, token_us=1.0)  # noqa: E731
    monkeypatch.setattr(PieceCopier, "measure", costs)


@pytest.mark.parametrize(
    ("rig", "shortest_layerwise"),
    [
        ({}, (32,)),
        ({"tensor_parallel_size": 2}, (1,)),
        ({"tensor_parallel_size": 2}, (9999,)),
        ({"tensor_parallel_size": 2}, (1, 9999)),
        ({"tensor_parallel_size": 4}, (32, 64)),
    ],
    indirect=True,
)
def test_the_kv_is_that_of_the_pytorch_engine(shortest_layerwise, rig, torch_engine) -> None:
    """Bitwise, of 50 prompts, chunked, cached and in part already there, 16 at once; whether ranks copy layer
    by layer, whole, or each in another way."""
    dice = random.Random(0)
    shared = random_tokens(200, 7)
    jobs = []
    for number in range(50):
        length = dice.choice([5, 31, 32, 33, 70, 130, 400, 2000 if number == 0 else 90])
        begin = shared[: dice.choice([0, 0, 64, 150])]
        tokens = (*begin, *random_tokens(length, number))
        jobs.append(job(f"j{number}", tokens, dice.choice([0, 0, len(begin), 3])))
    ends = rig.run(jobs)
    assert sum(end.cached_tokens for _, end in ends.values()) > 0
    for one in jobs:
        exported, end = ends[one.request_id]
        assert isinstance(end, PrefillDone)
        kv = exported.kv(one.first_token, len(one.token_ids))
        np.testing.assert_array_equal(kv, expected(torch_engine, one))
    rig.assert_nothing_is_held()


@pytest.mark.parametrize("rig", [{"kv_dtype": "fp8", "tensor_parallel_size": 2}], indirect=True)
def test_kv_of_a_pool_of_eight_bits_is_off_by_its_rounding(rig, torch_engine) -> None:
    """E4M3 without a scale: by a 16th of a value, below 2**-6 by 2**-10."""
    one = job("one", random_tokens(150))
    exported, _ = rig.run([one])["one"]
    kv, right = exported.kv(0, 150), expected(torch_engine, one)
    assert not np.array_equal(kv, right)
    assert (np.abs(kv - right) <= np.abs(right) / 16 + 2**-10).all()


@pytest.mark.parametrize("rig", [{"tensor_parallel_size": 2, "delay_s": 0.004}], indirect=True)
def test_a_hook_is_called_before_its_layer_is_there(rig, torch_engine) -> None:
    """Copies that did not wait would find what is not a number."""
    jobs = [job(f"j{number}", random_tokens(300 - 100 * number, number)) for number in range(3)]
    for one, (exported, _) in zip(jobs, rig.run(jobs).values(), strict=True):
        np.testing.assert_array_equal(exported.kv(0, len(one.token_ids)), expected(torch_engine, one))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "rig",
    [{"tensor_parallel_size": 2, "delay_s": 0.001, "num_blocks": 40, "staging_bytes": 1 << 19}],
    indirect=True,
)
def test_cancels_at_any_time_leave_nothing_and_harm_nobody(rig, torch_engine, seed: int) -> None:
    """With room for a few at once: what one lets go, another has at once."""
    dice = random.Random(seed)
    jobs = [job(f"j{number}", random_tokens(dice.choice([5, 40, 100, 300]), number)) for number in range(24)]
    ends = rig.run(jobs, cancel=lambda: dice.random() < 0.02)
    assert 0 < len(ends) < len(jobs)
    for one in jobs:
        if one.request_id in ends:
            exported, end = ends[one.request_id]
            assert isinstance(end, PrefillDone)
            np.testing.assert_array_equal(exported.kv(0, len(one.token_ids)), expected(torch_engine, one))
    rig.assert_nothing_is_held()


@pytest.mark.parametrize("rig", [{"num_blocks": 2}], indirect=True)
def test_a_step_waits_until_what_it_overwrites_is_read(rig, torch_engine, monkeypatch) -> None:
    """Blocks of a request that has ended are another's at once: its forward pass must not be early."""
    read, may_read, is_reading = RankPool.read_at, threading.Event(), threading.Event()

    def late(self, layers, places, own) -> None:
        if own.shape[2] == 60:
            is_reading.set()
            assert may_read.wait(10)
        read(self, layers, places, own)

    monkeypatch.setattr(RankPool, "read_at", late)
    first, second = job("first", random_tokens(60)), job("second", random_tokens(63, 1))
    exported = {one.request_id: Exported(rig.engine.layout) for one in (first, second)}
    rig.engine.admit(first, keep(exported["first"]))
    rig.until(is_reading.is_set)
    rig.until(lambda: not rig.executor._running)
    assert rig.executor.blocks.num_used_blocks == 0
    rig.engine.admit(second, keep(exported["second"]))
    for _ in range(5):
        rig.engine.step()
    assert exported["second"].chunks == []
    may_read.set()
    for one in (first, second):
        running = rig.engine._jobs[one.request_id]
        rig.until(lambda running=running: running.is_reported)
        assert running.failure is None
        kv = exported[one.request_id].kv(0, len(one.token_ids))
        np.testing.assert_array_equal(kv, expected(torch_engine, one))


@pytest.mark.parametrize("rig", [{"lease_s": 0.3, "tensor_parallel_size": 2}], indirect=True)
def test_a_lease_that_is_over_ends_an_export_without_a_word(rig) -> None:
    one = job("one", random_tokens(100))
    rig.engine.admit(one, keep(Exported(rig.engine.layout)))
    rig.until(lambda: rig.engine._jobs[one.request_id].failure is not None)
    assert "its lease is over" in rig.engine._jobs[one.request_id].failure
    rig.engine.release(one.request_id)
    rig.assert_nothing_is_held()


@pytest.mark.parametrize(
    ("rig", "shortest_layerwise", "named"),
    [({}, (1,), "layer 1"), ({}, (9999,), "layers 0 to 2")],
    indirect=["rig", "shortest_layerwise"],
)
def test_a_copy_that_fails_fails_its_job_alone(
    shortest_layerwise, rig, torch_engine, monkeypatch, named
) -> None:
    read = RankPool.read_at

    def fails(self, layers, places, own) -> None:
        if own.shape[2] == 41 and 1 in layers:
            raise RuntimeError("an uncorrectable memory error")
        read(self, layers, places, own)

    monkeypatch.setattr(RankPool, "read_at", fails)
    bad, good = job("bad", random_tokens(41)), job("good", random_tokens(60, 1))
    ends = rig.run([bad, good])
    assert isinstance(ends["bad"][1], PrefillFailed)
    assert ends["bad"][1].message == f"rank 0: {named}: an uncorrectable memory error"
    np.testing.assert_array_equal(ends["good"][0].kv(0, 60), expected(torch_engine, good))
    rig.assert_nothing_is_held()


@pytest.mark.parametrize(
    ("rig", "shortest_layerwise"), [({"max_tokens_per_step": 512}, (400,))], indirect=True
)
def test_layers_are_exported_while_the_last_one_is_computed(shortest_layerwise, rig, record_figure) -> None:
    """The forward pass is held at its last layer until all before it have come."""
    layout, num_tokens = rig.engine.layout, 400
    exported, are_there, num_bytes_then = Exported(layout), threading.Event(), []

    def num_bytes() -> int:
        return sum(chunk.data.nbytes for chunk in exported.chunks)

    def export(chunk) -> None:
        keep(exported)(chunk)
        if num_bytes() == (layout.num_layers - 1) * num_tokens * layout.bytes_per_token_layer:
            are_there.set()

    def before_layer(layer: int) -> None:
        if layer == layout.num_layers - 1:
            are_there.wait(60)
            num_bytes_then.append(num_bytes())

    rig.executor.before_layer = before_layer
    one = job("one", random_tokens(num_tokens))
    rig.engine.admit(one, export)
    rig.until(lambda: rig.engine._jobs[one.request_id].is_reported)
    assert are_there.is_set()
    assert num_bytes() == num_tokens * layout.bytes_per_token
    record_figure(f"KV exported before the forward pass ended: {num_bytes_then[0]} of {num_bytes()} bytes")
    rig.engine.release(one.request_id)
    rig.assert_nothing_is_held()


@pytest.mark.parametrize("shortest_layerwise", [(400, 70)], indirect=True)
def test_what_each_rank_chose_is_logged_once(shortest_layerwise, torch_engine, caplog) -> None:
    with caplog.at_level(logging.INFO, "prefill_workers.export_engine"):
        rig = Rig(torch_engine.layout, tensor_parallel_size=2)
    rig.engine.close()
    assert caplog.messages == [
        f"rank {rank} copies KV layer by layer from {tokens} tokens on: a copy takes {tokens - 1}.0 us to "
        "start, a layer 1.0000 us a token"
        for rank, tokens in enumerate((400, 70))
    ]


def test_what_the_engine_refuses_is_refused_and_leaves_nothing(rig) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        rig.engine.admit(job("none", []), keep(Exported(rig.engine.layout)))
    with pytest.raises(ValueError, match="first_token 9"):
        rig.engine.admit(job("outside", [1, 2], 9), keep(Exported(rig.engine.layout)))
    assert not rig.engine.can_admit(job("too long", random_tokens(200 * BLOCK + 1)))
    rig.assert_nothing_is_held()


@pytest.mark.parametrize("rig", [{"tensor_parallel_size": 2}], indirect=True)
def test_a_rank_that_is_gone_ends_the_engine(rig) -> None:
    rig.executor._workers[1]._client.close()
    for ask in (
        lambda: rig.until(lambda: False),
        rig.engine.step,
        lambda: rig.engine.can_admit(job("j", [1])),
    ):
        with pytest.raises(EngineLostError, match="the worker of rank 1 has left"):
            ask()


def test_ranks_let_go_where_the_worker_is_gone(torch_engine) -> None:
    rig = Rig(torch_engine.layout)
    rig.engine.admit(job("one", random_tokens(100)), keep(Exported(rig.engine.layout)))
    clients = [rig.executor._scheduler._client, *(worker._client for worker in rig.executor._workers)]
    assert all(client.export(1) is not None for client in clients)
    rig.engine._hub.close()
    deadline_s = time.monotonic() + 60
    while any(client.export(1) is not None for client in clients):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    rig.executor.shutdown()
    rig.engine._arena.close()


def test_a_pool_that_is_smaller_than_asked_for_is_refused(torch_engine, monkeypatch) -> None:
    config = "prefill_workers.trtllm_engine.KvCacheConfig"
    short = KvCacheConfig(max_tokens=10 * BLOCK, tokens_per_block=BLOCK, dtype="float32")
    monkeypatch.setattr(config, lambda **_: short)
    with pytest.raises(ChannelError, match="KV blocks for 320 tokens, and 6400 were asked for"):
        Rig(torch_engine.layout)


def test_without_mpi_it_says_why_it_does_not_start(torch_engine, monkeypatch) -> None:
    monkeypatch.setenv("TLLM_DISABLE_MPI", "1")
    with pytest.raises(ChannelError, match="unset it"):
        Rig(torch_engine.layout)


def test_a_connector_outside_of_headrace_says_so() -> None:
    with pytest.raises(ChannelError, match="a Headrace prefill worker starts"):
        ExportScheduler(TorchLlmArgs(model="tiny"))


def test_a_step_does_not_wait_for_a_request(rig) -> None:
    """`result(timeout=0)` would."""
    may_go_on = threading.Event()
    rig.executor.before_layer = lambda _: may_go_on.wait(10)
    one = job("one", random_tokens(10))
    rig.engine.admit(one, keep(Exported(rig.engine.layout)))
    assert rig.engine.step() == []
    may_go_on.set()
    rig.until(lambda: rig.engine._jobs[one.request_id].is_reported)
    rig.engine.release(one.request_id)
    rig.assert_nothing_is_held()


@pytest.mark.parametrize("index", [8, 16, 32, 48])
@pytest.mark.parametrize("names_salts", [False, True])
def test_what_is_in_its_prefix_cache_is_announced(torch_engine, names_salts: bool, index: int) -> None:
    """Of three tenants' prompts that share prefixes, in a pool that evicts; also behind the last prompt."""
    rig = Rig(torch_engine.layout, names_salts=names_salts, num_blocks=24, index_block_tokens=index)
    dice, announced, num_removed = random.Random(index), set[bytes](), 0
    fingerprint = rig.engine.layout.fingerprint

    def catch_up() -> bool:
        nonlocal num_removed
        changes = rig.engine.drain_changes()
        assert not announced & set(changes.stored)
        assert set(changes.removed) <= announced
        num_removed += len(changes.removed)
        announced.difference_update(changes.removed)
        announced.update(changes.stored)
        assert announced == set(rig.engine.all_hashes())
        return announced == {
            chain_hash
            for tenant, tokens in cached_prefixes(rig, tenants)
            for chain_hash in chain_hashes(tokens, index, chain_salt(fingerprint, tenant))
        }

    tenants = ["a", "b", ""]
    for batch in range(4):
        jobs = []
        for number in range(6):
            tenant = dice.choice(tenants)
            shared = random_tokens(100, tenants.index(tenant))[: dice.choice([40, 70, 100])]
            tokens = [*shared, *random_tokens(dice.choice([5, 40, 90]), 10 * batch + number)]
            jobs.append(job(f"{batch} {number}", tokens, tenant=tenant))
        rig.run(jobs)
        rig.until(catch_up)
    assert announced
    assert num_removed
    rig.engine.close()


def cached_prefixes(rig: Rig, tenants: list[str]) -> Iterator[tuple[str, list[int]]]:
    """Of each full block in the double's pool, its tenant and the tokens up to its end."""
    roots = {chain_salt("double", tenant): tenant for tenant in tenants}
    full = {entry.chain_hash: entry for entry in list(rig.executor.blocks._cached.values())}
    for entry in full.values():
        tokens = list[int]()
        while entry.chain_hash is not None:
            tokens[:0] = entry.token_ids
            if entry.parent in roots:
                yield roots[entry.parent], tokens
                break
            entry = full[entry.parent]


def test_events_that_cannot_be_fetched_harm_nobody(torch_engine, monkeypatch) -> None:
    def fails(self, timeout=None) -> list:
        raise RuntimeError("the connection is gone")

    monkeypatch.setattr(LLM, "get_kv_cache_events", fails)
    rig = Rig(torch_engine.layout)
    assert isinstance(rig.run([job("one", random_tokens(100))])["one"][1], PrefillDone)
    assert rig.engine.all_hashes() == []
    rig.engine.close()


def test_a_checkpoint_that_its_pool_cannot_hold_does_not_start(torch_engine, tmp_path) -> None:
    config = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "NVFP4"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(config))
    with pytest.raises(KvScaleError, match="asks for KV in NVFP4; known is FP8"):
        Rig(torch_engine.layout, model=str(tmp_path), kv_dtype="auto")


def test_ranks_that_do_not_come_are_named(torch_engine, monkeypatch) -> None:
    ModelSource.known["tiny"] = WEIGHTS
    monkeypatch.setattr("tensorrt_llm.llmapi.Executor", Mock())
    with pytest.raises(ChannelError, match=r"after 0.2 s ranks \[\] of 2 have loaded the connector"):
        start_engine(
            TensorRtLlmSettings(
                model="tiny",
                tensor_parallel_size=2,
                max_tokens_per_step=64,
                max_context_tokens=100,
                max_running=1,
                staging_bytes=4096,
                lease_s=1.0,
                start_timeout_s=0.2,
                index_block_tokens=16,
            ),
            torch_engine.layout,
            4,
        )
