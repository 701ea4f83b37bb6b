"""What a GPU's primitives cost: `python benchmarks/gpu_primitives.py [--quick] [--json FILE]`.

A barrier of all SMs, the pieces that it is made of, and copies of all of memory to shared memory by access
pattern (`gpu_primitives.cu`). Each is launched several times, and the quickest counts. Fields of a machine's
description (docs/machines.md) that follow from them are named at the end.
"""

import ctypes
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "kernels"))

import msgspec
import numpy as np
import numpy.typing as npt

from benchmarks.gpu_machine import described_run
from benchmarks.harness import parser, write_figures
from megakernel.cuda_build import build_cubin
from megakernel.cuda_device import Driver, Grid
from megakernel.cuda_driver import open_driver

SOURCE = Path(__file__).with_name("gpu_primitives.cu")
KERNELS = ("barriers", "pieces", "streams1", "streams2", "streams4")
THREADS = 288
HEAD_BYTES = 1024
"""Of shared memory, before the ring: mbarriers."""
MOST_SLOTS = 64
"""Of a ring: as many mbarriers have room."""
BLOCK_BYTES, BLOCK_QUICK_BYTES = 16 << 20, 8 << 20
"""What one SM reads: all of them together, many times an L2 cache."""
LAUNCHES, LAUNCHES_QUICK = 5, 3
BARRIER_ROUNDS, PIECE_ROUNDS = 2000, 500
COUNTER_WORDS = 64
"""A block's own, and what lies before them: a line of L2 and more."""
POLLS = ("acquire", "acquire_clock", "relaxed")
"""By `mode`. `acquire_clock` is how the kernels wait: a bound on the wait takes a clock."""
PIECES = ("store_release", "load_acquire", "load_l2", "clock")

Copy = Literal["async", "bulk"]


