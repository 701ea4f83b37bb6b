"""A row has the same bits whether its ancestors are committed, in its step, or run by earlier ones."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decode_workers.megakernel_executor import MegaKernelExecutor
from decode_workers.step_batch import NO_PARENT, StepBatch
from decode_workers.torch_executor import TorchExecutor
from megakernel.build import BuildError, find_compiler
from megakernel.compiled import compile_here
from megakernel.step import StepError
from tests.decode_workers.support import HashExecutor
from tests.forests import Forest, draw_forest, int32
from tests.megakernel.programs import Recipe, build_program
from tests.tiny_model import tiny_weights

BLOCK = 16
NUM_BLOCKS = 64
MOST_ROWS = 32
CONTEXTS = (0, 1, 15, 16, 40, 120, 127, 128, 140)
"""Committed tokens: about where blocks of 16 and splits of 128 end."""
EXECUTORS = (
    "megakernel float16",
    pytest.param("megakernel float32", marks=pytest.mark.slow),
    "torch float16",
    "torch float32",
    "hashes",
)


def megakernel(weights, kv_format: str, folder) -> MegaKernelExecutor:
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    programs = [build_program(weights.shape, Recipe(workers=2, bucket=MOST_ROWS, split_tokens=64))]
    compiled = compile_here(
        programs, weights, kv_format=kv_format, library_folder=folder, extra_flags=("-O1",)
    )
    return MegaKernelExecutor(compiled, "model", NUM_BLOCKS, BLOCK)


@pytest.fixture(scope="module")
def executors(tmp_path_factory):
    """By name, made when they are asked for."""
    weights, made = tiny_weights(1), {}

    def of(name: str):
        if name not in made:
            kind, _, kv_format = name.partition(" ")
            if kind == "hashes":
                made[name] = HashExecutor(NUM_BLOCKS, BLOCK, MOST_ROWS)
            elif kind == "torch":
                made[name] = TorchExecutor(weights, "model", NUM_BLOCKS, BLOCK, 1, kv_dtype=kv_format)
            else:
                made[name] = megakernel(weights, kv_format, tmp_path_factory.mktemp("libraries"))
        return made[name]

    yield of
    for executor in made.values():
        executor.close()


def commit(executor, forest: Forest) -> None:
    for sequence, prompt in enumerate(forest.prompts):
        run_chain(executor, prompt, forest.tables[sequence])


def run_chain(executor, tokens: list[int], table: list[int]) -> np.ndarray:
    """Logits of tokens that are committed a step after the other."""
    chain = Forest(
        block_size=BLOCK,
        prompts=[[]],
        tables=[table],
        sequences=[0] * len(tokens),
        parents=[NO_PARENT, *range(len(tokens) - 1)],
        tokens=tokens,
    )
    slots = [chain.slot(0, at) for at in range(len(tokens))]
    logits = [np.empty((0, executor.vocab_size), dtype=np.float32)]
    for start in range(0, len(tokens), MOST_ROWS):
        fields = chain.fields(range(start, min(start + MOST_ROWS, len(tokens))), slots)
        fields |= {"context_lengths": int32([start]), "held_starts": None, "held_slots": None}
        logits.append(executor.run(StepBatch(**fields)).logits)
    return np.concatenate(logits)


def run_parts(executor, forest: Forest, parts: list[list[int]], slots: list[int]) -> np.ndarray:
    """[nodes, vocab]"""
    logits = np.full((forest.num_nodes, executor.vocab_size), np.nan, dtype=np.float32)
    for part in parts:
        for start in range(0, len(part), MOST_ROWS):
            nodes = part[start : start + MOST_ROWS]
            logits[nodes] = executor.run(StepBatch(**forest.fields(nodes, slots))).logits
    return logits


def check(executor, forest: Forest, rng: random.Random) -> None:
    commit(executor, forest)
    nodes = list(range(forest.num_nodes))

    def slots() -> list[int]:
        if rng.random() < 0.3:
            return forest.slots_in_order()
        return forest.scattered_slots(rng, NUM_BLOCKS * BLOCK)

    whole = run_parts(executor, forest, [nodes], slots())
    assert not np.isnan(whole).any()
    for parts in (forest.levels(), forest.random_chunks(rng, 9), [[node] for node in nodes]):
        assert np.array_equal(run_parts(executor, forest, parts, slots()), whole), parts
    path = forest.path(rng.choice(nodes))
    sequence = forest.sequences[path[0]]
    prompt = forest.prompts[sequence]
    committed = run_chain(executor, prompt + [forest.tokens[node] for node in path], forest.tables[sequence])
    assert np.array_equal(committed[len(prompt) :], whole[path])


@pytest.mark.parametrize("name", EXECUTORS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_trees_are_the_same_bits_whole_and_in_parts(executors, name, seed):
    rng = random.Random(seed)
    forest = draw_forest(
        rng,
        vocab_size=160,
        block_size=BLOCK,
        num_blocks=NUM_BLOCKS,
        most_nodes=rng.randint(2, MOST_ROWS),
        contexts=CONTEXTS,
    )
    check(executors(name), forest, rng)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("context", [0, 17, 128])
def test_more_rows_are_held_than_a_step_takes(executors, name, context):
    """A chain of 150 and two branches at its end, which have all of it in common."""
    rng = random.Random(context)
    forest = Forest(
        block_size=BLOCK,
        prompts=[[rng.randrange(160) for _ in range(context)]],
        tables=[rng.sample(range(NUM_BLOCKS), 24)],
        sequences=[0] * 160,
        parents=[NO_PARENT, *range(149), 149, *range(150, 154), 149, *range(155, 159)],
        tokens=[rng.randrange(160) for _ in range(160)],
    )
    executor = executors(name)
    commit(executor, forest)
    slots = forest.scattered_slots(rng, NUM_BLOCKS * BLOCK)
    logits = run_parts(executor, forest, [list(range(150)), list(range(150, 160))], slots)
    for leaf in (154, 159):
        path = forest.path(leaf)
        tokens = forest.prompts[0] + [forest.tokens[node] for node in path]
        committed = run_chain(executor, tokens, forest.tables[0])
        assert np.array_equal(committed[context:], logits[path])


def held_step(**changes) -> StepBatch:
    """Rows 0, 1 behind a held row of three tokens' context, and row 2 of another sequence."""
    fields = {
        "token_ids": int32([1, 2, 3]),
        "positions": int32([4, 5, 0]),
        "slots": int32([40, 41, 42]),
        "parents": int32([NO_PARENT, 0, NO_PARENT]),
        "sequence_starts": int32([0, 2, 3]),
        "context_lengths": int32([3, 0]),
        "block_tables": int32([[0], [1]]),
        "needs_logits": np.ones(3, dtype=np.bool_),
        "held_starts": int32([0, 1, 1, 1]),
        "held_slots": int32([77]),
    }
    return StepBatch(**(fields | changes))


