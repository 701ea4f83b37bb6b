"""Steps of compiled plans timed on the CPU in hand: what the schedule search's best few are compared by."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from megakernel.compiled import compile_here
from megakernel.cost import simulate
from megakernel.cpu_limits import MAX_ROWS
from megakernel.machine import Machine
from megakernel.model.shape import ModelShape
from megakernel.model.weights import Weights
from megakernel.pipeline import compile_program
from megakernel.plan import Plan
from megakernel.program import Program
from megakernel.runtime import Runtime
from megakernel.search import refine
from megakernel.step_rows import BLOCK_TOKENS, decode_rows, fill_context, num_blocks
from megakernel.step_times import timed_s
from megakernel.user_cache import cache_folder, read_if_there, write_atomically
from megakernel.validate import validate
from megakernel.work import DEFAULT_CONTEXT_TOKENS

WARM_UP_STEPS = 3
_MEASURED_STEPS = 40
_VERSION = 2
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
    formats: Mapping[str, str] | None = None,
    context_tokens: int = DEFAULT_CONTEXT_TOKENS,
    folder: Path | None = None,
    on_plan: OnPlan | None = None,
) -> Refinement:
    """Builds and proves each plan, runs its steps, and takes the fastest; `plans` by name. `formats` None: as
    the weights are stored.

    `folder` holds what was measured before (None: the user's cache folder); its `measured` may be deleted.
    Raises BuildError, CodegenError, StepError, and ScheduleError for a plan that is not safe.
    """
    stored = weights.formats if formats is None else formats
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
            formats=stored,
        )
        path = _path(folder, (_VERSION, program, machine, context_tokens, _sorted(stored)))
        known = _known(path)
        if known is None:
            validate(program, machine, stored)
            predicted = simulate(program, machine, stored, context_tokens).makespan_us
            known = _Measured(predicted, measured_us(program, weights, context_tokens, stored))
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


def measured_us(
    program: Program, weights: Weights, context_tokens: int, formats: Mapping[str, str] | None = None
) -> float:
    """The quickest of some steps: what else runs on the machine only ever adds."""
    rows = decode_rows(program.bucket, context_tokens)
    compiled = compile_here([program], weights, formats=formats)
    with Runtime(compiled, num_blocks(program.bucket, context_tokens), BLOCK_TOKENS) as runtime:
        fill_context(runtime, context_tokens)
        for _ in range(WARM_UP_STEPS):
            runtime.run(rows)
        return min(timed_s(runtime, rows, _MEASURED_STEPS)) * 1e6


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
