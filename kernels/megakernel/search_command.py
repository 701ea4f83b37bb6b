"""`compile --search`: the search, then measuring on the CPU in hand, with bars and a table for a person."""

import os
import sys
from collections.abc import Mapping
from functools import partial

import msgspec

from megakernel.build import BuildError
from megakernel.cpu_limits import CodegenError
from megakernel.default_plan import default_plan
from megakernel.machine import Machine
from megakernel.measure import Refinement, can_measure, refine_on_this_cpu
from megakernel.model.shape import ModelShape
from megakernel.model.weights import Weights
from megakernel.pipeline import compile_program
from megakernel.plan import Plan
from megakernel.runtime import StepError
from megakernel.search import Progress, SearchResult, search
from megakernel.work import DEFAULT_CONTEXT_TOKENS

_BAR_WIDTH = 30
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
    split_tokens: int
    seed: int


def searched_plan(question: SearchQuestion) -> tuple[Plan, float]:
    """The plan to take, and list scheduling's predicted time. Says on standard error how it came to it."""
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
        on_progress=_show_search,
    )
    _say(
        f"{found.evaluations} plans searched: {found.predicted_us:.0f} us predicted, {found.baseline_us:.0f} "
        f"by list scheduling, at least {found.bandwidth_bound_us:.0f} by bandwidth"
    )
    refined = _refined(question, plans_to_measure(found, usual), load)
    if refined is None:
        return found.plan, found.baseline_us
    _say(table(refined))
    return refined.plan, found.baseline_us


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


def table(refined: Refinement) -> str:
    lines = [f"{'plan':18}{'predicted us':>14}{'measured us':>14}"]
    for plan in refined.plans:
        chosen = "  <- taken" if plan.is_chosen else ""
        lines.append(f"{plan.name:18}{plan.predicted_us:14.0f}{plan.measured_us:14.0f}{chosen}")
    return "\n".join(lines)


def load_average() -> float:
    """Threads that wanted to run during the last minute."""
    return os.getloadavg()[0]


def _refined(question: SearchQuestion, plans: Mapping[str, Plan], load: float) -> Refinement | None:
    """None where nothing can be measured, which is then said."""
    if question.weights is None:
        return None
    if not can_measure(question.bucket, DEFAULT_CONTEXT_TOKENS, question.shape):
        _say(f"not measured: {question.bucket} rows after {DEFAULT_CONTEXT_TOKENS} tokens cannot run here")
        return None
    if load > _QUIET_LOAD * question.machine.num_workers:
        _say(
            f"not measured: other work keeps this machine busy (load average {load:.1f} on "
            f"{question.machine.num_workers} cores). Run this again when it is quiet: the search is kept"
        )
        return None
    try:
        return refine_on_this_cpu(
            plans,
            question.weights,
            question.fingerprint,
            question.machine,
            question.bucket,
            split_tokens=question.split_tokens,
            on_plan=lambda done, of: _show(done, of, "plans measured"),
        )
    except (BuildError, CodegenError, StepError) as error:
        _say(f"not measured: {error}")
        return None


def _say(text: str) -> None:
    """Beside the results: those may be piped into a file."""
    print(text, file=sys.stderr)


def _show_search(progress: Progress) -> None:
    text = f"plans, {progress.baseline_us:.0f} us before, {progress.best_us:.0f} us now"
    _show(progress.evaluations, progress.of, text)


def _show(done: int, of: int, text: str) -> None:
    """A bar, where a person watches."""
    if sys.stderr.isatty():
        end = "\n" if done == of else ""
        print(f"\r{bar(done, of)} {done} of {of} {text}  ", end=end, file=sys.stderr, flush=True)


def bar(done: int, of: int) -> str:
    filled = _BAR_WIDTH * done // max(1, of)
    return "#" * filled + "." * (_BAR_WIDTH - filled)
