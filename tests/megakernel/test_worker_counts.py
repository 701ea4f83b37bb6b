"""Compiled programs of 1, 2 and 3 workers give a row the same bits, in every bucket and any company."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megakernel.build import BuildError, find_compiler
from megakernel.k_tiles import shared_k_tiles
from megakernel.pipeline import compile_program
from megakernel.runtime import Runtime
from megakernel.validate import validate
from megakernel.vm_state import NO_PARENT
from tests.megakernel.compiler_cases import cpu_machine
from tests.megakernel.native_steps import BLOCK, Group, chain, rows_of
from tests.tiny_model import tiny_weights

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
WORKERS = (1, 2, 3)
SCRATCH_BYTES = 96 * 1024
"""So little that `down` needs two K-tiles: their sums are the bits at stake."""
TABLES = ([3, 1, 8, 5], [4, 0, 6, 7], [10, 2, 9, 11])
MAX_CONTEXT, MAX_ROWS = 40, 21

try:
    find_compiler()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def runtimes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Runtime]]:
    weights = tiny_weights(4, "qwen3", hidden_size=64, intermediate_size=1024)
    folder = tmp_path_factory.mktemp("libraries")
    opened = []
    for workers in WORKERS:
        machine = cpu_machine(workers, SCRATCH_BYTES)
        assert shared_k_tiles(weights.shape, machine, weights.formats)["down"] == 2
        programs = [
            compile_program(weights.shape, "f", machine, bucket, formats=weights.formats, split_tokens=16)
            for bucket in BUCKETS
        ]
        for program in programs:
            validate(program, machine, weights.formats)
        opened.append(Runtime.of(programs, weights, 12, BLOCK, library_folder=folder, extra_flags=("-O1",)))
    yield opened
    for runtime in opened:
        runtime.close()


@st.composite
def groups(draw: st.DrawFn) -> list[Group]:
    """Up to three sequences: a chain or a tree after some context, so that a step has 1 to 63 rows."""
    drawn = []
    for table in TABLES[: draw(st.integers(1, len(TABLES)))]:
        size = draw(st.integers(1, MAX_ROWS))
        if draw(st.booleans()):
            parents = chain(size)
        else:
            parents = [draw(st.integers(NO_PARENT, row - 1)) for row in range(size)]
        tokens = draw(st.lists(st.integers(0, 159), min_size=size, max_size=size))
        context = draw(st.integers(0, MAX_CONTEXT))
        drawn.append(Group(tokens=tokens, parents=parents, context=context, table=table))
    return drawn


def fill(runtime: Runtime, group: Group, chunk: int) -> None:
    """The group's context, `chunk` rows a step."""
    prompt = [(7 * position + group.table[0]) % 160 for position in range(group.context)]
    for start in range(0, group.context, chunk):
        tokens = prompt[start : start + chunk]
        rows = Group(tokens=tokens, parents=chain(len(tokens)), context=start, table=group.table)
        runtime.run(rows_of(rows))


def one_row_a_step(runtime: Runtime, group: Group) -> np.ndarray:
    """Every row's logits after its path alone, decoded token by token."""
    logits = []
    for row in range(len(group.tokens)):
        path, at = [], row
        while at != NO_PARENT:
            path.append(at)
            at = group.parents[at]
        for depth, step in enumerate(reversed(path)):
            single = Group(
                tokens=[group.tokens[step]],
                parents=[NO_PARENT],
                context=group.context + depth,
                table=group.table,
            )
            last = runtime.run(rows_of(single))
        logits.append(last[0])
    return np.array(logits)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batch=groups(), chunks=st.lists(st.integers(1, 40), min_size=3, max_size=3))
def test_neither_workers_nor_bucket_nor_company_change_a_bit(
    runtimes: Sequence[Runtime], batch: list[Group], chunks: list[int]
):
    for runtime, chunk in zip(runtimes, chunks, strict=True):
        for group in batch:
            fill(runtime, group, chunk)
    expected = [one_row_a_step(runtimes[0], group) for group in batch]
    for runtime in runtimes:
        alone = [runtime.run(rows_of(group)) for group in batch]
        for logits, reference in zip(alone, expected, strict=True):
            assert np.array_equal(logits, reference)
        assert np.array_equal(runtime.run(rows_of(*batch)), np.concatenate(expected))


@pytest.mark.parametrize("bucket", BUCKETS)
def test_every_bucket_gives_a_chain_the_same_bits(runtimes: Sequence[Runtime], bucket: int):
    tokens = np.random.default_rng(3).integers(0, 160, 64).tolist()
    whole = Group(tokens=tokens, parents=chain(64), context=0, table=TABLES[0])
    expected = runtimes[0].run(rows_of(whole))
    for runtime in runtimes:
        parts = [
            Group(tokens=tokens[i : i + bucket], parents=chain(bucket), context=i, table=TABLES[1])
            for i in range(0, 64, bucket)
        ]
        assert np.array_equal(np.concatenate([runtime.run(rows_of(part)) for part in parts]), expected)
