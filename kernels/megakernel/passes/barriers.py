"""barriers: counters, signals and waits, no more of them than order needs.

An op has at most one counter. Of each worker the last tile of the op signals, so the counter's target says
that the whole op is done, and by program order all that its workers did before. A tile waits for an earlier
op only where a worker's tiles that it conflicts with (reads after writes, writes after reads and writes) are
not known to be done: by the worker's own program order, or through a wait of its own or of those it waited
for. What is known is a vector clock a worker; see `Coverage`.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from xdsl.dialects.builtin import ModuleOp

from megakernel.dialect.tiled_ops import TiledOp
from megakernel.lower import enumerate_ops, instructions_of, outline_of
from megakernel.passes.context import PassContext
from megakernel.program import Access, Instruction, Op, Program, reads_of, writes_of

Clock = npt.NDArray[np.int32]
"""By worker: how many of its instructions are known to be done."""


class Footprints:
    """The columns that a wave's tiles touch of one buffer: a rectangle each, all rows."""

    def __init__(self, accesses: Iterable[tuple[int, Access]]) -> None:
        table = np.array([(tile, access.c0, access.c1) for tile, access in accesses], dtype=np.int64)
        self.tiles, self.starts, self.ends = table.T
        self.first, self.last = int(self.starts.min()), int(self.ends.max())
        self.num_tiles = len(np.unique(self.tiles))

    def is_within(self, start: int, end: int) -> bool:
        """Whether columns [start, end) are all that is touched, or more."""
        return start <= self.first and self.last <= end

    def overlapping(self, start: int, end: int) -> npt.NDArray[np.int64]:
        """Tiles that touch columns [start, end)."""
        found: npt.NDArray[np.int64] = self.tiles[(self.starts < end) & (self.ends > start)]
        return found


class Touched:
    """What a wave reads and writes, by buffer. `KV` stands for the buffer of the op's own layer."""

    KV = -1

    def __init__(self, outline: Program, op: Op, instructions: Sequence[Instruction]) -> None:
        def by_buffer(accesses: Sequence[Sequence[Access]]) -> dict[int, Footprints]:
            found: dict[int, list[tuple[int, Access]]] = defaultdict(list)
            for tile, touched in enumerate(accesses):
                for access in touched:
                    found[self.KV if access.buffer == op.kv else access.buffer].append((tile, access))
            return {buffer: Footprints(entries) for buffer, entries in found.items()}

        reads = [reads_of(outline, instruction) for instruction in instructions]
        writes = [writes_of(outline, instruction) for instruction in instructions]
        self.reads = by_buffer(reads)
        self.writes = by_buffer(writes)
        self.by_tile = [
            tuple(
                (self.KV if access.buffer == op.kv else access.buffer, access.c0, access.c1, is_write)
                for accesses, is_write in ((read, False), (written, True))
                for access in accesses
            )
            for read, written in zip(reads, writes, strict=True)
        ]


class Wave:
    """The tiles of one tiled op, on their workers."""

    def __init__(
        self, number: int, op: TiledOp, kv_buffer: int, touched: Touched, workers: Sequence[int], done: Clock
    ) -> None:
        self.number = number
        self.op = op
        self.touched = touched
        self.workers = np.array(workers, dtype=np.int64)
        self.positions = np.empty(len(workers), dtype=np.int32)
        self.kv_buffer = kv_buffer
        self.joined: Clock = done
        for tile, worker in enumerate(workers):
            self.positions[tile] = done[worker]
            done[worker] += 1
        self.ends = np.zeros(len(done), dtype=np.int32)
        np.maximum.at(self.ends, self.workers, self.positions + 1)
        self.last_tiles = np.flatnonzero(self.ends[self.workers] == self.positions + 1)
        self.is_awaited = False

    def buffer(self, buffer: int) -> int:
        return self.kv_buffer if buffer == Touched.KV else buffer

    def footprints(self, buffer: int) -> tuple[Footprints | None, Footprints | None]:
        """Reads and writes of a buffer."""
        own = Touched.KV if buffer == self.kv_buffer else buffer
        return self.touched.reads.get(own), self.touched.writes.get(own)


