"""Races that the emulation reports, against all pairs of accesses of random programs."""

import collections

import pytest

from megakernel.emulation import Region, device_array, device_copy
from megakernel.emulation_errors import InFlightError, RaceError
from tests.megakernel.emulated_kernels import HAS_COMPILER, Arguments, library
from tests.megakernel.emulated_steps import LANES, NUM_BLOCKS, WARPS, Program

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")


def is_race_found(program: Program, seed: int) -> bool:
    packed, steps_at = program.packed()
    steps, data, counters = device_copy(packed), device_array(64, "u1"), device_array(256, "u4")
    arguments = Arguments(steps.ctypes.data, data.ctypes.data, counters.ctypes.data, WARPS * LANES, steps_at)
    regions = [
        Region("steps", steps),
        Region("data", data, is_writable=True),
        Region("counters", counters, is_writable=True),
    ]
    settings = {"num_blocks": NUM_BLOCKS, "threads_per_block": WARPS * LANES, "shared_bytes": 1024}
    try:
        library("steps.cu").run("run_steps", arguments, regions, seed=seed, **settings)
    except (RaceError, InFlightError):
        return True
    return False


def check(seeds: range) -> None:
    found = collections.Counter()
    for seed in seeds:
        program = Program(
            seed,
            num_steps=30 + seed % 97,
            care=(0.2, 0.5, 0.8)[seed % 3],
            is_crowded=seed % 2 == 1,
            may_race=seed % 4 < 2,
        )
        for order in range(3):
            assert is_race_found(program, seed * 8 + order) == program.has_race, seed
        found[program.has_race] += 1
    assert min(found.values()) > len(seeds) / 8


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_a_race_is_found_where_there_is_one_and_nowhere_else(first):
    check(range(first, first + 100))


@pytest.mark.slow
def test_many_more_programs():
    check(range(1000, 8000))
