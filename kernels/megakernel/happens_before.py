"""What a schedule's waits guarantee: an order of execution that exists, and every order's common part.

Counters only grow, so an instruction that may run stays runnable: a schedule is free of deadlock exactly if
running whatever can run, in any order, runs everything.

What precedes an instruction in *every* order is its worker's program order and, for each `Wait(c, t)`, those
signallers of c without which the first t arrivals cannot happen. An arrival that itself comes after some
wait for at least t arrivals at c is never among the first t. Of the others, U, a signaller s is certain if
fewer than t of U remain once s and all that follow it are taken away; where U has exactly t, all are.
"""

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.program import Instruction, Program
from megakernel.schedule_error import Hazard, ScheduleError, instruction_name

Clocks = npt.NDArray[np.int32]
"""[instructions, workers] how many of each worker's first instructions precede (its own: itself included)."""

_MAX_SIGNALLERS = 4096
"""Above this, which of a counter's arrivals are certain is not worked out pair by pair."""


class Stream(msgspec.Struct, frozen=True, eq=False):
    """A program's instructions in one list, worker after worker."""

    program: Program
    instructions: tuple[Instruction, ...]
    workers: npt.NDArray[np.int32]
    """[instructions] the worker of each."""
    positions: npt.NDArray[np.int32]
    """[instructions] its index on that worker."""
    starts: tuple[int, ...]
    """[workers] where each worker's instructions start."""
    signallers: tuple[npt.NDArray[np.int64], ...]
    """[counters] the instructions that signal each."""

    def name(self, instruction: int) -> str:
        return instruction_name(
            self.program, int(self.workers[instruction]), int(self.positions[instruction])
        )


def stream_of(program: Program) -> Stream:
    """Counters and signals must be in range."""
    instructions = tuple(instruction for worker in program.workers for instruction in worker)
    lengths = [len(worker) for worker in program.workers]
    signallers: list[list[int]] = [[] for _ in range(program.num_counters)]
    for number, instruction in enumerate(instructions):
        if instruction.signal >= 0:
            signallers[instruction.signal].append(number)
    return Stream(
        program=program,
        instructions=instructions,
        workers=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        positions=np.array([i for length in lengths for i in range(length)], dtype=np.int32),
        starts=tuple(sum(lengths[:worker]) for worker in range(len(lengths))),
        signallers=tuple(np.array(numbers, dtype=np.int64) for numbers in signallers),
    )


def execution_order(stream: Stream) -> list[int]:
    """One order in which everything runs. Raises ScheduleError where there is none."""
    program = stream.program
    arrivals = [0] * program.num_counters
    waiting: dict[tuple[int, int], list[int]] = {}
    next_index = [0] * len(program.workers)
    runnable = list(range(len(program.workers)))
    order: list[int] = []
    while runnable:
        worker = runnable.pop()
        sequence = program.workers[worker]
        while next_index[worker] < len(sequence):
            instruction = sequence[next_index[worker]]
            unmet = next((w for w in instruction.waits if arrivals[w.counter] < w.target), None)
            if unmet is not None:
                waiting.setdefault((unmet.counter, unmet.target), []).append(worker)
                break
            order.append(stream.starts[worker] + next_index[worker])
            next_index[worker] += 1
            if instruction.signal >= 0:
                counter = instruction.signal
                arrivals[counter] += 1
                runnable.extend(waiting.pop((counter, arrivals[counter]), ()))
    if len(order) < len(stream.instructions):
        raise ScheduleError(Hazard.DEADLOCK, _stuck(stream, next_index, arrivals))
    return order


def vector_clocks(stream: Stream, order: list[int]) -> Clocks:
    """For each instruction, what precedes it in every order of execution."""
    clocks = np.zeros((len(stream.instructions), len(stream.program.workers)), dtype=np.int32)
    clocks[np.arange(len(clocks)), stream.workers] = stream.positions + 1
    certain = _certain_arrivals(stream, clocks)
    while True:
        clocks = _propagate(stream, order, certain)
        if all(len(certain[c, t]) == len(stream.signallers[c]) for c, t in certain):
            return clocks
        improved = _certain_arrivals(stream, clocks)
        if all(len(improved[key]) == len(certain[key]) for key in certain):
            return clocks
        certain = improved


_Certain = dict[tuple[int, int], npt.NDArray[np.int64]]
"""By (counter, target): the signallers that a wait for it is certain to follow."""


def _certain_arrivals(stream: Stream, clocks: Clocks) -> _Certain:
    waits: dict[int, list[tuple[int, int]]] = {}
    for number, instruction in enumerate(stream.instructions):
        for wait in instruction.waits:
            waits.setdefault(wait.counter, []).append((wait.target, number))
    certain: _Certain = {}
    for counter, waiters in waits.items():
        for target in {target for target, _ in waiters}:
            signallers = stream.signallers[counter]
            if target < len(signallers):
                gates = [number for gate_target, number in waiters if gate_target >= target]
                signallers = _certain_among(stream, clocks, signallers, gates, target)
            certain[counter, target] = signallers
    return certain


def _certain_among(
    stream: Stream, clocks: Clocks, signallers: npt.NDArray[np.int64], gates: list[int], target: int
) -> npt.NDArray[np.int64]:
    first_gate = np.full(clocks.shape[1], np.iinfo(np.int32).max, dtype=np.int32)
    np.minimum.at(first_gate, stream.workers[gates], stream.positions[gates])
    early = signallers[~(clocks[signallers] > first_gate).any(axis=1)]
    if len(early) <= target:
        return early
    if len(early) > _MAX_SIGNALLERS:
        return early[:0]
    # follows[i, j]: early[i] cannot happen before early[j] has.
    follows = clocks[early][:, stream.workers[early]] > stream.positions[early]
    possible_without = len(early) - follows.sum(axis=0)
    certain: npt.NDArray[np.int64] = early[possible_without < target]
    return certain


def _propagate(stream: Stream, order: list[int], certain: _Certain) -> Clocks:
    clocks = np.zeros((len(stream.instructions), len(stream.program.workers)), dtype=np.int32)
    joined: dict[tuple[int, int], npt.NDArray[np.int32]] = {}
    for number in order:
        clock = clocks[number]
        worker, position = int(stream.workers[number]), int(stream.positions[number])
        if position:
            clock[:] = clocks[number - 1]
        for wait in stream.instructions[number].waits:
            key = (wait.counter, wait.target)
            if key not in joined:
                # All of these have run: in every order, so in this one.
                joined[key] = clocks[certain[key]].max(axis=0, initial=0)
            np.maximum(clock, joined[key], out=clock)
        clock[worker] = position + 1
    return clocks


def _stuck(stream: Stream, next_index: list[int], arrivals: list[int]) -> str:
    program = stream.program
    lines = []
    for worker, index in enumerate(next_index):
        if index == len(program.workers[worker]):
            continue
        instruction = program.workers[worker][index]
        wait = next(w for w in instruction.waits if arrivals[w.counter] < w.target)
        lines.append(
            f"{instruction_name(program, worker, index)} waits for {wait.target} arrivals at counter"
            f" {wait.counter}, which gets {arrivals[wait.counter]} ({len(stream.signallers[wait.counter])}"
            " instructions signal it)"
        )
    shown = lines[:4] + ([f"and {len(lines) - 4} more workers"] if len(lines) > 4 else [])
    return "; ".join(shown)