class Coverage:
    """Walks the waves in order; knows for each worker what is done when its next instruction starts."""

    def __init__(self, num_workers: int) -> None:
        self.done = np.zeros(num_workers, dtype=np.int32)
        self.known = np.zeros((num_workers, num_workers), dtype=np.int32)
        self.last_writer: dict[int, Wave] = {}
        self.readers: dict[int, list[Wave]] = defaultdict(list)
        self.waves: list[Wave] = []
        self.waits: list[list[tuple[int, Wave]]] = []

    def add(self, op: TiledOp, kv_buffer: int, touched: Touched, workers: Sequence[int]) -> None:
        wave = Wave(len(self.waves), op, kv_buffer, touched, workers, self.done)
        before = self._conflicting(wave)
        waits: list[tuple[int, Wave]] = []
        settled = np.zeros(len(self.done), dtype=bool)  # workers that know all of `before` to be done
        for tile, worker in enumerate(workers):
            if not settled[worker]:
                waits += [(tile, other) for other in self._waits(wave, tile, worker, before)]
                settled[worker] = all((self.known[worker] >= other.ends).all() for other in before)
            self.known[worker, worker] = wave.positions[tile] + 1
        wave.joined = self.known[np.unique(wave.workers)].max(axis=0)
        self._record(wave)
        self.waves.append(wave)
        self.waits.append(waits)

    def _conflicting(self, wave: Wave) -> list[Wave]:
        """Earlier waves that may conflict, the latest first: it is the likeliest to cover the others.

        What is older than a buffer's last writer is ordered before it, column by column.
        """
        found: dict[int, Wave] = {}
        for own in wave.touched.reads.keys() | wave.touched.writes.keys():
            buffer = wave.buffer(own)
            others = [self.last_writer[buffer]] if buffer in self.last_writer else []
            if own in wave.touched.writes:
                others += self.readers[buffer]
            found |= {other.number: other for other in others}
        return [found[number] for number in sorted(found, reverse=True)]

    def _waits(self, wave: Wave, tile: int, worker: int, before: Sequence[Wave]) -> list[Wave]:
        waits = []
        for other in before:
            if (self.known[worker] >= other.ends).all():
                continue
            if (self.known[worker] < self._needed(wave, tile, other)).any():
                other.is_awaited = True
                waits.append(other)
                np.maximum(self.known[worker], other.joined, out=self.known[worker])
        return waits

    def _needed(self, wave: Wave, tile: int, other: Wave) -> Clock:
        """What must be done of `other` before a tile: by worker, instructions."""
        needed = np.zeros(len(self.done), dtype=np.int32)
        for own, start, end, is_write in wave.touched.by_tile[tile]:
            reads, writes = other.footprints(wave.buffer(own))
            for footprints in (writes, reads if is_write else None):
                if footprints is None:
                    continue
                if footprints.num_tiles == len(other.workers) and footprints.is_within(start, end):
                    return other.ends
                tiles = footprints.overlapping(start, end)
                np.maximum.at(needed, other.workers[tiles], other.positions[tiles] + 1)
        return needed

    def _record(self, wave: Wave) -> None:
        for own in wave.touched.writes:
            buffer = wave.buffer(own)
            self.last_writer[buffer] = wave
            self.readers[buffer] = []
        for own in wave.touched.reads.keys() - wave.touched.writes.keys():
            self.readers[wave.buffer(own)].append(wave)


def barriers(module: ModuleOp, context: PassContext) -> None:
    coverage = Coverage(context.machine.num_workers)
    outline = outline_of(module, "", context)
    known: dict[tuple[type[TiledOp], str], Touched] = {}  # layers are alike but for their KV buffer
    for number, op in enumerate_ops(module):
        key = (type(op), op.role)
        program_op = outline.ops[number]
        if key not in known:
            known[key] = Touched(outline, program_op, instructions_of(op, number, context))
        coverage.add(op, program_op.kv, known[key], op.decided_list("workers"))
    attach(coverage)


def attach(coverage: Coverage) -> None:
    """Numbers the counters that anybody waits for, and writes counters, signals and waits into the ops."""
    counters: dict[int, int] = {}
    for wave in coverage.waves:
        if wave.is_awaited:
            counters[wave.number] = len(counters)
            wave.op.decide(counter=counters[wave.number], signals=[int(tile) for tile in wave.last_tiles])
    for wave, waits in zip(coverage.waves, coverage.waits, strict=True):
        triples = [(tile, counters[other.number], len(other.last_tiles)) for tile, other in waits]
        if triples:
            wave.op.decide(waits=[number for triple in triples for number in triple])