class Arguments(ctypes.Structure):
    """`Arguments` of the kernels."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("block_bytes", ctypes.c_uint64),
        ("counters", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_uint32) for name in ("iterations", "chunk_bytes", "ring_bytes", "mode")),
    )


class Pattern(msgspec.Struct, frozen=True, kw_only=True):
    """How an SM streams: `num_warps` copy chunks into a ring of shared memory."""

    copy: Copy
    num_warps: int = 1
    """Of bulk copies one lane issues all."""
    chunk_bytes: int
    ring_bytes: int

    @property
    def name(self) -> str:
        return f"{self.copy}_warps{self.num_warps}_chunk{self.chunk_bytes}_ring{self.ring_bytes}"

    @property
    def kernel(self) -> str:
        return f"streams{self.num_warps}"


def is_possible(pattern: Pattern, ring_bytes: int) -> bool:
    """With so much shared memory for the ring."""
    slots = pattern.ring_bytes // pattern.chunk_bytes
    return 1 <= slots <= MOST_SLOTS and pattern.ring_bytes <= ring_bytes


def patterns(ring_bytes: int, *, can_copy_bulk: bool, is_quick: bool) -> list[Pattern]:
    """That fit, without the trivial: rings hold two chunks or more."""
    return [
        pattern
        for pattern in (_quick_patterns(ring_bytes) if is_quick else _all_patterns())
        if is_possible(pattern, ring_bytes)
        and pattern.ring_bytes >= 2 * pattern.chunk_bytes
        and (can_copy_bulk or pattern.copy != "bulk")
    ]


def _all_patterns() -> Iterator[Pattern]:
    rings = [kib << 10 for kib in (32, 64, 96, 128, 192)]
    for num_warps in (1, 2, 4):
        for chunk in (4096, 8192, 16384):
            for ring in rings:
                yield Pattern(copy="async", num_warps=num_warps, chunk_bytes=chunk, ring_bytes=ring)
    for chunk in (2048, 4096, 8192, 16384):
        for ring in rings:
            yield Pattern(copy="bulk", chunk_bytes=chunk, ring_bytes=ring)


def _quick_patterns(ring_bytes: int) -> Iterator[Pattern]:
    for num_warps in (1, 4):
        yield Pattern(
            copy="async", num_warps=num_warps, chunk_bytes=8192, ring_bytes=min(ring_bytes, 96 << 10)
        )
    for ring in (64 << 10, 192 << 10):
        yield Pattern(copy="bulk", chunk_bytes=8192, ring_bytes=ring)


def latency_pattern(*, can_copy_bulk: bool) -> Pattern:
    """One small copy at a time on each SM: a dependent read of DRAM that little else holds up."""
    return Pattern(copy="bulk" if can_copy_bulk else "async", chunk_bytes=2048, ring_bytes=2048)


class Primitives:
    """The kernels on one device, with their memory."""

    def __init__(self, driver: Driver, *, is_quick: bool = False) -> None:
        """Raises BuildError, CudaError. The driver stays the caller's."""
        self._driver, facts = driver, driver.facts
        self.num_sms = facts.num_sms
        self.can_copy_bulk = int(facts.architecture.removeprefix("sm_")) >= 90
        self.ring_bytes = (220 if self.can_copy_bulk else 96) * 1024
        self._launches = LAUNCHES_QUICK if is_quick else LAUNCHES
        self._block_bytes = BLOCK_QUICK_BYTES if is_quick else BLOCK_BYTES
        cubin = build_cubin(SOURCE.read_text(encoding="utf-8"), facts.architecture)
        grid = Grid(num_blocks=self.num_sms, num_threads=THREADS, shared_bytes=HEAD_BYTES + self.ring_bytes)
        self._kernels = driver.load(cubin.path, KERNELS, grid)
        self._stream = driver.new_stream()
        self._events = driver.new_event(), driver.new_event()
        self._zeros = driver.allocate_host(4 * COUNTER_WORDS * (self.num_sms + 4)).array
        self._counters = driver.allocate(self._zeros.nbytes)
        self._out = driver.allocate(4 * 4 * self.num_sms)
        self._data = driver.allocate(self._block_bytes * self.num_sms)

    def measure(self, *, is_quick: bool = False) -> dict[str, float]:
        """All figures, shown as they come."""
        figures: dict[str, float] = {}
        cycles_a_us = 0.0
        for mode, poll in enumerate(POLLS):
            us, cycles_a_us = self.barrier_us(mode)
            figures[f"barrier_{poll}_us"] = us
        figures["sm_clock_mhz"] = cycles_a_us
        for name, us in self.pieces_us(cycles_a_us).items():
            figures[f"{name}_us"] = us
        for name, value in figures.items():
            print(f"  {name:24} {value:9.3f}", flush=True)
        for pattern in patterns(self.ring_bytes, can_copy_bulk=self.can_copy_bulk, is_quick=is_quick):
            figures[f"stream_{pattern.name}_gb_s"] = found = self.stream_gb_s(pattern)
            print(f"  {pattern.name:42} {found:7.0f} GB/s", flush=True)
        figures["dram_latency_us"] = self.latency_us()
        print(f"  {'dram_latency_us':24} {figures['dram_latency_us']:9.3f}", flush=True)
        return figures

    def barrier_us(self, mode: int) -> tuple[float, float]:
        """A barrier of all SMs, and cycles a microsecond."""
        milliseconds, out = self._quickest("barriers", iterations=BARRIER_ROUNDS, mode=mode)
        us = milliseconds * 1e3 / BARRIER_ROUNDS
        return us, float(out[:, 0].mean()) / us

    def pieces_us(self, cycles_a_us: float) -> dict[str, float]:
        _, out = self._quickest("pieces", iterations=PIECE_ROUNDS)
        costs = out.mean(axis=0) / cycles_a_us
        return dict(zip(PIECES, costs.tolist(), strict=True))

    def stream_gb_s(self, pattern: Pattern) -> float:
        milliseconds, _ = self._stream_once(pattern)
        return self._block_bytes * self.num_sms / milliseconds / 1e6

    def latency_us(self) -> float:
        """From one chunk to the next of a ring of one, the mbarriers' part included."""
        pattern = latency_pattern(can_copy_bulk=self.can_copy_bulk)
        _, out = self._stream_once(pattern)
        return float(out[:, 0].mean()) / 1e3 / (self._block_bytes // pattern.chunk_bytes)

    def _stream_once(self, pattern: Pattern) -> tuple[float, npt.NDArray[np.uint32]]:
        assert is_possible(pattern, self.ring_bytes)
        return self._quickest(
            pattern.kernel,
            chunk_bytes=pattern.chunk_bytes,
            ring_bytes=pattern.ring_bytes,
            mode=int(pattern.copy == "bulk"),
        )

    def _quickest(self, name: str, **fields: int) -> tuple[float, npt.NDArray[np.uint32]]:
        """Milliseconds, and what blocks left: [blocks, 4]."""
        arguments = Arguments(
            data=self._data,
            block_bytes=self._block_bytes,
            counters=self._counters,
            out=self._out,
            **fields,
        )
        driver, (start, end) = self._driver, self._events
        found = []
        for _ in range(self._launches):
            # The first launch of a pair warms up, and keeps the device busy until the second is asked for:
            # what the host takes for that is not to be in the time.
            for _ in range(2):
                driver.copy_to_device(self._stream, self._counters, self._zeros)
                driver.record(self._stream, start)
                driver.launch(self._stream, self._kernels[name], arguments)
            driver.record(self._stream, end)
            out = np.zeros((self.num_sms, 4), dtype=np.uint32)
            driver.copy_to_host(self._stream, out, self._out)
            driver.synchronize(self._stream)
            found.append((driver.elapsed_ms(start, end), out))
        return min(found, key=lambda one: one[0])


def machine_fields(figures: dict[str, float]) -> dict[str, float]:
    """Of a machine's description, what these figures say."""
    streams = [value for name, value in figures.items() if name.startswith("stream_")]
    return {
        "bandwidth_gb_s": round(max(streams), 0),
        "sync_us": round(figures["barrier_acquire_clock_us"], 3),
        "load_latency_us": round(figures["dram_latency_us"], 3),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parser("what a GPU's primitives cost").parse_args(arguments)
    driver = open_driver()
    try:
        print(f"{driver.facts.name}, {driver.facts.num_sms} SMs", flush=True)
        figures = Primitives(driver, is_quick=chosen.quick).measure(is_quick=chosen.quick)
        described = described_run(driver.facts, None)
    finally:
        driver.close()
    fields = machine_fields(figures)
    print("a machine's description: " + ", ".join(f'"{name}": {value:g}' for name, value in fields.items()))
    figures |= {f"machine_{name}": value for name, value in fields.items()}
    write_figures(chosen.json, figures, LAUNCHES_QUICK if chosen.quick else LAUNCHES, described)


if __name__ == "__main__":
    main()
