"""How a head's instructions share what restricted rows want of it."""

import ctypes
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megakernel.build import INCLUDE_FOLDER
from tests.megakernel.test_cpu_kernels import BACKENDS, COMPILER

SOURCE = Path(__file__).with_name("native") / "wanted_groups.cpp"
NUM_GROUPS, GROUP = 40, 16


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("wanted") / "wanted_groups.so"
    command = [COMPILER, "-std=c++20", "-O1", "-fPIC", "-shared", "-w", *BACKENDS["scalar"][0]]
    command += [f"-DNUM_GROUPS={NUM_GROUPS}", f"-I{INCLUDE_FOLDER}", str(SOURCE), "-o", str(path)]
    subprocess.run(command, check=True, timeout=180)
    return ctypes.CDLL(str(path))


def groups_by_tile(library, slices: list[list[int]], bounds: list[int]) -> list[list[int]]:
    starts = np.cumsum([0, *map(len, slices)], dtype=np.int32)
    tokens = np.array([token for tokens in slices for token in tokens], dtype=np.int32)
    columns = np.array(bounds, dtype=np.int32) * GROUP
    groups, ends = np.empty(len(tokens), dtype=np.int32), np.empty(len(bounds) - 1, dtype=np.int32)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (starts, tokens, columns, groups, ends)]
    library.wanted_groups(*pointers[:2], len(slices), pointers[2], len(bounds) - 1, *pointers[3:])
    return [groups[first:end].tolist() for first, end in pairwise([0, *ends.tolist()])]


SLICES = st.lists(
    st.sets(st.integers(0, NUM_GROUPS * GROUP - 1), min_size=1, max_size=30).map(sorted),
    min_size=1,
    max_size=6,
)
BOUNDS = st.sets(st.integers(1, NUM_GROUPS - 1), max_size=12).map(lambda cuts: [0, *sorted(cuts), NUM_GROUPS])
EXAMPLES = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@EXAMPLES
@given(SLICES, BOUNDS)
def test_restricted_rows_alone_are_shared_by_columns_wherever_their_tokens_are(library, slices, bounds):
    by_tile = groups_by_tile(library, slices, bounds)
    wanted = sorted({token // GROUP for tokens in slices for token in tokens})
    assert [group for tile in by_tile for group in tile] == wanted
    for tile, (first, end) in zip(by_tile, pairwise(bounds), strict=True):
        assert abs(len(tile) - len(wanted) * (end - first) / NUM_GROUPS) < 1


@EXAMPLES
@given(SLICES, BOUNDS)
def test_beside_full_rows_an_instruction_keeps_to_its_columns(library, slices, bounds):
    by_tile = groups_by_tile(library, [[], *slices], bounds)
    wanted = sorted({token // GROUP for tokens in slices for token in tokens})
    for tile, (first, end) in zip(by_tile, pairwise(bounds), strict=True):
        assert tile == [group for group in wanted if first <= group < end]
