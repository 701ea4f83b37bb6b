import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.block_pool import OutOfBlocksError
from cluster.ids import RequestId
from cluster.transfer import KvChunk
from decode_workers.step_batch import NO_PARENT, StepBatch
from decode_workers.torch_executor import TorchExecutor, context_slots
from megakernel.model.weights import Weights
from prefill_workers.engine import PrefillEngine, PrefillJob
from prefill_workers.torch_engine import TorchPrefillEngine
from tests.tiny_model import tiny_weights

BLOCK = 8
LAYERS = 2
TOKEN_LAYER_BYTES = 2 * 2 * 16 * 4


def engine(num_blocks: int = 64, max_tokens_per_step: int = 32) -> TorchPrefillEngine:
    return TorchPrefillEngine(tiny_weights(1), "model", num_blocks, BLOCK, max_tokens_per_step, num_threads=1)


@pytest.fixture(scope="module")
def executor() -> TorchExecutor:
    return TorchExecutor(tiny_weights(1), "model", 64, BLOCK, num_threads=1)


def job(name: str, tokens: list[int], first_token: int = 0, tenant: str = "") -> PrefillJob:
    return PrefillJob(
        request_id=RequestId(name), token_ids=tuple(tokens), first_token=first_token, tenant=tenant
    )


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 160, count).tolist()


class Exported:
    """Gathers a job's chunks and puts them together, checking that each token comes once a layer."""

    def __init__(self) -> None:
        self.chunks: list[KvChunk] = []

    def __call__(self, chunk: KvChunk) -> None:
        self.chunks.append(chunk)

    def kv(self, first_token: int, end: int) -> np.ndarray:
        """[layers, 2, tokens, kv_heads * head_dim]"""
        kv = np.full((LAYERS, 2, end, 32), np.nan, dtype=np.float32)
        for chunk in self.chunks:
            assert len(chunk.data) == chunk.num_tokens * TOKEN_LAYER_BYTES
            span = slice(chunk.first_token, chunk.first_token + chunk.num_tokens)
            assert np.isnan(kv[chunk.layer, :, span]).all(), "a token was exported twice"
            kv[chunk.layer, :, span] = np.frombuffer(chunk.data, np.float32).reshape(2, -1, 32)
        assert np.isnan(kv[:, :, :first_token]).all()
        assert not np.isnan(kv[:, :, first_token:]).any(), "a token is missing"
        return kv[:, :, first_token:]


def run(prefill: TorchPrefillEngine, one: PrefillJob, is_released: bool = True):
    exported, done = Exported(), []
    prefill.admit(one, exported)
    while prefill.has_work():
        done += prefill.step()
    if is_released:
        prefill.release(one.request_id)
    assert [d.request_id for d in done] == [one.request_id]
    return exported, done[0]


def test_is_a_prefill_engine():
    typed: PrefillEngine = engine()
    assert typed.free_kv_tokens == 64 * BLOCK
    assert typed.layout.bytes_per_token_layer == TOKEN_LAYER_BYTES
    assert not typed.has_work()
    assert typed.step() == []


def test_chunks_come_layer_by_layer_within_the_budget():
    exported, _ = run(engine(max_tokens_per_step=32), job("a", random_tokens(70), first_token=40))
    spans = [(c.layer, c.first_token, c.num_tokens) for c in exported.chunks]
    assert spans == [(0, 40, 24), (1, 40, 24), (0, 64, 6), (1, 64, 6)]


def test_several_jobs_share_a_step_oldest_first():
    prefill, log = engine(max_tokens_per_step=32), []
    for name, length in (("a", 20), ("b", 20), ("c", 5)):
        prefill.admit(
            job(name, random_tokens(length, seed=length)),
            lambda chunk, name=name: log.append((name, chunk.layer, chunk.first_token, chunk.num_tokens)),
        )
    assert [d.request_id for d in prefill.step()] == ["a"]
    assert log == [("a", 0, 0, 20), ("b", 0, 0, 12), ("a", 1, 0, 20), ("b", 1, 0, 12)]
    assert [d.request_id for d in prefill.step()] == ["b", "c"]
    assert not prefill.has_work()


