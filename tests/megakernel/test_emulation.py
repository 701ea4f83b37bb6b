"""The emulation of CUDA: right kernels pass in any order, and each way of getting one wrong is found."""

import ctypes
import time

import numpy as np
import pytest

from megakernel.emulation import STORE, Emulation, Poison, Region, device_array, device_copy
from megakernel.emulation_errors import (
    AlignmentError,
    BarrierError,
    BoundsError,
    CallError,
    ConstantError,
    DeadlockError,
    DivergenceError,
    EmulationError,
    InFlightError,
    OperationsError,
    RaceError,
    ReadOnlyError,
    StackError,
    TrapError,
    UninitialisedError,
)
from megakernel.library import LibraryError
from tests.megakernel.emulated_kernels import (
    HAS_COMPILER,
    HAS_LINES,
    NUM_BLOCKS,
    SHARED_BYTES,
    Arguments,
    launch,
    launch_case,
    library,
    lines_of,
)

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")

SEEDS = range(50)
STEPS = 6
PAGE_WORDS = 1024


def pages() -> np.ndarray:
    """Of [block][step], small whole numbers: their sums are exact."""
    size = NUM_BLOCKS * STEPS * PAGE_WORDS
    return device_copy(np.random.default_rng(1).integers(-8, 8, size), np.float32)


def page_sums(values: np.ndarray) -> np.ndarray:
    """By block and thread: each thread adds up one float4 of each page."""
    return values.reshape(NUM_BLOCKS, STEPS, 256, 4).sum(axis=(1, 3)).reshape(-1)


def words() -> np.ndarray:
    return device_array(NUM_BLOCKS * (STEPS + 1) * PAGE_WORDS, np.float32)


# Right whatever the order


@pytest.mark.parametrize("seed", SEEDS)
def test_warps_add_up(seed):
    values = device_copy(np.arange(NUM_BLOCKS * 288) % 17, np.float32)
    output = device_array(NUM_BLOCKS, np.float32)
    launch("reduce", values, output, seed=seed)
    assert output.tolist() == values.reshape(NUM_BLOCKS, 288).sum(axis=1).tolist()


def test_a_journal_keeps_every_store_in_order():
    values, output = device_copy(np.arange(NUM_BLOCKS * 288), np.float32), device_array(64, np.float32)
    journal = np.zeros(8, STORE)
    counts = launch("reduce", values, output, journal=journal)
    assert counts.stores == NUM_BLOCKS
    kept = journal[: counts.stores]
    assert sorted(kept["address"] - output.ctypes.data) == [0, 4, 8]
    assert kept["num_bytes"].tolist() == [4] * NUM_BLOCKS
    for entry in kept:
        at = (int(entry["address"]) - output.ctypes.data) // 4
        assert entry["value"][:4].view(np.float32)[0] == output[at]


def test_a_full_journal_keeps_the_first():
    journal = np.zeros(10, STORE)
    counts = launch("hand_over", words(), device_array(NUM_BLOCKS * 288, np.uint32), journal=journal[:5])
    assert counts.stores > 5
    assert journal["num_bytes"].astype(bool).tolist() == [True] * 5 + [False] * 5


@pytest.mark.parametrize("seed", SEEDS)
def test_lanes_exchange_words(seed):
    counts = launch("exchange", words(), device_array(64, np.float32), seed=seed)
    assert counts.collectives == NUM_BLOCKS * 9 * STEPS * 2


@pytest.mark.parametrize("kernel", ["pipeline_async", "pipeline_bulk"])
@pytest.mark.parametrize("seed", SEEDS)
def test_pages_pass_from_loader_to_consumers(kernel, seed):
    values, output = pages(), device_array(NUM_BLOCKS * 256, np.float32)
    counts = launch(kernel, values, output, steps=STEPS, seed=seed)
    np.testing.assert_array_equal(output, page_sums(values))
    assert counts.copies == NUM_BLOCKS * STEPS * (2 if kernel == "pipeline_bulk" else 256)


