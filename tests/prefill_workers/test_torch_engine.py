"""KV that the PyTorch engine computed, in the PyTorch executor: the same bits as computed there."""

import numpy as np
import pytest

from decode_workers.step_batch import NO_PARENT, StepBatch
from decode_workers.torch_executor import TorchExecutor, context_slots
from megakernel.model.weights import Weights
from prefill_workers.torch_engine import TorchPrefillEngine
from tests.prefill_workers.exports import Exported, job, random_tokens, run
from tests.tiny_model import tiny_weights

BLOCK = 8


@pytest.fixture(scope="module")
def executor() -> TorchExecutor:
    return TorchExecutor(tiny_weights(1), "model", 64, BLOCK, num_threads=1)


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
    prefill = TorchPrefillEngine(tiny_weights(1), "model", 64, BLOCK, 48, num_threads=1)
    exported, _ = run(prefill, job("a", tokens[:-1]))
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
    exported, _ = run(prefill, job("a", tokens[:-1]))
    # The other worker has another number of threads: the bits must not know.
    executor = TorchExecutor(weights, "model", 80, BLOCK, num_threads=1)
    there, here = list(range(40, 80)), list(range(40))
    hand_off(exported, executor, 299, there)
    handed_over = next_token_logits(executor, tokens, 299, there)
    assert np.array_equal(handed_over, next_token_logits(executor, tokens, 0, here))
