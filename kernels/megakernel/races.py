"""Coverage and races: each buffer is swept once through its ops, in dataflow order.

A buffer is cut at every edge of an access into cells. A cell remembers, by worker, the last instruction that
wrote its present content and the last that read it; since a vector clock counts a worker's instructions, one
comparison says whether all of them precede the next access. Older accesses precede by transitivity.

Where several instructions make up a head (`program.has_shared_heads`), whoever comes last writes all of it:
each of its cells counts as written by all of them. The sums that they leave to the last one are in memory
that all such ops share: who brings sums of a head must come after all that made up that head before.
"""

from collections.abc import Iterable

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.happens_before import Clocks, Stream
from megakernel.program import (
    Access,
    Op,
    Opcode,
    OpKind,
    Program,
    Space,
    has_shared_heads,
    reads_of,
    writes_of,
)
from megakernel.schedule_error import Hazard, ScheduleError

Frontier = npt.NDArray[np.int32]
"""[..., workers] one more than the index of each worker's last access; 0: none."""


class _Accesses(msgspec.Struct, frozen=True, eq=False):
    """Of the instructions of one phase of an op."""

    reads: list[tuple[int, Access]]
    writes: list[tuple[int, Access]]


class _Cells:
    """A buffer's cells [columns, rows], and who touched them last."""

    def __init__(self, program: Program, buffer: int, accesses: list[Access], num_workers: int) -> None:
        columns = program.buffers[buffer].columns
        self.column_edges = sorted({0, columns} | {e for a in accesses for e in (a.c0, a.c1)})
        self.row_edges = sorted({0, program.bucket} | {e for a in accesses for e in (a.r0, a.r1)})
        self._column_cells = {edge: cell for cell, edge in enumerate(self.column_edges)}
        self._row_cells = {edge: cell for cell, edge in enumerate(self.row_edges)}
        shape = (len(self.column_edges) - 1, len(self.row_edges) - 1)
        self.has_content = np.full(shape, program.buffers[buffer].space is Space.INPUT)
        self.written = np.zeros((*shape, num_workers), dtype=np.int32)
        self.read = np.zeros((*shape, num_workers), dtype=np.int32)

    def part(self, access: Access) -> tuple[slice, slice]:
        return (
            slice(self._column_cells[access.c0], self._column_cells[access.c1]),
            slice(self._row_cells[access.r0], self._row_cells[access.r1]),
        )

    def where(self, cell: tuple[int, int]) -> str:
        column, row = cell
        columns = f"columns [{self.column_edges[column]}, {self.column_edges[column + 1]})"
        return f"{columns} rows [{self.row_edges[row]}, {self.row_edges[row + 1]})"