@pytest.mark.parametrize("seed", SEEDS)
def test_threads_wait_for_their_own_copies(seed):
    values = device_copy(np.arange(NUM_BLOCKS * STEPS * 288 * 4) % 61, np.float32)
    output = device_array(NUM_BLOCKS * 288, np.float32)
    counts = launch("copy_own", values, output, steps=STEPS, seed=seed)
    sums = values.reshape(NUM_BLOCKS, STEPS, 288, 4).sum(axis=(1, 3))
    np.testing.assert_array_equal(output.reshape(NUM_BLOCKS, 288), sums)
    assert counts.copies == NUM_BLOCKS * STEPS * 288


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_hand_over(seed):
    output = device_array(NUM_BLOCKS * 288, np.uint32)
    launch("hand_over", words(), output, steps=STEPS, seed=seed)
    last = np.arange(1, NUM_BLOCKS + 1) + NUM_BLOCKS * (STEPS - 1)
    np.testing.assert_array_equal(output.reshape(NUM_BLOCKS, 288), np.repeat(last, 288).reshape(-1, 288))


@pytest.mark.parametrize("seed", SEEDS)
def test_groups_of_warps_take_turns(seed):
    output = device_array(NUM_BLOCKS * 256, np.uint32)
    launch("take_turns", words(), output, steps=STEPS, seed=seed)
    own = np.arange(128)
    evens, odds = sum(range(0, STEPS, 2)), sum(range(1, STEPS, 2))
    mirrored, other = (127 - own) * (STEPS // 2), (own ^ 64) * (STEPS // 2)
    expected = np.concatenate([mirrored + evens + other + odds, mirrored + odds + other + evens])
    np.testing.assert_array_equal(output.reshape(NUM_BLOCKS, 256), np.tile(expected, (NUM_BLOCKS, 1)))


@pytest.mark.parametrize("case", ["kNeighbourHalves", "kNeighbourBytes", "kCumulative", "kUnorderedAdds"])
@pytest.mark.parametrize("seed", range(20))
def test_what_is_allowed(case, seed):
    launch_case(case, seed=seed)


def bf16(values: np.ndarray) -> np.ndarray:
    """To nearest, ties to even, as 16 bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("seed", SEEDS)
def test_matrix_products(kind, seed):
    rng = np.random.default_rng(seed)
    operands = rng.standard_normal(24 * 16).astype(np.float32)
    bits = bf16(operands) if kind == "bf16" else operands.astype(np.float16).view(np.uint16)
    exact = (from_bf16(bits) if kind == "bf16" else bits.view(np.float16)).astype(np.float64).reshape(24, 16)
    output = device_array(2 * 128, np.float32)
    launch(f"multiply_{kind}", device_copy(bits), output, seed=seed)
    expected = 1 + exact[:16] @ exact[16:].T
    np.testing.assert_array_max_ulp(output[:128].reshape(16, 8), expected.astype(np.float32), maxulp=1)
    np.testing.assert_array_equal(output[128:], output[:128])


def test_conversions_round_as_the_device_does():
    special = [0.0, -0.0, 65504.0, 65519.9, 65520.0, 1e9, -1e9, np.inf, -np.inf, np.nan]
    special += [2.0**-24, 2.0**-25, 1.5 * 2**-25, -(2.0**-14), 1 + 2**-9, 1 + 3 * 2**-9, 3.3e38]
    rng = np.random.default_rng(2)
    ordinary = rng.standard_normal(1024 - len(special)) * 2.0 ** rng.integers(-26, 18, 1024 - len(special))
    x = device_copy(np.concatenate([special, ordinary]), np.float32)
    output = device_array(1024 * 8, np.float32)
    launch("convert", x, output)
    table, y = output.view(np.uint32).reshape(1024, 8), x[::-1]
    with np.errstate(all="ignore"):
        half = np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))
        clamped = np.clip(x, -65504, 65504).astype(np.float16).view(np.uint16)
        saturated = np.where(np.isnan(x), np.uint16(0x7FFF), clamped)
        roots = (1 / np.sqrt(np.abs(x).astype(np.float64))).astype(np.float32)
        fused = (x.astype(np.float64) * y + x).astype(np.float32)
    np.testing.assert_array_equal(table[:, 0], bf16(x) | bf16(y).astype(np.uint32) << 16)
    np.testing.assert_array_equal(table[:, 1], saturated | saturated[::-1].astype(np.uint32) << 16)
    np.testing.assert_array_equal(table[:, 2], half)
    np.testing.assert_array_equal(output.reshape(1024, 8)[:, 3], half.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(output.reshape(1024, 8)[:, 4], from_bf16(bf16(x)))
    np.testing.assert_array_equal(output.reshape(1024, 8)[:, 5], roots)
    np.testing.assert_allclose(output.reshape(1024, 8)[:, 6], fused, rtol=2**-23)


def test_a_seed_is_one_run_and_others_differ():
    def run(seed: int) -> tuple[object, bytes]:
        output = device_array(NUM_BLOCKS * 256, np.float32)
        return launch("pipeline_async", pages(), output, steps=STEPS, seed=seed), output.tobytes()

    runs = [run(seed) for seed in range(8)]
    assert runs == [run(seed) for seed in range(8)]
    assert len({counts for counts, _ in runs}) > 4
    assert len({sums for _, sums in runs}) == 1


def test_a_seed_finds_the_same_fault_again():
    def found(seed: int) -> str:
        with pytest.raises(EmulationError) as caught:
            launch("pipeline_async", pages(), device_array(768, np.float32), fault=1, steps=STEPS, seed=seed)
        return str(caught.value)

    messages = [found(seed) for seed in range(12)]
    assert messages == [found(seed) for seed in range(12)]
    assert len(set(messages)) > 1


# What is wrong is found whatever the order

FAULTS = {
    ("reduce", 1): {RaceError},
    ("exchange", 1): {RaceError},
    ("copy_own", 1): {InFlightError},
    ("copy_own", 2): {InFlightError},
    ("copy_own", 3): {InFlightError, RaceError, UninitialisedError},
    ("copy_own", 4): {InFlightError},
    ("pipeline_async", 1): {InFlightError, RaceError},
    ("pipeline_async", 2): {InFlightError, RaceError, UninitialisedError},
    ("pipeline_async", 3): {RaceError},
    ("pipeline_async", 4): {DeadlockError},
    ("pipeline_async", 5): {InFlightError, RaceError},
    ("pipeline_async", 6): {InFlightError, RaceError, UninitialisedError},
    ("pipeline_async", 7): {InFlightError, RaceError},
    ("pipeline_bulk", 1): {BarrierError, InFlightError, RaceError},
    ("pipeline_bulk", 2): {InFlightError, RaceError, UninitialisedError},
    ("pipeline_bulk", 3): {RaceError},
    ("pipeline_bulk", 4): {InFlightError, RaceError, UninitialisedError},
    ("pipeline_bulk", 5): {DeadlockError},
    ("pipeline_bulk", 6): {BarrierError},
    ("pipeline_bulk", 7): {InFlightError, RaceError, DeadlockError},
    ("hand_over", 1): {RaceError},
    ("hand_over", 2): {RaceError},
    ("hand_over", 3): {RaceError},
    ("hand_over", 4): {RaceError},
    ("hand_over", 5): {RaceError},
    ("hand_over", 6): {RaceError},
    ("hand_over", 7): {DeadlockError},
    ("hand_over", 8): {ConstantError},
    ("take_turns", 1): {RaceError, UninitialisedError},
    ("take_turns", 2): {DeadlockError},
    ("take_turns", 3): {RaceError},
    ("take_turns", 4): {BarrierError},
    ("take_turns", 5): {BarrierError, DivergenceError},
}


@pytest.mark.parametrize(("kernel", "fault"), FAULTS)
def test_a_fault_is_found_by_every_seed(kernel, fault):
    for seed in range(12):
        with pytest.raises(tuple(FAULTS[kernel, fault])):
            launch(kernel, words(), device_array(4096, np.uint32), fault=fault, steps=STEPS, seed=seed)


@pytest.mark.parametrize(
    ("kernel", "fault", "error"),
    [
        ("pipeline_async", 8, (InFlightError, RaceError, DeadlockError)),  # only when warps drift apart
        ("pipeline_bulk", 8, InFlightError),  # only when copies are late
    ],
)
def test_a_fault_that_takes_an_odd_order_is_found_by_some_seed(kernel, fault, error):
    def is_found(seed: int) -> bool:
        try:
            launch(kernel, words(), device_array(4096, np.uint32), fault=fault, steps=STEPS, seed=seed)
        except error:
            return True
        return False

    assert sum(is_found(seed) for seed in SEEDS) > 5


CASES = {
    "kSharedPastEnd": (BoundsError, "shared", 16384),
    "kSharedBefore": (BoundsError, "shared", -4),
    "kGlobalPastEnd": (BoundsError, "output", 4096),
    "kGlobalBefore": (BoundsError, "output", -4),
    "kConstantPastEnd": (BoundsError, "input", 4096),
    "kPrefetchPastEnd": (BoundsError, "input", 4096),
    "kNowhere": (BoundsError, None, 0),
    "kCopyPastEnd": (BoundsError, "shared", 16376),
    "kSharedMisaligned": (AlignmentError, "shared", 8),
    "kGlobalMisaligned": (AlignmentError, "input", 4),
    "kCopyMisaligned": (AlignmentError, "input", 8),
    "kSharedUninitialised": (UninitialisedError, "shared", 64),
    "kGlobalUninitialised": (UninitialisedError, "fresh", 4),
    "kHalfUninitialised": (UninitialisedError, "shared", 0),
    "kReadOnly": (ReadOnlyError, "input", 12),
    "kConstantThenStored": (ConstantError, "output", 20),
    "kStoredThenConstant": (ConstantError, "output", 20),
    "kDivergentCollectives": (DivergenceError, None, 0),
    "kDivergentBarriers": (DivergenceError, None, 0),
    "kLaneEndsBefore": (DivergenceError, None, 0),
    "kLaneEndsAfter": (DivergenceError, None, 0),
    "kSameHalf": (RaceError, "shared", 4),
    "kHalfOfWord": (RaceError, "shared", None),
    "kTwoLanesStore": (RaceError, "shared", 0),
    "kCopySourceStored": (RaceError, "output", 12),
    "kCopyTwice": (InFlightError, "shared", 64),
    "kStoreInFlight": (InFlightError, "shared", 78),
    "kLoadInFlight": (InFlightError, "shared", 76),
    "kMbarrierMissing": (BarrierError, "shared", 8),
    "kMbarrierTwice": (BarrierError, "shared", 0),
    "kMbarrierLoaded": (BarrierError, "shared", 4),
    "kMbarrierUnseen": ((BarrierError, RaceError), "shared", 0),
    "kBarrierNumber": (BarrierError, None, 0),
    "kPollsTwoWords": (DeadlockError, "counters", None),
    "kEndless": (OperationsError, None, 0),
    "kTrap": (TrapError, None, 0),
    "kTimesOut": (DeadlockError, "counters", 0),
    "kBulkOfStored": (RaceError, "output", 8),
    "kReleaseOfOtherLane": (RaceError, "output", 4),
    "kAcquireByOtherLane": (RaceError, "output", 4),
    "kLoadOfOtherLane": (RaceError, "output", 4),
    "kStoreOverAdd": (RaceError, "counters", 0),
    "kStackDeep": (StackError, None, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_each_fault_is_found_where_it_is(case):
    error, place, offset = CASES[case]
    for seed in range(8):
        with pytest.raises(error) as caught:
            launch_case(case, seed=seed)
        assert caught.value.fault.place == place
        assert offset is None or caught.value.fault.offset == offset
        if HAS_LINES and lines_of(case) and case != "kTimesOut":
            assert any(f"step.cpp:{line}" in str(caught.value) for line in lines_of(case)), str(caught.value)


def test_a_report_names_both_sides():
    with pytest.raises(RaceError) as caught:
        launch_case("kReleaseOfOtherLane")
    message, fault = str(caught.value), caught.value.fault
    assert (fault.block, fault.warp, fault.lane) == (1, 0, 0)
    assert message.startswith("block 1 warp 0 lane 0: load_global at ")
    assert "output + 4: a load not ordered after a store by block 0 warp 0 lane 1 at " in message


def test_a_lane_does_not_tell_of_another_s_loads():
    for seed in range(8):
        with pytest.raises(RaceError, match="a store not ordered after a load by block 0 warp 0 lane 1 "):
            launch_case("kLoadOfOtherLane", seed=seed)


def test_a_deadlock_names_all_that_wait():
    with pytest.raises(DeadlockError) as caught:
        launch("hand_over", words(), device_array(1024, np.uint32), fault=7, steps=1)
    lines = str(caught.value).splitlines()
    assert lines[0] == "no thread can go on:"
    assert lines[1].startswith("block 2 warp 0 lane 0: load_acquire of counters + 16, which is 1 at ")
    assert lines[2].startswith(
        "block 2 warp 0 lanes fffffffe: sync_threads(0, 288), without the other lanes at "
    )
    assert lines[3].startswith(
        "block 2 warp 1 2 3 4 5 6 7 8: sync_threads(0, 288), which misses 32 threads at "
    )
    assert len(lines) == 4


def test_a_deadlock_tells_what_mbarriers_miss():
    with pytest.raises(DeadlockError, match=r"phase 0 misses 1 of 33 arrivals and 0 bytes"):
        launch("pipeline_async", words(), device_array(1024, np.uint32), fault=4, steps=STEPS)


def test_time_outs_of_the_kernel_end_it_when_time_is_put_forward():
    with pytest.raises(TrapError):
        launch_case("kTimesOut", expires_waits=True)


@pytest.mark.parametrize("poison", Poison)
def test_unwritten_memory_is_poisoned(poison):
    output = device_array(NUM_BLOCKS + 61, np.uint32)
    launch("reduce", device_array(NUM_BLOCKS * 288, np.float32), output, poison=poison)
    rest = output[NUM_BLOCKS:]
    expected = {Poison.ZEROS: np.all(rest == 0), Poison.ONES: np.all(rest == 0xFFFFFFFF)}
    assert expected.get(poison, len(set(rest.tolist())) > 50)


# What the Python side promises


def test_calls_that_make_no_sense():
    values, output = device_array(64, np.float32), device_array(64, np.float32)
    with pytest.raises(CallError, match="no kernel missing among reduce, "):
        launch("missing", values, output)
    with pytest.raises(CallError, match="whole warps"):
        launch("reduce", values, output, threads_per_block=100)
    arguments = (ctypes.c_uint32 * 3)()
    with pytest.raises(CallError, match="reduce takes 32 bytes, not 12"):
        library("right.cu").run("reduce", arguments, [], num_blocks=1, shared_bytes=1024)
    odd = Region("odd", values[1:])
    with pytest.raises(CallError, match="not aligned"):
        library("right.cu").run("reduce", Arguments(), [odd], num_blocks=1, shared_bytes=1024)


def test_other_block_sizes_run_too():
    values, output = device_array(288, np.float32), device_array(64, np.float32)
    with pytest.raises(BarrierError, match="288 threads are not whole warps of the block"):
        launch("reduce", values, output, threads_per_block=256)


def test_a_library_of_something_else_is_refused(tmp_path):
    other = tmp_path / "other.so"
    other.write_bytes(b"nothing")
    with pytest.raises(LibraryError, match="holds no emulated kernels"):
        Emulation(other)


def test_libraries_share_nothing():
    """Two in one process, in turn: each has its own machine."""
    for _ in range(3):
        launch_case("kAllRight")
        output = device_array(NUM_BLOCKS, np.float32)
        launch("reduce", device_copy(np.ones(NUM_BLOCKS * 288), np.float32), output)
        assert output.tolist() == [288.0] * NUM_BLOCKS


def test_threads_switch_by_the_system_s_contexts_where_no_assembly_is_written():
    emulation = library("right.cu", "-DHEADRACE_EMULATION_UCONTEXT")
    values, output = pages(), device_array(NUM_BLOCKS * 256, np.float32)
    for seed in range(4):
        launch("pipeline_async", values, output, steps=STEPS, seed=seed, emulation=emulation)
        np.testing.assert_array_equal(output, page_sums(values))


@pytest.mark.slow
def test_a_run_takes_milliseconds():
    """A bound far above what an idle machine takes: runs come by the thousand."""
    values, output = pages(), device_array(NUM_BLOCKS * 256, np.float32)
    launch("pipeline_async", values, output, steps=STEPS)
    started = time.perf_counter()
    for seed in range(20):
        launch("pipeline_async", values, output, steps=STEPS, seed=seed)
    assert (time.perf_counter() - started) / 20 < 0.05


assert SHARED_BYTES >= 128 + 2 * 4 * PAGE_WORDS