REFUSED = {
    "few starts": ({"held_starts": int32([0, 1])}, "2 held_starts: one a row, and one, are 4"),
    "end": ({"held_starts": int32([0, 1, 1, 2])}, "held_starts end at 2 of 1 held slots"),
    "begin": ({"held_starts": int32([1, 1, 1, 1])}, "held_starts begin at 1"),
    "falling": ({"held_starts": int32([0, 2, 1, 1])}, r"row 1: its held slots are \[2, 1\)"),
    "slot": ({"held_slots": int32([1 << 20])}, "row 0: held slot 1048576 is not in a pool of"),
    "negative slot": ({"held_slots": int32([-1])}, "row 0: held slot -1 is not in a pool of"),
    "of a child": (
        {"held_starts": int32([0, 0, 1, 1])},
        "row 1: its parent is row 0, so it has no held slots of its own",
    ),
    "too few": (
        {"held_starts": int32([0, 0, 0, 0]), "held_slots": int32([])},
        "row 0: its position is 4, but it has not 1 ancestors",
    ),
    "too many": (
        {"held_starts": int32([0, 2, 2, 2]), "held_slots": int32([76, 77])},
        "row 0: it has more than 1 ancestors",
    ),
    "of another": (
        {"held_starts": int32([0, 1, 1, 2]), "held_slots": int32([77, 76])},
        "row 2: it has more than 0 ancestors",
    ),
}


@pytest.mark.parametrize("name", ["megakernel float16", "torch float32"])
@pytest.mark.parametrize("case", REFUSED)
def test_held_rows_that_cannot_be_are_refused_and_the_next_step_runs(executors, name, case):
    changes, message = REFUSED[case]
    executor = executors(name)
    with pytest.raises(StepError, match=message):
        executor.run(held_step(**changes))
    assert len(executor.run(held_step()).rows) == 3


def test_a_cpus_row_has_at_most_255_ancestors_that_are_not_committed(executors):
    executor = executors("megakernel float16")
    held = {"held_slots": int32(range(100, 356)), "held_starts": int32([0, 256, 256, 256])}
    with pytest.raises(StepError, match="row 0: 256 of its ancestors are not committed; at most 255 may be"):
        executor.run(held_step(positions=int32([259, 260, 0]), **held))
    held = {"held_slots": int32(range(100, 354)), "held_starts": int32([0, 254, 254, 254])}
    assert len(executor.run(held_step(positions=int32([257, 258, 0]), **held)).rows) == 3
