"""The GPU's primitives without a GPU: patterns, launches, and what is made of their times."""

import ctypes
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpu_primitives
from benchmarks.gpu_primitives import (
    BARRIER_ROUNDS,
    COUNTER_WORDS,
    MOST_SLOTS,
    Arguments,
    Pattern,
    Primitives,
    is_possible,
    latency_pattern,
    machine_fields,
    main,
    patterns,
)
from megakernel.cuda_build import Cubin
from megakernel.cuda_toolkit import ToolMissingError, find_tool
from tests.megakernel.fake_cuda import FakeDriver

HOPPER_RING, OTHER_RING = 220 * 1024, 96 * 1024


def test_rings_fit_shared_memory_and_their_barriers():
    found = patterns(HOPPER_RING, can_copy_bulk=True, is_quick=False)
    assert len({pattern.name for pattern in found}) == len(found)
    for pattern in found:
        assert 2 <= pattern.ring_bytes // pattern.chunk_bytes <= MOST_SLOTS
    assert {pattern.num_warps for pattern in found if pattern.copy == "async"} == {1, 2, 4}
    assert {pattern.chunk_bytes for pattern in found if pattern.copy == "bulk"} == {2048, 4096, 8192, 16384}
    assert {pattern.ring_bytes >> 10 for pattern in found} == {32, 64, 96, 128, 192}
    assert not is_possible(Pattern(copy="bulk", chunk_bytes=2048, ring_bytes=192 << 10), HOPPER_RING)


@pytest.mark.parametrize("is_quick", [False, True])
def test_before_hopper_rings_are_smaller_and_nothing_is_copied_in_bulk(is_quick):
    found = patterns(OTHER_RING, can_copy_bulk=False, is_quick=is_quick)
    assert found
    assert all(pattern.copy == "async" and pattern.ring_bytes <= OTHER_RING for pattern in found)
    assert len(found) < len(patterns(HOPPER_RING, can_copy_bulk=True, is_quick=is_quick))


def test_latency_is_of_one_copy_at_a_time():
    for can_copy_bulk in (False, True):
        pattern = latency_pattern(can_copy_bulk=can_copy_bulk)
        assert pattern.chunk_bytes == pattern.ring_bytes
        assert is_possible(pattern, OTHER_RING)


def test_arguments_are_laid_out_as_the_kernels_have_them():
    assert ctypes.sizeof(Arguments) == 48
    offsets = {name: getattr(Arguments, name).offset for name, *_ in Arguments._fields_}
    assert offsets["block_bytes"] == 8
    assert offsets["out"] == 24
    assert offsets["iterations"] == 32
    assert offsets["mode"] == 44


@pytest.fixture
def device(monkeypatch):
    """One that counts what it was asked to run, and takes a millisecond for each."""
    launched = []

    def kernel(driver, kernel, arguments):
        counters = driver.array_at(arguments.counters, COUNTER_WORDS * (driver.facts.num_sms + 4), np.uint32)
        assert not counters.any(), "counters of the launch before"
        counters[:] = 1
        driver.bytes_at(arguments.data, arguments.block_bytes * driver.facts.num_sms)
        out = driver.array_at(arguments.out, 4 * driver.facts.num_sms, np.uint32)
        out[:] = np.tile([1500, 500, 700, 30], driver.facts.num_sms)
        launched.append((kernel, arguments.mode, arguments.chunk_bytes, arguments.ring_bytes))

    monkeypatch.setattr(
        gpu_primitives, "build_cubin", lambda source, architecture: Cubin(Path("no cubin"), None)
    )
    monkeypatch.setattr(gpu_primitives, "BLOCK_QUICK_BYTES", 1 << 16)
    driver = FakeDriver(kernel)
    driver.launched = launched
    return driver


def test_primitives_are_measured_with_zeroed_counters(device):
    primitives = Primitives(device, is_quick=True)
    figures = primitives.measure(is_quick=True)
    round_us = 1e3 / BARRIER_ROUNDS
    assert figures["barrier_acquire_us"] == figures["barrier_acquire_clock_us"] == round_us
    assert figures["sm_clock_mhz"] == 1500 / round_us
    assert figures["load_l2_us"] == pytest.approx(700 / 1500 * round_us)
    assert figures["stream_async_warps4_chunk8192_ring98304_gb_s"] == pytest.approx(4 * (1 << 16) / 1e6)
    assert figures["dram_latency_us"] == pytest.approx(1.5 / 32)
    modes = {(kernel.name, mode) for kernel, mode, *_ in device.launched}
    assert {("barriers", 0), ("barriers", 1), ("barriers", 2), ("streams4", 0), ("streams1", 0)} < modes
    assert not any(mode for name, mode in modes if name != "barriers")
    (grid,) = {(kernel.grid.num_threads, kernel.grid.shared_bytes) for kernel, *_ in device.launched}
    assert grid == (288, 1024 + OTHER_RING)


def test_a_machines_fields_follow(device, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_primitives, "open_driver", lambda: device)
    main(["--quick", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["figures"]["machine_sync_us"] == found["figures"]["barrier_acquire_clock_us"]
    assert found["machine"]["gpu"] == "fake"
    assert found["machine"]["date"].endswith("+00:00")
    assert device.is_closed
    assert '"sync_us": 0.5, "load_latency_us": 0.047' in capsys.readouterr().out


def test_the_best_stream_is_the_bandwidth():
    figures = {"stream_a_gb_s": 2900.4, "stream_b_gb_s": 3000.2}
    fields = machine_fields(figures | {"barrier_acquire_clock_us": 1.23456, "dram_latency_us": 0.7})
    assert fields == {"bandwidth_gb_s": 3000.0, "sync_us": 1.235, "load_latency_us": 0.7}


def has_nvcc() -> bool:
    try:
        find_tool("nvcc")
    except ToolMissingError:
        return False
    return True


@pytest.mark.skipif(not has_nvcc(), reason="no nvcc")
@pytest.mark.parametrize("architecture", ["sm_89", "sm_90"])
def test_the_kernels_compile(architecture, tmp_path):
    source = gpu_primitives.SOURCE.read_text(encoding="utf-8")
    built = gpu_primitives.build_cubin(source, architecture, folder=tmp_path).build
    assert {kernel.name for kernel in built.kernels} == set(gpu_primitives.KERNELS)
    assert built.spills == built.warnings == ()
