"""The cost model: a program's timeline on a machine, simulated event by event.

A worker has a loader and a computing side. The loader fetches weight tiles in instruction order, each from
the moment its pages are held (`PageUse.live_from`), whether or not the worker waits at a barrier: weights,
and the committed context that attention reads, depend on nothing. A GPU's attention reads its context itself,
after its waits and beside the loader (`Work.is_direct`). All active loads share the machine's bandwidth
equally, none gets more than a worker's own. The computing side takes one instruction at a time, when its
waits are satisfied and its tile has landed (or, on machines that compute while loading, is landing).
"""

import heapq
from collections.abc import Mapping

import msgspec

from megakernel.machine import Machine
from megakernel.program import Instruction, PageRole, Program
from megakernel.work import DEFAULT_CONTEXT_TOKENS, Work, WorkTable, step_bytes

_LANDING_SHARE = 1 / 16
"""Of an instruction's computing, what is left when its last bytes arrive, where it computes while loading."""


class SimulationError(RuntimeError):
    """A program that never ends under the model: names the first instruction that waits in vain."""


class Stalls(msgspec.Struct, frozen=True, kw_only=True):
    """What workers did with the makespan, in microseconds summed over workers."""

    busy_us: float
    barrier_us: float
    """Waiting for other workers' arrivals."""
    load_us: float
    """Waits satisfied, but the tile had not landed."""
    idle_us: float
    """After a worker's last instruction."""


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """Times are microseconds from the step's start, by worker and instruction."""

    ready_us: tuple[tuple[float, ...], ...]
    """When an instruction's waits were satisfied and its worker was free; its tile may still be loading."""
    starts_us: tuple[tuple[float, ...], ...]
    ends_us: tuple[tuple[float, ...], ...]
    makespan_us: float
    stalls: Stalls

    @property
    def bubble_share(self) -> float:
        """Of all workers' time: waits for other workers, and what follows a last instruction."""
        total_us = self.makespan_us * len(self.ends_us)
        return (self.stalls.barrier_us + self.stalls.idle_us) / total_us if total_us else 0.0


def bandwidth_bound_us(
    program: Program,
    machine: Machine,
    formats: Mapping[str, str] | None = None,
    context_tokens: int = DEFAULT_CONTEXT_TOKENS,
    *,
    is_shared: bool = True,
) -> float:
    """The time to read every byte once at full bandwidth: no schedule is faster."""
    total = step_bytes(program, machine, formats, context_tokens, is_shared=is_shared)
    return total / (machine.bandwidth_gb_s * 1e3)


def simulate(
    program: Program,
    machine: Machine,
    formats: Mapping[str, str] | None = None,
    context_tokens: int = DEFAULT_CONTEXT_TOKENS,
    *,
    is_shared: bool = True,
) -> Trace:
    """The timeline of one step, whose rows have one context or, unless it `is_shared`, each its own.

    Deterministic. Raises SimulationError where a wait is never satisfied.
    """
    works = WorkTable(program, machine, formats, context_tokens, is_shared=is_shared)
    simulation = _Simulation(program, machine, works)
    simulation.run()
    return simulation.trace()


_LANDED, _WOKEN, _ENDED = range(3)


