"""What every prefill engine promises, of each of them on the same tiny model."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.block_pool import OutOfBlocksError
from cluster.ids import RequestId
from prefill_workers.engine import Held, PrefillEngine
from prefill_workers.megakernel_engine import MegaKernelPrefillEngine
from prefill_workers.torch_engine import TorchPrefillEngine
from tests.prefill_workers.exports import Exported, job, random_tokens, run
from tests.tiny_model import tiny_weights

BLOCK = 16
LAYERS = 2
MakeEngine = Callable[..., PrefillEngine]
"""Of (num_blocks, max_tokens_per_step): an engine with nothing in its cache."""


@pytest.fixture(params=["torch", "megakernel"])
def make_engine(request) -> MakeEngine:
    if request.param == "torch":
        return _torch_engine
    runtime = request.getfixturevalue("tiny_runtime")
    return lambda num_blocks=32, max_tokens_per_step=32: MegaKernelPrefillEngine(
        runtime, "model", num_blocks, BLOCK, max_tokens_per_step
    )


def _torch_engine(num_blocks: int = 32, max_tokens_per_step: int = 32) -> TorchPrefillEngine:
    return TorchPrefillEngine(tiny_weights(1), "model", num_blocks, BLOCK, max_tokens_per_step, num_threads=1)


def test_is_a_prefill_engine(make_engine):
    prefill = make_engine()
    assert prefill.free_kv_tokens == 32 * BLOCK
    assert prefill.layout.bytes_per_token_layer == 2 * 2 * 16 * 4
    assert not prefill.has_work()
    assert prefill.step() == []


def test_chunks_come_layer_by_layer_within_the_budget(make_engine):
    exported, _ = run(make_engine(), job("a", random_tokens(70), first_token=40))
    spans = [(c.layer, c.first_token, c.num_tokens) for c in exported.chunks]
    assert spans == [(0, 40, 24), (1, 40, 24), (0, 64, 6), (1, 64, 6)]


def test_several_jobs_share_a_step_oldest_first(make_engine):
    prefill, log = make_engine(), []
    for name, length in (("a", 20), ("b", 20), ("c", 5)):
        prefill.admit(
            job(name, random_tokens(length, seed=length)),
            lambda chunk, name=name: log.append((name, chunk.layer, chunk.first_token, chunk.num_tokens)),
        )
    assert [d.request_id for d in prefill.step()] == ["a"]
    assert log == [("a", 0, 0, 20), ("b", 0, 0, 12), ("a", 1, 0, 20), ("b", 1, 0, 12)]
    assert [d.request_id for d in prefill.step()] == ["b", "c"]
    assert not prefill.has_work()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    budget=st.integers(1, 80),
    length=st.integers(1, 150),
    neighbours=st.lists(st.integers(1, 60), max_size=3),
)
def test_neither_budget_nor_company_changes_a_bit(make_engine, budget, length, neighbours):
    tokens = random_tokens(length, seed=7)
    expected, _ = run(make_engine(max_tokens_per_step=1000), job("alone", tokens))
    prefill = make_engine(max_tokens_per_step=budget)
    exported = Exported(prefill.layout)
    for index, count in enumerate(neighbours):
        prefill.admit(job(f"n{index}", random_tokens(count, seed=index)), Exported(prefill.layout))
    prefill.admit(job("a", tokens), exported)
    while prefill.has_work():
        prefill.step()
    assert np.array_equal(exported.kv(0, length), expected.kv(0, length))


def test_a_cached_prefix_is_exported_with_the_same_bits(make_engine):
    tokens = random_tokens(100)
    fresh, _ = run(make_engine(), job("fresh", tokens))
    prefill = make_engine()
    run(prefill, job("first", tokens[:60]))
    exported, done = run(prefill, job("second", tokens, first_token=10))
    assert done.cached_tokens == 48
    assert np.array_equal(exported.kv(10, 100), fresh.kv(0, 100)[:, :, 10:])
    assert max(chunk.num_tokens for chunk in exported.chunks) <= 32


def test_a_wholly_cached_prompt_is_exported_without_computing(make_engine):
    prefill, tokens = make_engine(), random_tokens(64)
    first, _ = run(prefill, job("first", tokens))
    second, done = run(prefill, job("second", tokens))
    assert done.cached_tokens == 64
    assert np.array_equal(second.kv(0, 64), first.kv(0, 64))


def test_tenants_share_nothing(make_engine):
    prefill, tokens = make_engine(), random_tokens(64)
    run(prefill, job("first", tokens, tenant="a"))
    _, done = run(prefill, job("second", tokens, tenant="b"))
    assert done.cached_tokens == 0


def test_nothing_asked_for_is_done_at_once(make_engine):
    prefill = make_engine()
    exported, done = run(prefill, job("empty", []))
    assert (exported.chunks, done.cached_tokens) == ([], 0)
    exported, _ = run(prefill, job("all there", random_tokens(20), first_token=20))
    assert exported.chunks == []


def test_blocks_are_held_until_release_and_out_of_blocks_is_an_answer(make_engine):
    prefill = make_engine(num_blocks=10)
    ignored = Exported(prefill.layout)
    run(prefill, job("a", random_tokens(100, 1)), is_released=False)
    assert prefill.free_kv_tokens == 3 * BLOCK
    assert prefill.held == Held(num_jobs=1)
    big = job("b", random_tokens(80, 2))
    assert not prefill.can_admit(big)
    with pytest.raises(OutOfBlocksError):
        prefill.admit(big, ignored)
    assert prefill.free_kv_tokens == 3 * BLOCK
    assert prefill.can_admit(job("c", random_tokens(48, 3)))
    shares_six_blocks = random_tokens(100, 1) + random_tokens(40, 4)
    assert prefill.can_admit(job("d", shares_six_blocks))
    prefill.release(RequestId("a"))
    assert prefill.free_kv_tokens == 10 * BLOCK
    assert prefill.held == Held(num_jobs=0)
    assert prefill.can_admit(big)


def test_release_cancels_and_may_come_twice(make_engine):
    prefill = make_engine(max_tokens_per_step=16)
    exported = Exported(prefill.layout)
    prefill.admit(job("a", random_tokens(60)), exported)
    prefill.step()
    before = len(exported.chunks)
    prefill.release(RequestId("a"))
    prefill.release(RequestId("a"))
    assert not prefill.has_work()
    assert prefill.step() == []
    assert len(exported.chunks) == before
    assert prefill.free_kv_tokens == 32 * BLOCK
    _, done = run(prefill, job("a", random_tokens(60)))
    assert done.cached_tokens == 0, "a cancelled job's KV is incomplete and was never published"


def test_chunk_memory_outlives_the_slots_it_was_read_from(make_engine):
    prefill = make_engine(num_blocks=4)
    exported, _ = run(prefill, job("a", random_tokens(64, 1)))
    before = exported.kv(0, 64).copy()
    run(prefill, job("b", random_tokens(64, 2)))
    assert np.array_equal(exported.kv(0, 64), before)


@pytest.mark.parametrize(("request_id", "first_token"), [("a", 0), ("b", -1), ("b", 21)])
def test_a_job_that_makes_no_sense_is_refused(make_engine, request_id, first_token):
    prefill = make_engine()
    ignored = Exported(prefill.layout)
    prefill.admit(job("a", random_tokens(20)), ignored)
    free = prefill.free_kv_tokens
    with pytest.raises(ValueError, match=r"admitted already|outside"):
        prefill.admit(job(request_id, random_tokens(20), first_token=first_token), ignored)
    assert prefill.free_kv_tokens == free
