"""A NumPy VM: runs a program's instruction streams as they are, in any legal order of its workers.

The oracle of both backends. It checks counters before each instruction and is built to expose a bad
schedule: workers are interleaved by a seed, one starved while another runs ahead, and memory starts as NaN.
"""

import msgspec
import numpy as np

from megakernel.head import Reductions, reduce_rows
from megakernel.model.weights import Weights
from megakernel.program import Program
from megakernel.schedule_error import instruction_name
from megakernel.vm_ops import execute
from megakernel.vm_state import Arithmetic, Float32Array, OpWeights, StepError, VmKv, VmState, VmStep

_MAX_SHOWN = 8


class VmStuckError(RuntimeError):
    """No worker can go on; the message names what each waits for."""


class VmResult(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    buffers: dict[str, Float32Array]
    """By name, [rows, columns]: as the last op that ran left them. NaN where nothing was written."""
    executed: tuple[tuple[int, int], ...]
    """(worker, index) in the order of execution."""
    step: VmStep

    @property
    def logits(self) -> Float32Array:
        """[rows, vocab]; of a restricted row NaN but for its allowed tokens."""
        return self.buffers["logits"]

    @property
    def allowed_logits(self) -> Float32Array:
        """[allowed tokens] in the order of the step's `allowed_token_ids`."""
        parts = [logits[self.step.allowed(row)] for row, logits in enumerate(self.logits)]
        return np.concatenate(parts)

    @property
    def reductions(self) -> Reductions:
        """Of the rows that are reduced, in order."""
        rows = [row for row in range(self.step.num_rows) if self.step.is_reduced(row)]
        return reduce_rows(self.logits[rows], self.step.top_k)


class Vm:
    """Runs steps of one program; KV stays from step to step in `kv`."""

    def __init__(
        self,
        program: Program,
        weights: Weights | OpWeights,
        kv: VmKv,
        arithmetic: Arithmetic = Arithmetic.CPU,
    ) -> None:
        """OpWeights have an arithmetic of their own. Raises ValueError where it keeps KV as another type."""
        self.program = program
        self.kv = kv
        self._weights = weights if isinstance(weights, OpWeights) else OpWeights(weights, arithmetic)
        if self._weights.arithmetic is Arithmetic.CUDA and kv.dtype != np.float16:
            raise ValueError(f"a KV pool of {kv.dtype}: CUDA keeps K and V as float16")

    def run(
        self,
        step: VmStep,
        *,
        seed: int | None = None,
        stop_after_op: str | None = None,
        layers: int | None = None,
    ) -> VmResult:
        """`seed` picks the interleaving; None goes round the workers in turn.

        `stop_after_op` names the last op that runs, `layers` how many layers run; instructions of later ops
        only keep their counters. Raises StepError, VmStuckError.
        """
        last_op = _last_op(self.program, stop_after_op, layers)
        state = VmState(self.program, self._weights, self.kv, step)
        turns = _Turns(len(self.program.workers), seed)
        arrivals = [0] * self.program.num_counters
        next_index = [0] * len(self.program.workers)
        executed = []
        # A program that races may well compute with NaN; that is for the caller to see.
        with np.errstate(all="ignore"):
            while ready := self._ready(next_index, arrivals):
                worker = turns.choose(ready)
                instruction = self.program.workers[worker][next_index[worker]]
                if instruction.op <= last_op:
                    execute(state, instruction)
                    executed.append((worker, next_index[worker]))
                if instruction.signal >= 0:
                    arrivals[instruction.signal] += 1
                next_index[worker] += 1
        self._require_done(next_index, arrivals)
        return VmResult(buffers=state.named_buffers(), executed=tuple(executed), step=step)

    def _ready(self, next_index: list[int], arrivals: list[int]) -> list[int]:
        return [
            worker
            for worker, sequence in enumerate(self.program.workers)
            if next_index[worker] < len(sequence)
            and all(arrivals[w.counter] >= w.target for w in sequence[next_index[worker]].waits)
        ]

    def _require_done(self, next_index: list[int], arrivals: list[int]) -> None:
        waiting = []
        for worker, index in enumerate(next_index):
            if index < len(self.program.workers[worker]):
                unmet = [
                    f"counter {w.counter} at {arrivals[w.counter]} of {w.target}"
                    for w in self.program.workers[worker][index].waits
                    if arrivals[w.counter] < w.target
                ]
                waiting.append(f"{instruction_name(self.program, worker, index)}: {', '.join(unmet)}")
        if waiting:
            raise VmStuckError("; ".join(waiting[:_MAX_SHOWN]))


class _Turns:
    """Who goes next. Seeded, it keeps to a random ranking of workers for a while, then draws another."""

    def __init__(self, num_workers: int, seed: int | None) -> None:
        self._rng = None if seed is None else np.random.default_rng(seed)
        self._ranking = list(range(num_workers))
        self._restlessness = float(self._rng.choice((1.0, 0.3, 0.02))) if self._rng else 0.0
        """How likely the ranking changes before a choice: 1 is a uniform draw, 0.02 starves workers."""
        if self._rng:
            self._rng.shuffle(self._ranking)
        self._last = -1

    def choose(self, ready: list[int]) -> int:
        if self._rng is None:
            self._last = next((worker for worker in ready if worker > self._last), ready[0])
            return self._last
        if self._rng.random() < self._restlessness:
            self._rng.shuffle(self._ranking)
        return min(ready, key=self._ranking.__getitem__)


def _last_op(program: Program, stop_after_op: str | None, layers: int | None) -> int:
    """Index of the last op to run."""
    last = len(program.ops) - 1
    if stop_after_op is not None:
        names = [op.name for op in program.ops]
        if stop_after_op not in names:
            raise StepError(f"no op {stop_after_op!r}; there are {', '.join(names)}")
        last = names.index(stop_after_op)
    if layers is not None:
        if not 0 <= layers <= program.geometry.num_layers:
            raise StepError(f"{layers} layers of {program.geometry.num_layers}")
        if layers < program.geometry.num_layers:
            last = min(last, max(op.index for op in program.ops if op.layer < layers and op.name != "head"))
    return last