class _Simulation:
    """Loads progress in virtual bytes, those that any one active load has moved since the start: all have
    the same rate, so a load ends when virtual bytes reach a value known at its beginning."""

    def __init__(self, program: Program, machine: Machine, works: WorkTable) -> None:
        self.program = program
        self.machine = machine
        self.works = [[works(instruction) for instruction in worker] for worker in program.workers]
        self.costs = [
            list(map(self._duration_us, worker, [None, *worker[:-1]], work))
            for worker, work in zip(program.workers, self.works, strict=True)
        ]
        self.live_from = [[_weights_from(i, at) for at, i in enumerate(worker)] for worker in program.workers]
        self.pending = [[len(instruction.waits) for instruction in worker] for worker in program.workers]
        self.direct_at = [-1] * len(program.workers)
        self.landed = [[False] * len(worker) for worker in program.workers]
        self.ready: list[list[float]] = [[] for _ in program.workers]
        self.starts: list[list[float]] = [[] for _ in program.workers]
        self.ends: list[list[float]] = [[] for _ in program.workers]
        self.num_ending = [0] * len(program.workers)
        self.loader_at = [0] * len(program.workers)
        self.is_loading = [False] * len(program.workers)
        self.turn_us = [0.0] * len(program.workers)
        self.awake_us = [[0.0] * len(worker) for worker in program.workers]
        self.arrivals = [0] * program.num_counters
        self.waiters = self._waiters()
        self.barrier_us = 0.0
        self.load_us = 0.0
        self.now = 0.0
        self.virtual_bytes = 0.0
        self.loads: list[tuple[float, int, int]] = []
        self.events: list[tuple[float, int, int, int]] = []

    def _duration_us(self, instruction: Instruction, before: Instruction | None, work: Work) -> float:
        fixed_us = self.machine.instruction_us + work.compute_us + work.latency_us
        if before is None or (before.op, before.opcode) != (instruction.op, instruction.opcode):
            return fixed_us + work.prologue_us
        is_same_input = (before.k0, before.k1) == (instruction.k0, instruction.k1)
        return fixed_us + (0.0 if is_same_input else work.refill_us)

    def _waiters(self) -> list[dict[int, list[tuple[int, int]]]]:
        waiters: list[dict[int, list[tuple[int, int]]]] = [{} for _ in range(self.program.num_counters)]
        for worker, instructions in enumerate(self.program.workers):
            for at, instruction in enumerate(instructions):
                for wait in instruction.waits:
                    if wait.target <= 0:
                        self.pending[worker][at] -= 1
                    else:
                        waiters[wait.counter].setdefault(wait.target, []).append((worker, at))
        return waiters

    def run(self) -> None:
        for worker in range(len(self.program.workers)):
            self._load_next(worker)
            self._start_if_ready(worker)
        while self.loads or self.events:
            load_ends = self.now + self._load_left_us() if self.loads else float("inf")
            if self.events and self.events[0][0] <= load_ends:
                self._handle_event()
            else:
                self._end_load(load_ends)
        self._check_all_ended()

    def _bytes_per_us(self) -> float:
        """Of each active load."""
        machine = self.machine
        return min(machine.worker_bandwidth_gb_s, machine.bandwidth_gb_s / len(self.loads)) * 1e3

    def _load_left_us(self) -> float:
        return max(0.0, self.loads[0][0] - self.virtual_bytes) / self._bytes_per_us()

    def _handle_event(self) -> None:
        time, kind, worker, at = heapq.heappop(self.events)
        if self.loads:
            self.virtual_bytes += (time - self.now) * self._bytes_per_us()
        self.now = time
        if kind == _LANDED:
            self.landed[worker][at] = True
            self._start_if_ready(worker)
        elif kind == _WOKEN:
            self.pending[worker][at] -= 1
            self.awake_us[worker][at] = time
            self._start_if_ready(worker)
        else:
            self._end(worker, at)

    def _end_load(self, time: float) -> None:
        virtual_end, worker, at = heapq.heappop(self.loads)
        self.virtual_bytes = max(self.virtual_bytes, virtual_end)
        self.now = time
        heapq.heappush(self.events, (time + self.machine.load_latency_us, _LANDED, worker, at))
        if not self.works[worker][at].is_direct:
            self.is_loading[worker] = False
            self._load_next(worker)

    def _load_next(self, worker: int) -> None:
        """Begins the next load whose pages are held: those of instruction `live_from` and later ones."""
        works, landed, live_from = self.works[worker], self.landed[worker], self.live_from[worker]
        current = len(self.ends[worker])
        while not self.is_loading[worker] and self.loader_at[worker] < len(works):
            at = self.loader_at[worker]
            if works[at].load_bytes <= 0:
                landed[at] = True
            elif not works[at].is_direct:
                if live_from[at] > current:
                    return
                self.is_loading[worker] = True
                self._load(worker, at)
            self.loader_at[worker] += 1

    def _load(self, worker: int, at: int) -> None:
        heapq.heappush(self.loads, (self.virtual_bytes + self.works[worker][at].load_bytes, worker, at))

    def _start_if_ready(self, worker: int) -> None:
        """Starts the worker's current instruction; may be called at any time."""
        at = len(self.ends[worker])
        if at == len(self.costs[worker]) or self.num_ending[worker] > at or self.pending[worker][at]:
            return
        is_started = len(self.starts[worker]) > at
        cost_us = self.costs[worker][at]
        if self.landed[worker][at]:
            if is_started:
                end = self._streamed_end_us(worker, at, cost_us)
            else:
                self._start(worker, at)
                end = self.now + cost_us
            self.num_ending[worker] = at + 1
            heapq.heappush(self.events, (end, _ENDED, worker, at))
        elif self.works[worker][at].is_direct:
            if self.direct_at[worker] != at:
                self.direct_at[worker] = at
                self._load(worker, at)
        elif self.machine.computes_while_loading and not is_started:
            self._start(worker, at)

    def _start(self, worker: int, at: int) -> None:
        satisfied = max(self.turn_us[worker], self.awake_us[worker][at])
        self.barrier_us += satisfied - self.turn_us[worker]
        self.load_us += self.now - satisfied
        self.ready[worker].append(satisfied)
        self.starts[worker].append(self.now)

    def _streamed_end_us(self, worker: int, at: int, cost_us: float) -> float:
        """The last bytes of a tile that was computed while it came in have just landed."""
        compute_end = self.starts[worker][at] + cost_us
        landing_end = self.now + cost_us * _LANDING_SHARE
        end = max(compute_end, landing_end)
        self.load_us += end - compute_end
        return end

    def _end(self, worker: int, at: int) -> None:
        self.ends[worker].append(self.now)
        self.turn_us[worker] = self.now
        counter = self.program.workers[worker][at].signal
        if counter >= 0:
            self.arrivals[counter] += 1
            wake_us = self.now + self.machine.sync_us
            for waiter, waits_at in self.waiters[counter].get(self.arrivals[counter], ()):
                heapq.heappush(self.events, (wake_us, _WOKEN, waiter, waits_at))
        self._load_next(worker)
        self._start_if_ready(worker)

    def _check_all_ended(self) -> None:
        for worker, instructions in enumerate(self.program.workers):
            at = len(self.ends[worker])
            if at < len(instructions):
                instruction = instructions[at]
                missing = ", ".join(
                    f"counter {wait.counter} reached {self.arrivals[wait.counter]} of {wait.target}"
                    for wait in instruction.waits
                    if self.arrivals[wait.counter] < wait.target
                )
                name = self.program.ops[instruction.op].name
                raise SimulationError(
                    f"worker {worker} waits in vain at instruction {at} ({name}): {missing}"
                )

    def trace(self) -> Trace:
        makespan_us = max((ends[-1] for ends in self.ends if ends), default=0.0)
        idle_us = sum(makespan_us - turn for turn in self.turn_us)
        total_us = makespan_us * len(self.ends)
        return Trace(
            ready_us=tuple(map(tuple, self.ready)),
            starts_us=tuple(map(tuple, self.starts)),
            ends_us=tuple(map(tuple, self.ends)),
            makespan_us=makespan_us,
            stalls=Stalls(
                busy_us=total_us - idle_us - self.barrier_us - self.load_us,
                barrier_us=self.barrier_us,
                load_us=self.load_us,
                idle_us=idle_us,
            ),
        )


