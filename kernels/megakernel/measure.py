"""Steps of compiled plans timed on the CPU in hand: what the schedule search's best few are compared by."""

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np

from megakernel.codegen_cpu import MAX_ROWS
from megakernel.cost import simulate
from megakernel.machine import Machine
from megakernel.model.shape import ModelShape
from megakernel.model.weights import Weights
from megakernel.pipeline import compile_program
from megakernel.plan import Plan
from megakernel.program import Program
from megakernel.runtime import Rows, Runtime
from megakernel.search import refine
from megakernel.user_cache import cache_folder, read_if_there, write_atomically
from megakernel.validate import validate
from megakernel.vm_state import NO_PARENT
from megakernel.work import DEFAULT_CONTEXT_TOKENS

BLOCK_TOKENS = 32
WARM_UP_STEPS = 3
_MEASURED_STEPS = 40
_VERSION = 1
"""Of the way in which steps are timed."""

OnPlan = Callable[[int, int], None]
"""How many plans are measured, of how many."""


class MeasuredPlan(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    predicted_us: float
    measured_us: float
    is_chosen: bool


class Refinement(msgspec.Struct, frozen=True, kw_only=True):
    plan: Plan
    """The one that measured fastest."""
    plans: tuple[MeasuredPlan, ...]
    """As they were given."""


class _Measured(msgspec.Struct, frozen=True):
    """What the cache holds of a plan."""

    predicted_us: float
    measured_us: float


def can_measure(bucket: int, context_tokens: int, shape: ModelShape) -> bool:
    return bucket <= MAX_ROWS and context_tokens < shape.max_context_tokens


def refine_on_this_cpu(
    plans: Mapping[str, Plan],
    weights: Weights,
    fingerprint: str,
    machine: Machine,
    bucket: int,
    *,
    split_tokens: int,
    context_tokens: int = DEFAULT_CONTEXT_TOKENS,
    folder: Path | None = None,
    on_plan: OnPlan | None = None,
) -> Refinement:
    """Builds and proves each plan, runs its steps, and takes the fastest; `plans` by name.

    `folder` holds what was measured before (None: the user's cache folder); its `measured` may be deleted.
    Raises BuildError, CodegenError, StepError, and ScheduleError for a plan that is not safe.
    """
    results: list[_Measured] = []

    def measure(plan: Plan) -> float:
        if on_plan is not None:
            on_plan(len(results), len(plans))
        program = compile_program(
            weights.shape,
            fingerprint,
            machine,
            bucket,
            plan,
            split_tokens=split_tokens,
            formats=weights.formats,
        )
        path = _path(folder, (_VERSION, program, machine, context_tokens, _sorted(weights.formats)))
        known = _known(path)
        if known is None:
            validate(program, machine, weights.formats)
            predicted = simulate(program, machine, weights.formats, context_tokens).makespan_us
            known = _Measured(predicted, measured_us(program, weights, context_tokens))
            write_atomically(path, msgspec.json.encode(known))
        results.append(known)
        return known.measured_us

    refined = refine(list(plans.values()), measure)
    if on_plan is not None:
        on_plan(len(plans), len(plans))
    chosen = list(plans.values()).index(refined.plan)
    return Refinement(
        plan=refined.plan,
        plans=tuple(
            MeasuredPlan(
                name=name,
                predicted_us=result.predicted_us,
                measured_us=result.measured_us,
                is_chosen=at == chosen,
            )
            for at, (name, result) in enumerate(zip(plans, results, strict=True))
        ),
    )


def measured_us(program: Program, weights: Weights, context_tokens: int) -> float:
    """The quickest of some steps: what else runs on the machine only ever adds."""
    rows = decode_rows(program.bucket, context_tokens)
    with Runtime([program], weights, num_blocks(program.bucket, context_tokens), BLOCK_TOKENS) as runtime:
        for _ in range(WARM_UP_STEPS):
            runtime.run(rows)
        times_us = []
        for _ in range(_MEASURED_STEPS):
            started = time.perf_counter()
            runtime.run(rows)
            times_us.append((time.perf_counter() - started) * 1e6)
    return min(times_us)


def num_blocks(num_rows: int, context_tokens: int) -> int:
    """Of the KV pool, for `decode_rows`."""
    return _context_blocks(context_tokens) + -(-num_rows // BLOCK_TOKENS)


def decode_rows(num_rows: int, context_tokens: int) -> Rows:
    """Sequences of one new row each. They share a context of zeros: what it holds changes no time."""
    num_context_blocks = max(1, _context_blocks(context_tokens))
    first_slot = _context_blocks(context_tokens) * BLOCK_TOKENS
    return Rows(
        token_ids=np.arange(num_rows, dtype=np.int32),
        positions=np.full(num_rows, context_tokens, dtype=np.int32),
        slots=np.arange(first_slot, first_slot + num_rows, dtype=np.int32),
        parents=np.full(num_rows, NO_PARENT, dtype=np.int32),
        sequence_starts=np.arange(num_rows + 1, dtype=np.int32),
        context_lengths=np.full(num_rows, context_tokens, dtype=np.int32),
        block_tables=np.tile(np.arange(num_context_blocks, dtype=np.int32), (num_rows, 1)),
        needs_logits=np.ones(num_rows, dtype=np.bool_),
    )


def _context_blocks(context_tokens: int) -> int:
    return -(-context_tokens // BLOCK_TOKENS)


def _path(folder: Path | None, question: object) -> Path:
    key = hashlib.sha256(msgspec.msgpack.encode(question)).hexdigest()[:24]
    return (folder or cache_folder()) / "measured" / f"{key}.json"


def _known(path: Path) -> _Measured | None:
    content = read_if_there(path)
    if content is None:
        return None
    try:
        return msgspec.json.decode(content, type=_Measured)
    except msgspec.DecodeError:
        return None


def _sorted(formats: Mapping[str, str]) -> list[tuple[str, str]]:
    return sorted(formats.items())
