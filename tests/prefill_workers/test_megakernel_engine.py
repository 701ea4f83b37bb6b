"""KV from the compiled megakernel: near PyTorch's, and the same bits however a prompt is cut and mixed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.ids import RequestId
from megakernel.step import Rows, StepError
from prefill_workers.chunked_engine import Chunk
from prefill_workers.megakernel_engine import MegaKernelPrefillEngine, _rows
from prefill_workers.torch_engine import TorchPrefillEngine
from tests.prefill_workers.exports import Exported, job, random_tokens, run
from tests.tiny_model import tiny_weights

POOL_TOKENS = 1024


def engine(runtime, max_tokens_per_step: int = 256) -> MegaKernelPrefillEngine:
    return MegaKernelPrefillEngine(
        runtime, "model", runtime.num_blocks, runtime.block_size_tokens, max_tokens_per_step
    )


@pytest.fixture(scope="module", params=[(16, "float32"), (32, "float16")], ids=["blocks of 16", "of 32"])
def runtime(request, open_runtime):
    block_size_tokens, kv_format = request.param
    return open_runtime(tiny_weights(1), POOL_TOKENS // block_size_tokens, block_size_tokens, kv_format)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_kv_is_near_that_of_pytorch(open_runtime, architecture):
    """Within float32 rounding: the two sum in different orders."""
    weights, tokens = tiny_weights(2, architecture), random_tokens(300)
    prefill = engine(open_runtime(weights, 20, 16), max_tokens_per_step=256)
    exported, _ = run(prefill, job("a", tokens))
    oracle, _ = run(TorchPrefillEngine(weights, "model", 20, 16, 256, num_threads=1), job("a", tokens))
    assert prefill.layout == oracle.layout
    np.testing.assert_allclose(exported.kv(0, 300), oracle.kv(0, 300), atol=2e-4)


@pytest.mark.parametrize("budget", [1, 7, 33, 255])
def test_a_long_prompt_is_the_same_bits_in_chunks_of_any_size(runtime, budget):
    tokens = random_tokens(400, seed=3)
    wide, _ = run(engine(runtime, 256), job("wide", tokens))
    assert {chunk.num_tokens for chunk in wide.chunks} == {256, 144}
    narrow, _ = run(engine(runtime, budget), job("narrow", tokens))
    assert np.array_equal(narrow.kv(0, 400), wide.kv(0, 400))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_company_and_cached_prefixes_change_no_bit(runtime, data):
    """Jobs that share prefixes come while others run, over blocks in whatever order they were let go."""
    prefill = engine(runtime, data.draw(st.integers(1, 300), label="budget"))
    trunk, exports = random_tokens(300, seed=5), {}
    for index in range(data.draw(st.integers(2, 6), label="jobs")):
        shared = data.draw(st.integers(0, 200), label="shared")
        tokens = trunk[:shared] + random_tokens(data.draw(st.integers(1, 90), label="own"), seed=index)
        first_token = data.draw(st.integers(0, len(tokens)), label="first token")
        one, exported = job(f"job {index}", tokens, first_token), Exported(prefill.layout)
        if not prefill.can_admit(one):
            break
        prefill.admit(one, exported)
        exports[one] = exported
        for done in prefill.step():
            if data.draw(st.booleans(), label="release"):
                prefill.release(done.request_id)
    while prefill.has_work():
        prefill.step()
    for one, exported in exports.items():
        alone, _ = run(engine(runtime), job("alone", one.token_ids))
        end = len(one.token_ids)
        assert np.array_equal(exported.kv(one.first_token, end), alone.kv(0, end)[:, :, one.first_token :])


def test_a_step_has_no_more_rows_than_the_largest_bucket(runtime):
    exported, _ = run(engine(runtime, max_tokens_per_step=10_000), job("a", random_tokens(500)))
    assert max(chunk.num_tokens for chunk in exported.chunks) == runtime.max_rows == 256


def test_rows_lie_where_their_block_tables_have_them():
    """Or attention would gather every ancestor of every row."""
    size = 16
    chunks = []
    for blocks, start, count in (([9, 2, 7], 13, 30), ([1], 0, 1), ([4, 3, 8, 0], 32, 5)):
        slots = (np.array(blocks)[:, None] * size + np.arange(size)).reshape(-1)
        chunks.append(
            Chunk(token_ids=random_tokens(count), start=start, slots=slots[: start + count], block_ids=blocks)
        )
    rows = _rows(chunks)
    assert rows.sequence_starts.tolist() == [0, 30, 31, 36]
    assert rows.context_lengths.tolist() == [13, 0, 32]
    assert not rows.needs_logits.any()
    for index in range(3):
        for row in range(rows.sequence_starts[index], rows.sequence_starts[index + 1]):
            position = rows.positions[row]
            is_first = row == rows.sequence_starts[index]
            assert rows.parents[row] == (-1 if is_first else row - 1)
            block = rows.block_tables[index, position // size]
            assert rows.slots[row] == block * size + position % size
    assert rows.positions.tolist() == [*range(13, 43), 0, *range(32, 37)]
    assert rows.block_tables[1].tolist() == [1, -1, -1, -1]


def test_handed_over_kv_gives_the_bits_of_a_local_chain(open_runtime):
    """Between pools of different block sizes, as prefill and decode workers may have them."""
    tokens, weights = random_tokens(151, seed=11), tiny_weights(1)
    exported, _ = run(engine(open_runtime(weights, 12, 16), 48), job("a", tokens[:-1]))
    decode = open_runtime(weights, 12, 32)
    there, here = np.arange(6, 12), np.arange(6)
    slots = (there[:, None] * 32 + np.arange(32)).reshape(-1).astype(np.int32)
    for chunk in exported.chunks:
        span = slots[chunk.first_token : chunk.first_token + chunk.num_tokens]
        decode.write_kv(chunk.layer, span, chunk.data)
    handed_over = decode.run(chain_rows(tokens, 150, there))
    assert np.array_equal(handed_over, decode.run(chain_rows(tokens, 0, here)))


def chain_rows(tokens: list[int], context: int, table: np.ndarray) -> Rows:
    """tokens[context:] in blocks of 32; only the last has logits."""
    positions = np.arange(context, len(tokens), dtype=np.int32)
    return Rows(
        token_ids=np.array(tokens[context:], dtype=np.int32),
        positions=positions,
        slots=(table[positions // 32] * 32 + positions % 32).astype(np.int32),
        parents=np.arange(-1, len(positions) - 1, dtype=np.int32),
        sequence_starts=np.array([0, len(positions)], dtype=np.int32),
        context_lengths=np.array([context], dtype=np.int32),
        block_tables=table[None].astype(np.int32),
        needs_logits=positions == len(tokens) - 1,
    )


def test_a_step_that_is_refused_harms_no_later_job(runtime):
    prefill, tokens = engine(runtime), random_tokens(40)
    before, _ = run(engine(runtime), job("before", tokens))
    prefill.admit(job("bad", [*tokens, 160]), Exported(prefill.layout))
    with pytest.raises(StepError, match="token 160 is not in a vocabulary of 160"):
        prefill.step()
    prefill.release(RequestId("bad"))
    assert prefill.free_kv_tokens == POOL_TOKENS
    after, done = run(prefill, job("after", tokens))
    assert done.cached_tokens == 0
    assert np.array_equal(after.kv(0, 40), before.kv(0, 40))


def test_a_pool_of_other_blocks_is_refused(runtime):
    size, count = runtime.block_size_tokens, runtime.num_blocks
    for num_blocks, block_size_tokens in ((count + 1, size), (4, size // 2)):
        with pytest.raises(ValueError, match=f"not in a pool of {count} blocks of {size}"):
            MegaKernelPrefillEngine(runtime, "model", num_blocks, block_size_tokens, 64)
