import numpy as np
import pytest
import torch

from decode_workers.executor import StepExecutor
from decode_workers.step_batch import NO_PARENT, StepBatch
from decode_workers.torch_executor import BUCKETS, TorchExecutor, context_slots
from megakernel.reference import reference_generate, reference_logits
from tests.decode_workers.head_asks import check_asks
from tests.tiny_model import tiny_weights

BLOCK = 8
NUM_BLOCKS = 64


@pytest.fixture(scope="module")
def executor() -> TorchExecutor:
    return TorchExecutor(tiny_weights(1), "model", NUM_BLOCKS, BLOCK, num_threads=1)


def step(*sequences, needs_logits=None) -> StepBatch:
    """A batch of (token ids, parents within the sequence, context length, block table)."""
    starts = np.cumsum([0] + [len(tokens) for tokens, *_ in sequences])
    positions, slots, parents = [], [], []
    for start, (_tokens, own_parents, context, table) in zip(starts, sequences, strict=False):
        depths = []
        for row, parent in enumerate(own_parents):
            depths.append(0 if parent == NO_PARENT else depths[parent] + 1)
            at = context + row
            slots.append(table[at // BLOCK] * BLOCK + at % BLOCK)
            parents.append(NO_PARENT if parent == NO_PARENT else parent + start)
        positions += [context + depth for depth in depths]
    tables = np.full((len(sequences), max(len(s[3]) for s in sequences)), -1, dtype=np.int32)
    for index, (*_, table) in enumerate(sequences):
        tables[index, : len(table)] = table
    num_rows = int(starts[-1])
    mask = np.ones(num_rows, dtype=np.bool_) if needs_logits is None else np.array(needs_logits)
    return StepBatch(
        token_ids=np.array([t for tokens, *_ in sequences for t in tokens], dtype=np.int32),
        positions=np.array(positions, dtype=np.int32),
        slots=np.array(slots, dtype=np.int32),
        parents=np.array(parents, dtype=np.int32),
        sequence_starts=starts.astype(np.int32),
        context_lengths=np.array([s[2] for s in sequences], dtype=np.int32),
        block_tables=tables,
        needs_logits=mask,
    )


def chain(count: int) -> list[int]:
    return [NO_PARENT, *range(count - 1)]


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 160, count).tolist()


def test_is_a_step_executor(executor):
    typed: StepExecutor = executor
    assert typed.num_blocks == NUM_BLOCKS
    assert typed.vocab_size == 160
    assert typed.layout.bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert list(typed.buckets) == [1, 2, 4, 8, 16, 32, 64]


def test_chain_rows_give_the_reference_logits(executor):
    tokens = random_tokens(30)
    result = executor.run(step((tokens, chain(30), 0, [9, 2, 30, 5])))
    expected = reference_logits(tiny_weights(1), tokens)
    assert result.rows.tolist() == list(range(30))
    np.testing.assert_allclose(result.logits, expected, atol=2e-4)


def test_only_rows_that_need_logits_have_them(executor):
    tokens = random_tokens(10)
    every = executor.run(step((tokens, chain(10), 0, [0, 1])))
    some = executor.run(step((tokens, chain(10), 0, [0, 1]), needs_logits=[False] * 8 + [True, True]))
    none = executor.run(step((tokens, chain(10), 0, [0, 1]), needs_logits=[False] * 10))
    assert some.rows.tolist() == [8, 9]
    assert some.rows.dtype == np.int32
    assert np.array_equal(some.logits, every.logits[8:])
    assert none.logits.shape == (0, 160)


def test_less_than_all_logits_may_be_asked_for(executor):
    tree = [NO_PARENT, 0, 0, NO_PARENT, 1]
    check_asks(
        executor, step((random_tokens(5, 4), tree, 0, [1, 2]), (random_tokens(3, 5), chain(3), 0, [9]))
    )


def test_greedy_decode_is_the_references(executor):
    prompt = random_tokens(20, seed=3)
    table = [40, 41, 12, 13, 14]
    generated: list[int] = []
    pending, context = prompt, 0
    while len(generated) < 12:
        logits = executor.run(step((pending, chain(len(pending)), context, table))).logits
        context += len(pending)
        pending = [int(logits[-1].argmax())]
        generated += pending
    assert generated == reference_generate(tiny_weights(1), prompt, 12)


def test_sequences_and_trees_in_one_step_match_each_alone(executor):
    prompts = {0: random_tokens(13, 1), 1: random_tokens(16, 2), 2: random_tokens(1, 3)}
    tables = {0: [1, 2, 3], 1: [10, 11, 12], 2: [20, 21]}
    for index, prompt in prompts.items():
        executor.run(step((prompt, chain(len(prompt)), 0, tables[index])))
    tree = [NO_PARENT, 0, 0, NO_PARENT, 1]
    work = [
        (random_tokens(5, 4), tree, 13, tables[0]),
        (random_tokens(2, 5), chain(2), 16, tables[1]),
        (random_tokens(5, 6), tree, 1, tables[2]),
    ]
    alone = [executor.run(step(one)).logits for one in work]
    assert np.array_equal(executor.run(step(*work)).logits, np.concatenate(alone))
    assert np.array_equal(executor.run(step(*work[::-1])).logits, np.concatenate(alone[::-1]))


def test_an_accepted_path_moves_to_committed_slots(executor):
    """Rows 0, 2, 4 of a tree are accepted: their KV moves down, overlapping, as if decoded one by one."""
    prompt, tokens, table = random_tokens(11, 1), random_tokens(6, 2), [30, 7, 31]
    slots = context_slots(np.array(table, dtype=np.int32), 24, BLOCK).astype(np.int32)
    executor.run(step((prompt, chain(11), 0, table)))
    executor.run(step((tokens, [NO_PARENT, 0, 0, 1, 2, 3], 11, table)))
    executor.copy_slots(slots[[11, 13, 15]], slots[[11, 12, 13]])
    after = executor.run(step(([77], [NO_PARENT], 14, table))).logits
    path = [*prompt, tokens[0], tokens[2], tokens[4]]
    straight = executor.run(step(([*path, 77], chain(15), 0, [50, 51]))).logits[-1]
    assert np.array_equal(after[0], straight)


def test_measure_touches_nobodys_blocks(executor):
    tokens = random_tokens(NUM_BLOCKS * BLOCK - 1)
    table = list(range(NUM_BLOCKS))
    for start in range(0, len(tokens), 64):
        part = tokens[start : start + 64]
        executor.run(step((part, chain(len(part)), start, table), needs_logits=[False] * len(part)))
    probe = step(([3], [NO_PARENT], len(tokens), table))
    before = executor.run(probe).logits
    costs = executor.measure()
    assert [cost.rows for cost in costs] == list(BUCKETS)
    assert all(cost.ms > 0 for cost in costs)
    assert np.array_equal(executor.run(probe).logits, before)


def test_write_kv_names_the_right_length(executor):
    with pytest.raises(ValueError, match="2 tokens of one layer are 512 bytes, not 256"):
        executor.write_kv(0, np.array([1, 2], dtype=np.int32), memoryview(bytes(256)))


def test_threads_are_set_for_the_process():
    TorchExecutor(tiny_weights(1, num_layers=1), "model", 4, BLOCK, num_threads=2)
    assert torch.get_num_threads() == 2
    TorchExecutor(tiny_weights(1, num_layers=1), "model", 4, BLOCK, num_threads=1)
    assert torch.get_num_threads() == 1