@settings(max_examples=15, deadline=None)
@given(
    budget=st.integers(1, 80),
    length=st.integers(1, 150),
    neighbours=st.lists(st.integers(1, 60), max_size=3),
)
def test_neither_budget_nor_company_changes_a_bit(budget, length, neighbours):
    tokens = random_tokens(length, seed=7)
    expected, _ = run(engine(max_tokens_per_step=1000), job("alone", tokens))
    prefill, exported = engine(max_tokens_per_step=budget), Exported()
    for index, count in enumerate(neighbours):
        prefill.admit(job(f"n{index}", random_tokens(count, seed=index)), Exported())
    prefill.admit(job("a", tokens), exported)
    while prefill.has_work():
        prefill.step()
    assert np.array_equal(exported.kv(0, length), expected.kv(0, length))


def test_a_cached_prefix_is_exported_with_the_same_bits():
    tokens = random_tokens(100)
    fresh, _ = run(engine(), job("fresh", tokens))
    prefill = engine(max_tokens_per_step=32)
    run(prefill, job("first", tokens[:60]))
    exported, done = run(prefill, job("second", tokens, first_token=10))
    assert done.cached_tokens == 56
    assert np.array_equal(exported.kv(10, 100), fresh.kv(0, 100)[:, :, 10:])
    assert max(chunk.num_tokens for chunk in exported.chunks) <= 32


def test_a_wholly_cached_prompt_is_exported_without_computing():
    prefill, tokens = engine(), random_tokens(64)
    first, _ = run(prefill, job("first", tokens))
    second, done = run(prefill, job("second", tokens))
    assert done.cached_tokens == 64
    assert np.array_equal(second.kv(0, 64), first.kv(0, 64))


def test_tenants_share_nothing():
    prefill, tokens = engine(), random_tokens(64)
    run(prefill, job("first", tokens, tenant="a"))
    _, done = run(prefill, job("second", tokens, tenant="b"))
    assert done.cached_tokens == 0


def test_nothing_asked_for_is_done_at_once():
    prefill = engine()
    exported, done = run(prefill, job("empty", []))
    assert (exported.chunks, done.cached_tokens) == ([], 0)
    exported, _ = run(prefill, job("all there", random_tokens(20), first_token=20))
    assert exported.chunks == []


def test_blocks_are_held_until_release_and_out_of_blocks_is_an_answer():
    prefill = engine(num_blocks=10)
    run(prefill, job("a", random_tokens(50, 1)), is_released=False)
    assert prefill.free_kv_tokens == 3 * BLOCK
    big = job("b", random_tokens(40, 2))
    assert not prefill.can_admit(big)
    with pytest.raises(OutOfBlocksError):
        prefill.admit(big, Exported())
    assert prefill.free_kv_tokens == 3 * BLOCK
    assert prefill.can_admit(job("c", random_tokens(24, 3)))
    assert prefill.can_admit(job("d", random_tokens(50, 1) + random_tokens(20, 4))), (
        "shares six blocks with a"
    )
    prefill.release(RequestId("a"))
    assert prefill.free_kv_tokens == 10 * BLOCK
    assert prefill.can_admit(big)


def test_release_cancels_and_may_come_twice():
    prefill, exported = engine(max_tokens_per_step=16), Exported()
    prefill.admit(job("a", random_tokens(60)), exported)
    prefill.step()
    before = len(exported.chunks)
    prefill.release(RequestId("a"))
    prefill.release(RequestId("a"))
    assert not prefill.has_work()
    assert prefill.step() == []
    assert len(exported.chunks) == before
    assert prefill.free_kv_tokens == 64 * BLOCK
    _, done = run(prefill, job("a", random_tokens(60)))
    assert done.cached_tokens == 0, "a cancelled job's KV is incomplete and was never published"


