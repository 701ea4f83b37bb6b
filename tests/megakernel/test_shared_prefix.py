"""Sequences with a cached prefix in common share its loads in attention; each has the bits it has alone."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megakernel.build import BuildError, find_compiler
from megakernel.runtime import Runtime
from megakernel.vm_state import NO_PARENT
from tests.megakernel.native_steps import BLOCK, Group, chain, rows_of
from tests.megakernel.programs import Recipe, build_program
from tests.tiny_model import tiny_weights

NUM_BLOCKS = 40
PREFIX_BLOCKS = (6, 2, 9)
OWN_BLOCKS = 3
MOST_SEQUENCES = 9
VOCABULARY = 150

try:
    find_compiler()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module", params=[("llama", "float16"), ("qwen3", "float32")])
def runtime(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    architecture, kv_format = request.param
    weights = tiny_weights(5, architecture)
    programs = [build_program(weights.shape, Recipe(bucket=bucket, workers=2)) for bucket in (1, 64)]
    folder = tmp_path_factory.mktemp("libraries")
    with Runtime.of(
        programs,
        weights,
        NUM_BLOCKS,
        BLOCK,
        kv_format=kv_format,
        library_folder=folder,
        extra_flags=("-O1",),
    ) as opened:
        prefix = tokens_of(0, len(PREFIX_BLOCKS) * BLOCK)
        opened.run(
            rows_of(Group(tokens=prefix, parents=chain(len(prefix)), context=0, table=[*PREFIX_BLOCKS]))
        )
        yield opened


def tokens_of(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist()


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[Group, Group]]:
    """By sequence: its own context, a chain behind 0 to 3 blocks of the prefix, and the rows to compare."""
    own = iter(draw(st.permutations([block for block in range(NUM_BLOCKS) if block not in PREFIX_BLOCKS])))
    drawn = []
    for seed in range(draw(st.integers(2, MOST_SEQUENCES))):
        num_shared = draw(st.integers(0, len(PREFIX_BLOCKS)))
        table = [*PREFIX_BLOCKS[:num_shared], *(next(own) for _ in range(OWN_BLOCKS))]
        shared_tokens = num_shared * BLOCK
        num_own = draw(st.integers(0 if num_shared else 1, 2 * BLOCK))
        parents = [draw(st.integers(NO_PARENT, row - 1)) for row in range(draw(st.integers(1, 6)))]
        context = shared_tokens + num_own
        behind = Group(
            tokens=tokens_of(100 + seed, num_own), parents=chain(num_own), context=shared_tokens, table=table
        )
        rows = Group(
            tokens=tokens_of(200 + seed, len(parents)), parents=parents, context=context, table=table
        )
        drawn.append((behind, rows))
    return drawn


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=batches(), data=st.data())
def test_sequences_that_share_a_prefix_are_each_as_if_alone(runtime, batch, data) -> None:
    for behind, _ in batch:
        if behind.tokens:
            runtime.run(rows_of(behind))
    groups = [rows for _, rows in batch]
    alone = [runtime.run(rows_of(group)) for group in groups]
    order = data.draw(st.permutations(range(len(groups))))
    together = runtime.run(rows_of(*(groups[index] for index in order)))
    assert np.array_equal(together, np.concatenate([alone[index] for index in order]))