def _weights_from(instruction: Instruction, at: int) -> int:
    return min((use.live_from for use in instruction.pages if use.role is PageRole.WEIGHTS), default=at)


def ends_by_op(program: Program, trace: Trace) -> dict[int, float]:
    """When each op's last instruction ended, by op index."""
    ends: dict[int, float] = {}
    for instructions, times in zip(program.workers, trace.ends_us, strict=True):
        for instruction, end in zip(instructions, times, strict=True):
            ends[instruction.op] = max(end, ends.get(instruction.op, 0.0))
    return ends


def extrapolated_us(program: Program, trace: Trace, num_layers: int, vocab_size: int) -> float:
    """The makespan of the whole model, from that of one cut to fewer layers and a smaller vocabulary.

    A layer more costs what the last simulated one did, from its predecessor's end to its own; the head costs
    in proportion to its columns. Within a percent once layers repeat, which decode's chain of ops does after
    the first; exact where nothing was cut.
    """
    simulated = program.geometry.num_layers
    layer_ends = [0.0] * simulated
    for index, end in ends_by_op(program, trace).items():
        layer = program.ops[index].layer
        if layer >= 0:
            layer_ends[layer] = max(layer_ends[layer], end)
    more_layers = num_layers - simulated
    assert more_layers == 0 or simulated >= 2, "a period is the difference of two layers"
    layers_us = more_layers * (layer_ends[-1] - layer_ends[-2]) if more_layers else 0.0
    head_us = trace.makespan_us - layer_ends[-1]
    return trace.makespan_us + layers_us + head_us * (vocab_size / program.geometry.vocab_size - 1)
