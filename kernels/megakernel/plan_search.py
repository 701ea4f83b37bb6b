"""The plan of a search: the best few under the cost model, each compiled and run on the CPU in hand."""

import os
from collections.abc import Callable, Mapping
from functools import partial

import msgspec

from megakernel.build import BuildError
from megakernel.codegen_limits import CodegenError
from megakernel.default_plan import default_plan
from megakernel.machine import Machine
from megakernel.measure import OnPlan, Refinement, can_measure, refine_on_this_cpu
from megakernel.memory import ScratchError
from megakernel.model.shape import ModelShape
from megakernel.model.weights import Weights
from megakernel.passes.context import PlanError
from megakernel.pipeline import compile_program
from megakernel.plan import Plan
from megakernel.search import Progress, SearchResult, search
from megakernel.step import StepError
from megakernel.work import DEFAULT_CONTEXT_TOKENS

_QUIET_LOAD = 0.5
"""Running threads a core, above which steps are not timed: two workers that wait for each other lose a
scheduler's whole turn wherever one of them has lost its core."""


class SearchQuestion(msgspec.Struct, frozen=True, kw_only=True):
    shape: ModelShape
    formats: Mapping[str, str]
    fingerprint: str
    weights: Weights | None
    """None: nothing is measured."""
    machine: Machine
    bucket: int
    """Whose time counts."""
    split_tokens: int
    seed: int = 0
    largest_bucket: int = 1
    """Of all that will have the plan."""


class Searched(msgspec.Struct, frozen=True, kw_only=True):
    found: SearchResult
    refinement: Refinement | None
    why_not_measured: str
    """Where `refinement` is None; empty where nobody gave weights to measure with."""

    @property
    def plan(self) -> Plan:
        """The fastest that was measured, or else predicted."""
        return self.found.plan if self.refinement is None else self.refinement.plan


def searched_plan(
    question: SearchQuestion,
    on_search: Callable[[Progress], None] | None = None,
    on_plan: OnPlan | None = None,
) -> Searched:
    """Raises ScratchError where no tile fits, and ScheduleError for a plan that is not safe."""
    load = load_average()  # before the search adds to it
    usual = default_plan(question.shape, question.machine, question.bucket, question.formats)
    found = search(
        question.shape,
        question.fingerprint,
        question.machine,
        question.bucket,
        partial(compile_program, split_tokens=question.split_tokens),
        formats=question.formats,
        starts=[usual],
        seed=question.seed,
        on_progress=on_search,
    )
    plans = {
        name: plan
        for name, plan in plans_to_measure(found, usual).items()
        if plan == usual or _fits(question, plan)
    }
    if found.plan not in plans.values():
        found = msgspec.structs.replace(found, plan=next(iter(plans.values())))
    refinement, reason = _refined(question, plans, load, on_plan)
    return Searched(found=found, refinement=refinement, why_not_measured=reason)


def plans_to_measure(found: SearchResult, usual: Plan) -> dict[str, Plan]:
    """By name, equal plans once: the search's best first, so that it wins among equals."""
    named = {"search": found.plan}
    named |= {f"finalist {number}": plan for number, plan in enumerate(found.finalists, start=1)}
    named |= {"without search": usual, "list scheduling": found.baseline}
    distinct: dict[str, Plan] = {}
    for name, plan in named.items():
        if plan not in distinct.values():
            distinct[name] = plan
    return distinct


def load_average() -> float:
    """Threads that wanted to run during the last minute."""
    return os.getloadavg()[0]


def _fits(question: SearchQuestion, plan: Plan) -> bool:
    """Whether the largest bucket can have it too: an artifact has one plan."""
    if question.largest_bucket <= question.bucket:
        return True
    try:
        compile_program(
            question.shape,
            question.fingerprint,
            question.machine,
            question.largest_bucket,
            plan,
            split_tokens=question.split_tokens,
            formats=question.formats,
        )
    except (PlanError, ScratchError):
        return False
    return True


def _refined(
    question: SearchQuestion, plans: Mapping[str, Plan], load: float, on_plan: OnPlan | None
) -> tuple[Refinement | None, str]:
    """Or why nothing was measured."""
    if question.weights is None:
        return None, ""
    context = min(DEFAULT_CONTEXT_TOKENS, question.shape.max_context_tokens - 1)
    if not can_measure(question.bucket, context, question.shape):
        return None, f"{question.bucket} rows after {context} tokens cannot run here"
    if load > _QUIET_LOAD * question.machine.num_workers:
        return None, (
            f"other work keeps this machine busy (load average {load:.1f} on {question.machine.num_workers} "
            "cores). Run this again when it is quiet: the search is kept"
        )
    try:
        refinement = refine_on_this_cpu(
            plans,
            question.weights,
            question.fingerprint,
            question.machine,
            question.bucket,
            split_tokens=question.split_tokens,
            formats=question.formats,
            context_tokens=context,
            on_plan=on_plan,
        )
    except (BuildError, CodegenError, StepError) as error:
        return None, str(error)
    return refinement, ""
