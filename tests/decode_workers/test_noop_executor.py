import numpy as np
import pytest

from cluster.kv_layout import KvLayout
from decode_workers.executor import StepExecutor
from decode_workers.noop_executor import NoopExecutor
from decode_workers.step_batch import NO_PARENT, StepBatch
from tests.decode_workers.head_asks import check_asks

LAYOUT = KvLayout(
    model_fingerprint="model",
    num_layers=2,
    num_kv_heads=1,
    head_dim=4,
    dtype="float32",
    block_size_tokens=16,
)


def batch(needs_logits: list[bool]) -> StepBatch:
    rows = len(needs_logits)
    return StepBatch(
        token_ids=np.zeros(rows, dtype=np.int32),
        positions=np.zeros(rows, dtype=np.int32),
        slots=np.arange(rows, dtype=np.int32),
        parents=np.full(rows, NO_PARENT, dtype=np.int32),
        sequence_starts=np.arange(rows + 1, dtype=np.int32),
        context_lengths=np.zeros(rows, dtype=np.int32),
        block_tables=np.zeros((rows, 1), dtype=np.int32),
        needs_logits=np.array(needs_logits),
    )


def test_every_token_is_the_fixed_one():
    executor: StepExecutor = NoopExecutor(LAYOUT, 10, 300, token_id=42)
    result = executor.run(batch([True, False, True]))
    assert result.rows.tolist() == [0, 2]
    assert result.logits.shape == (2, 300)
    assert result.logits.argmax(-1).tolist() == [42, 42]
    assert executor.layout is LAYOUT
    assert (executor.num_blocks, executor.vocab_size) == (10, 300)


def test_less_than_all_logits_may_be_asked_for():
    check_asks(NoopExecutor(LAYOUT, 10, 300, token_id=42), batch([True] * 7))


def test_sampling_picks_it_too():
    logits = NoopExecutor(LAYOUT, 10, 50_000, token_id=42).run(batch([True])).logits[0].astype(np.float64)
    weights = np.exp((logits - logits.max()) / 2.0)
    assert weights[42] / weights.sum() > 1 - 1e-12


def test_steps_share_one_read_only_array():
    executor = NoopExecutor(LAYOUT, 10, 300, token_id=42)
    first, second = executor.run(batch([True] * 64)).logits, executor.run(batch([True])).logits
    assert np.shares_memory(first, second)
    assert not first.flags.writeable


def test_measures_next_to_nothing_for_every_bucket():
    executor = NoopExecutor(LAYOUT, 10, 300, token_id=42)
    costs = executor.measure()
    assert [cost.rows for cost in costs] == list(executor.buckets)
    assert all(0 < cost.ms < 0.1 for cost in costs)


@pytest.mark.parametrize("token_id", [-1, 300])
def test_a_token_outside_the_vocabulary_is_refused(token_id):
    with pytest.raises(ValueError, match=r"outside the vocabulary \[0, 300\)"):
        NoopExecutor(LAYOUT, 10, 300, token_id=token_id)