def test_chunk_memory_outlives_the_slots_it_was_read_from():
    prefill = engine(num_blocks=8)
    exported, _ = run(prefill, job("a", random_tokens(64, 1)))
    before = exported.kv(0, 64).copy()
    run(prefill, job("b", random_tokens(64, 2)))
    assert np.array_equal(exported.kv(0, 64), before)


@pytest.mark.parametrize(("request_id", "first_token"), [("a", 0), ("b", -1), ("b", 21)])
def test_a_job_that_makes_no_sense_is_refused(request_id, first_token):
    prefill = engine()
    prefill.admit(job("a", random_tokens(20)), Exported())
    free = prefill.free_kv_tokens
    with pytest.raises(ValueError, match=r"admitted already|outside"):
        prefill.admit(job(request_id, random_tokens(20), first_token=first_token), Exported())
    assert prefill.free_kv_tokens == free


def next_token_logits(
    executor: TorchExecutor, tokens: list[int], context: int, table: list[int]
) -> np.ndarray:
    """Of the last token; rows are tokens[context:], in steps of at most 64."""
    slots = context_slots(np.array(table, dtype=np.int32), len(tokens), BLOCK).astype(np.int32)
    for start in range(context, len(tokens), 64):
        rows = np.arange(start, min(start + 64, len(tokens)), dtype=np.int32)
        result = executor.run(
            StepBatch(
                token_ids=np.array(tokens, dtype=np.int32)[rows],
                positions=rows,
                slots=slots[rows],
                parents=np.array([NO_PARENT, *range(len(rows) - 1)], dtype=np.int32),
                sequence_starts=np.array([0, len(rows)], dtype=np.int32),
                context_lengths=np.array([start], dtype=np.int32),
                block_tables=np.array([table], dtype=np.int32),
                needs_logits=rows == len(tokens) - 1,
            )
        )
    return result.logits[0]


def hand_off(exported: Exported, executor: TorchExecutor, num_tokens: int, table: list[int]) -> None:
    slots = context_slots(np.array(table, dtype=np.int32), num_tokens, BLOCK).astype(np.int32)
    for chunk in exported.chunks:
        span = slice(chunk.first_token, chunk.first_token + chunk.num_tokens)
        executor.write_kv(chunk.layer, slots[span], chunk.data)


def test_handed_over_kv_gives_the_bits_of_a_local_chain(executor):
    tokens = random_tokens(150, seed=11)
    exported, _ = run(engine(max_tokens_per_step=48), job("a", tokens[:-1]))
    there, here = list(range(40, 60)), list(range(20))
    hand_off(exported, executor, 149, there)
    handed_over = next_token_logits(executor, tokens, 149, there)
    assert np.array_equal(handed_over, next_token_logits(executor, tokens, 0, here))


@pytest.mark.slow
def test_handed_over_kv_of_the_packaged_model_gives_the_bits_of_a_local_chain():
    from megakernel.model.load import PACKAGED_MODEL, open_model

    weights: Weights = open_model(PACKAGED_MODEL).weights
    tokens = np.random.default_rng(0).integers(0, 49_000, 300).tolist()
    prefill = TorchPrefillEngine(weights, "model", 40, BLOCK, 200, num_threads=2)
    exported = Exported()
    prefill.admit(job("a", tokens[:-1]), exported)
    while prefill.has_work():
        prefill.step()
    # The other worker has another number of threads: the bits must not know.
    executor = TorchExecutor(weights, "model", 80, BLOCK, num_threads=1)
    there, here = list(range(40, 80)), list(range(40))
    hand_off(exported, executor, 299, there)
    handed_over = next_token_logits(executor, tokens, 299, there)
    assert np.array_equal(handed_over, next_token_logits(executor, tokens, 0, here))
