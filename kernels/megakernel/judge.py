"""Prices plans: the program a plan compiles to, cut to a few layers while searching, is simulated; the few
that may be chosen are compiled whole and proved."""

import math
from collections.abc import Mapping
from typing import Protocol

import msgspec

from megakernel.cost import bandwidth_bound_us, extrapolated_us, simulate
from megakernel.graph import STATS_SPANS, usual_formats
from megakernel.machine import Machine
from megakernel.memory import ScratchError
from megakernel.model.shape import ModelShape
from megakernel.plan import Plan
from megakernel.program import Program
from megakernel.validate import validate

_SIMULATED_LAYERS = 3
"""The last two give the period of a layer."""
_LARGE_VOCABULARY = 65_536
_VOCABULARY_SHARE = 4
"""One in so many columns of a large head are simulated while searching."""


class CompileProgram(Protocol):
    """`pipeline.compile_program`, passed in so that the pipeline may use the search."""

    def __call__(
        self,
        shape: ModelShape,
        fingerprint: str,
        machine: Machine,
        bucket: int,
        plan: Plan,
        *,
        formats: Mapping[str, str] | None,
    ) -> Program: ...


def truncated(shape: ModelShape) -> ModelShape:
    """The model of few layers and tokens that stands for `shape` while searching."""
    vocab_size, span = shape.vocab_size, STATS_SPANS["cpu"]  # a multiple of every kind's
    if vocab_size > _LARGE_VOCABULARY:
        vocab_size = -(-vocab_size // (_VOCABULARY_SHARE * span)) * span
    num_layers = min(shape.num_layers, _SIMULATED_LAYERS)
    return msgspec.structs.replace(shape, num_layers=num_layers, vocab_size=vocab_size)


def with_head_for(plan: Plan, vocab_size: int) -> Plan:
    """The plan for a smaller vocabulary: its head's first tiles, on the workers that have them."""
    head = plan.ops["head"]
    if head.tile_workers is None:
        return plan
    num_instructions = -(-vocab_size // head.tile_columns) * head.num_k_tiles
    shorter = msgspec.structs.replace(head, tile_workers=head.tile_workers[:num_instructions])
    return msgspec.structs.replace(plan, ops=plan.ops | {"head": shorter})


class Judge:
    """Prices plans by compiling and simulating them."""

    def __init__(
        self,
        shape: ModelShape,
        fingerprint: str,
        machine: Machine,
        bucket: int,
        compile_program: CompileProgram,
        formats: Mapping[str, str] | None,
        context_tokens: int,
    ) -> None:
        self.shape = shape
        self.machine = machine
        self._fingerprint = fingerprint
        self._bucket = bucket
        self._compile_program = compile_program
        self._formats = formats
        self._context_tokens = context_tokens
        self._truncated = truncated(shape)

    def split_tokens(self, plan: Plan) -> int:
        """What `compile_program` splits attention by: assignments of its parts depend on it."""
        unassigned = {role: msgspec.structs.replace(op, tile_workers=None) for role, op in plan.ops.items()}
        shape = msgspec.structs.replace(self._truncated, num_layers=1)
        return self._program(shape, msgspec.structs.replace(plan, ops=unassigned)).split_tokens

    def quick_us(self, plan: Plan) -> float:
        """Extrapolated from a few layers; infinite where the plan does not fit."""
        try:
            program = self._program(self._truncated, with_head_for(plan, self._truncated.vocab_size))
        except ScratchError:
            return math.inf
        trace = simulate(program, self.machine, self._formats, self._context_tokens)
        return extrapolated_us(program, trace, self.shape.num_layers, self.shape.vocab_size)

    def full_us(self, plan: Plan) -> tuple[float, float]:
        """Makespan and bandwidth bound of the whole model. Raises ScheduleError where `prove` does."""
        program = self.prove(plan)
        trace = simulate(program, self.machine, self._formats, self._context_tokens)
        return trace.makespan_us, bandwidth_bound_us(
            program, self.machine, self._formats, self._context_tokens
        )

    def prove(self, plan: Plan) -> Program:
        """The whole model's program. Raises ScheduleError for one that is not safe: a compiler's error."""
        program = self._program(self.shape, plan)
        formats = usual_formats(self.shape) if self._formats is None else self._formats
        validate(program, self.machine, formats)
        return program

    def _program(self, shape: ModelShape, plan: Plan) -> Program:
        return self._compile_program(
            shape, self._fingerprint, self.machine, self._bucket, plan, formats=self._formats
        )