class RaceCheck:
    """Raises ScheduleError at the first op whose accesses are not all ordered by `clocks`."""

    def __init__(self, stream: Stream, clocks: Clocks) -> None:
        self._stream = stream
        self._program = stream.program
        self._clocks = clocks
        self._phases = _phases(stream)
        by_buffer: dict[int, list[Access]] = {}
        for phase in self._phases.values():
            for _, access in (*phase.reads, *phase.writes):
                by_buffer.setdefault(access.buffer, []).append(access)
        workers = len(self._program.workers)
        self._cells = {
            buffer.index: _Cells(self._program, buffer.index, by_buffer.get(buffer.index, []), workers)
            for buffer in self._program.buffers
        }
        geometry = self._program.geometry
        num_heads = geometry.num_heads + 2 * geometry.num_kv_heads
        self._sums: Frontier = np.zeros((num_heads, workers), dtype=np.int32)
        """By head, who last brought sums of it."""
        self.num_ordered = 0
        """Accesses found to follow all that they conflict with."""

    def run(self) -> None:
        for op in self._program.ops:
            for number, outputs in enumerate(_phase_outputs(self._program, op)):
                phase = self._phases.get((op.index, number), _Accesses([], []))
                self._check_reads(phase.reads)
                self._check_coverage(op, outputs, phase.writes)
                self._check_writes(phase.writes)
                if has_shared_heads(self._program, op) and op.output in outputs:
                    self._share_heads(op, phase.writes)

    def _check_reads(self, reads: list[tuple[int, Access]]) -> None:
        needed: dict[Access, Frontier] = {}
        for number, access in reads:
            cells = self._cells[access.buffer]
            part = cells.part(access)
            if access not in needed:
                if not cells.has_content[part].all():
                    raise ScheduleError(
                        Hazard.RAW,
                        f"{self._stream.name(number)} reads {self._shown(access)}, not yet written",
                    )
                needed[access] = cells.written[part].max(axis=(0, 1))
            self._require(number, needed[access], access, Hazard.RAW, "reads", "written by")
        for number, access in reads:
            cells = self._cells[access.buffer]
            worker, position = int(self._stream.workers[number]), int(self._stream.positions[number])
            seen = cells.read[(*cells.part(access), worker)]
            np.maximum(seen, position + 1, out=seen)

    def _check_writes(self, writes: list[tuple[int, Access]]) -> None:
        fresh: dict[int, Frontier] = {}
        for number, access in writes:
            cells = self._cells[access.buffer]
            part = cells.part(access)
            for frontier, hazard, verb in (
                (cells.read, Hazard.WAR, "read by"),
                (cells.written, Hazard.WAW, "written by"),
            ):
                needed = frontier[part].max(axis=(0, 1))
                self._require(number, needed, access, hazard, "overwrites", verb)
            if access.buffer not in fresh:
                fresh[access.buffer] = np.zeros_like(cells.written)
            worker = int(self._stream.workers[number])
            fresh[access.buffer][(*part, worker)] = self._stream.positions[number] + 1
        for buffer, written in fresh.items():
            cells = self._cells[buffer]
            cells.written = written
            cells.read = np.zeros_like(cells.read)
            cells.has_content[:] = True

    def _share_heads(self, op: Op, writes: list[tuple[int, Access]]) -> None:
        dim, num_queries = self._program.geometry.head_dim, self._program.geometry.num_heads
        brought = np.zeros_like(self._sums)
        for number, access in writes:
            first = 0 if access.buffer == op.output else num_queries
            heads = slice(first + access.c0 // dim, first + -(-access.c1 // dim))
            self._require(number, self._sums[heads].max(axis=0), access, Hazard.WAR, "shares", "finished by")
            worker = int(self._stream.workers[number])
            brought[heads, worker] = np.maximum(brought[heads, worker], self._stream.positions[number] + 1)
        self._sums = brought
        for buffer, first in ((op.output, 0), (op.kv, num_queries)):
            cells = self._cells[buffer]
            of_cells = [first + column // dim for column in cells.column_edges[:-1]]
            np.maximum(cells.written, brought[of_cells][:, None], out=cells.written)

    def _require(
        self, number: int, needed: Frontier, access: Access, hazard: Hazard, verb: str, earlier_verb: str
    ) -> None:
        late = self._clocks[number] < needed
        if late.any():
            worker = int(np.argmax(late))
            earlier = self._stream.starts[worker] + int(needed[worker]) - 1
            raise ScheduleError(
                hazard,
                f"{self._stream.name(number)} {verb} {self._shown(access)}, {earlier_verb}"
                f" {self._stream.name(earlier)}, and nothing makes it wait for that",
            )
        self.num_ordered += 1

    def _check_coverage(self, op: Op, outputs: tuple[int, ...], writes: list[tuple[int, Access]]) -> None:
        for buffer in outputs:
            cells = self._cells[buffer]
            count = np.zeros(cells.has_content.shape, dtype=np.int32)
            mine = [(number, access) for number, access in writes if access.buffer == buffer]
            for _, access in mine:
                count[cells.part(access)] += 1
            if (count == 1).all():
                continue
            cell = tuple(int(i) for i in np.argwhere(count != 1)[0])
            place = f"{cells.where((cell[0], cell[1]))} of {self._program.buffers[buffer].name}"
            if not count[cell]:
                raise ScheduleError(Hazard.COVERAGE, f"no instruction of {op.name} computes {place}")
            both = [self._stream.name(n) for n, access in mine if _holds(cells.part(access), cell)]
            raise ScheduleError(Hazard.COVERAGE, f"{place}: computed by both {both[0]} and {both[1]}")

    def _shown(self, access: Access) -> str:
        name = self._program.buffers[access.buffer].name
        return f"columns [{access.c0}, {access.c1}) rows [{access.r0}, {access.r1}) of {name}"


def _phases(stream: Stream) -> dict[tuple[int, int], _Accesses]:
    """By op and phase: 1 for what sums K-tiles, 0 for all else."""
    phases: dict[tuple[int, int], _Accesses] = {}
    for number, instruction in enumerate(stream.instructions):
        key = (instruction.op, int(instruction.opcode is Opcode.REDUCE))
        phase = phases.setdefault(key, _Accesses([], []))
        reads, writes = reads_of(stream.program, instruction), writes_of(stream.program, instruction)
        _require_inside(stream, number, (*reads, *writes))
        phase.reads.extend((number, access) for access in reads)
        phase.writes.extend((number, access) for access in writes)
    return phases


def _require_inside(stream: Stream, number: int, accesses: Iterable[Access]) -> None:
    for access in accesses:
        buffer = stream.program.buffers[access.buffer]
        if not (0 <= access.c0 < access.c1 <= buffer.columns and 0 <= access.r0 < access.r1):
            raise ScheduleError(
                Hazard.STRUCTURE,
                f"{stream.name(number)} touches columns [{access.c0}, {access.c1}) of {buffer.name},"
                f" which has {buffer.columns}",
            )


def _phase_outputs(program: Program, op: Op) -> tuple[tuple[int, ...], ...]:
    """The buffers that each phase of an op fills."""
    outputs = tuple(buffer for buffer in (op.output, _written_kv(op), op.stats) if buffer >= 0)
    partial = program.partial_buffers[op.index]
    return (outputs,) if partial < 0 else ((partial,), outputs)


def _written_kv(op: Op) -> int:
    return op.kv if op.kind is OpKind.LINEAR else -1


def _holds(part: tuple[slice, slice], cell: tuple[int, ...]) -> bool:
    return all(s.start <= i < s.stop for s, i in zip(part, cell, strict=True))
