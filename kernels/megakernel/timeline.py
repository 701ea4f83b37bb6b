"""What every worker did when, in one step: from a run's stamps or from the cost model."""

from collections.abc import Callable, Mapping, Sequence

import msgspec

from megakernel.cost import Trace, simulate
from megakernel.machine import Machine
from megakernel.memory import role_of
from megakernel.plan import ROLES
from megakernel.program import Instruction, Opcode, Program
from megakernel.work import DEFAULT_CONTEXT_TOKENS, WorkTable

BytesOf = Callable[[Instruction], float]
"""What an instruction reads from memory: weights, or the context's KV."""


class Times(msgspec.Struct, frozen=True):
    """Of one instruction, microseconds on any clock that all workers share."""

    reached_us: float
    ready_us: float
    """Its waits were over. A run knows no difference between this and its start."""
    started_us: float
    ended_us: float


class Slice(msgspec.Struct, frozen=True, kw_only=True):
    """One instruction on a worker's lane; microseconds from the step's start."""

    worker: int
    index: int
    name: str
    """Of its op."""
    role: str
    instruction: Instruction
    num_bytes: float
    reached_us: float
    ready_us: float
    started_us: float
    ended_us: float

    @property
    def busy_us(self) -> float:
        return self.ended_us - self.started_us

    @property
    def waiting_us(self) -> float:
        return self.started_us - self.reached_us

    @property
    def gb_s(self) -> float:
        return self.num_bytes / self.busy_us / 1e3 if self.busy_us > 0 else 0.0


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """Of one step. Slices of a lane ascend and do not overlap."""

    lanes: tuple[tuple[Slice, ...], ...]
    makespan_us: float

    @property
    def total_us(self) -> float:
        """Of all workers together."""
        return self.makespan_us * len(self.lanes)


class RoleTotals(msgspec.Struct, frozen=True, kw_only=True):
    """Of all workers and layers together."""

    role: str
    num_instructions: int
    busy_us: float
    waiting_us: float
    num_bytes: float

    @property
    def worker_gb_s(self) -> float:
        """What one worker reads while it is at it."""
        return self.num_bytes / self.busy_us / 1e3 if self.busy_us > 0 else 0.0


def timeline_of(program: Program, times: Sequence[Sequence[Times]], bytes_of: BytesOf) -> Timeline:
    """The step begins when the first worker reaches its first instruction; it ends with the last end."""
    begin_us = min((lane[0].reached_us for lane in times if lane), default=0.0)
    end_us = max((lane[-1].ended_us for lane in times if lane), default=0.0)
    lanes = tuple(
        tuple(
            Slice(
                worker=worker,
                index=index,
                name=program.ops[instruction.op].name,
                role=role_of(program.ops[instruction.op]),
                instruction=instruction,
                num_bytes=bytes_of(instruction),
                reached_us=at.reached_us - begin_us,
                ready_us=at.ready_us - begin_us,
                started_us=at.started_us - begin_us,
                ended_us=at.ended_us - begin_us,
            )
            for index, (instruction, at) in enumerate(zip(sequence, lane, strict=True))
        )
        for worker, (sequence, lane) in enumerate(zip(program.workers, times, strict=True))
    )
    return Timeline(lanes=lanes, makespan_us=end_us - begin_us)


def measured_timeline(
    program: Program, stamps_ns: Sequence[Sequence[Sequence[int]]], bytes_of: BytesOf
) -> Timeline:
    """From `runtime.Stamps.workers`: reached, waits over, done, in nanoseconds."""
    times = [
        [Times(reached / 1e3, started / 1e3, started / 1e3, ended / 1e3) for reached, started, ended in lane]
        for lane in stamps_ns
    ]
    return timeline_of(program, times, bytes_of)


def predicted_timeline(
    program: Program,
    machine: Machine,
    formats: Mapping[str, str] | None = None,
    context_tokens: int = DEFAULT_CONTEXT_TOKENS,
) -> Timeline:
    """As the cost model sees it. Raises SimulationError."""
    trace = simulate(program, machine, formats, context_tokens)
    return simulated_timeline(program, trace, bytes_read(program, machine, formats, context_tokens))


def simulated_timeline(program: Program, trace: Trace, bytes_of: BytesOf) -> Timeline:
    times = [
        [
            Times(reached, ready, start, end)
            for reached, ready, start, end in zip((0.0, *ends[:-1]), readies, starts, ends, strict=True)
        ]
        if ends
        else []
        for readies, starts, ends in zip(trace.ready_us, trace.starts_us, trace.ends_us, strict=True)
    ]
    return timeline_of(program, times, bytes_of)


def bytes_read(
    program: Program,
    machine: Machine,
    formats: Mapping[str, str] | None = None,
    context_tokens: int = DEFAULT_CONTEXT_TOKENS,
) -> BytesOf:
    works = WorkTable(program, machine, formats, context_tokens)
    return lambda instruction: works(instruction).load_bytes


def tile_name(piece: Slice) -> str:
    """Such as `layers.3.o [0, 96)`, or `layers.3.down [0, 96) K [768, 1536)`."""
    instruction = piece.instruction
    name = f"{piece.name} [{instruction.n0}, {instruction.n1})"
    match instruction.opcode:
        case Opcode.LINEAR_PARTIAL:
            return f"{name} K [{instruction.k0}, {instruction.k1})"
        case Opcode.REDUCE:
            return f"{name} sum of {instruction.num_parts}"
        case Opcode.ATTENTION:
            return f"{name} part {instruction.part} of {instruction.num_parts}"
        case _:
            return name


def busy_us(timeline: Timeline) -> float:
    return sum(piece.busy_us for lane in timeline.lanes for piece in lane)


def role_totals(timeline: Timeline) -> tuple[RoleTotals, ...]:
    """In dependency order; roles that nothing was done for are left out."""
    by_role: dict[str, list[Slice]] = {role: [] for role in ROLES}
    for lane in timeline.lanes:
        for piece in lane:
            by_role[piece.role].append(piece)
    return tuple(
        RoleTotals(
            role=role,
            num_instructions=len(pieces),
            busy_us=sum(piece.busy_us for piece in pieces),
            waiting_us=sum(piece.waiting_us for piece in pieces),
            num_bytes=sum(piece.num_bytes for piece in pieces),
        )
        for role, pieces in by_role.items()
        if pieces
    )
