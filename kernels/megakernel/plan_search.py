"""The plan of a search: the best few under the cost model, each compiled and run on this CPU."""

from collections.abc import Mapping

from megakernel.artifact import Progress
from megakernel.graph import DEFAULT_SPLIT_TOKENS
from megakernel.measure import refine_on_this_cpu
from megakernel.memory import ScratchError
from megakernel.model.weights import Weights
from megakernel.passes.context import PlanError
from megakernel.pipeline import compile_program
from megakernel.plan import Plan
from megakernel.recipe import Recipe
from megakernel.search import Budget, search
from megakernel.search import Progress as SearchProgress
from megakernel.search_command import plans_to_measure
from megakernel.work import DEFAULT_CONTEXT_TOKENS

MEASURED_BUCKET = 1
"""Plain decode of one sequence, which a deadline is counted in."""
_SEARCH_SHARE = 0.5
"""Of the time, for the progress bar."""


def searched_plan(
    recipe: Recipe,
    weights: Weights,
    progress: Progress | None = None,
    *,
    split_tokens: int = DEFAULT_SPLIT_TOKENS,
    budget: Budget | None = None,
    seed: int = 0,
) -> Plan:
    """Never slower, as measured, than the plan without a search; one that every bucket can have.

    Raises BuildError, CodegenError, StepError, ScheduleError, ScratchError.
    """

    def on_search(at: SearchProgress) -> None:
        if progress is not None:
            progress("searching for a schedule", _SEARCH_SHARE * at.evaluations / at.of)

    def on_plan(done: int, of: int) -> None:
        if progress is not None:
            progress(f"measuring plans, {done} of {of}", _SEARCH_SHARE + (1 - _SEARCH_SHARE) * done / of)

    usual = recipe.plan()
    found = search(
        recipe.shape,
        recipe.fingerprint,
        recipe.machine,
        MEASURED_BUCKET,
        compile_program,
        formats=recipe.formats,
        starts=(usual,),
        budget=budget,
        seed=seed,
        on_progress=on_search,
    )
    return refine_on_this_cpu(
        _fitting(recipe, plans_to_measure(found, usual)),
        weights,
        recipe.fingerprint,
        recipe.machine,
        MEASURED_BUCKET,
        split_tokens=split_tokens,
        formats=recipe.formats,
        context_tokens=min(DEFAULT_CONTEXT_TOKENS, recipe.shape.max_context_tokens - 1),
        on_plan=on_plan,
    ).plan


def _fitting(recipe: Recipe, plans: Mapping[str, Plan]) -> dict[str, Plan]:
    """Those that the largest bucket can have too: an artifact has one plan."""

    def fits(plan: Plan) -> bool:
        try:
            compile_program(
                recipe.shape,
                recipe.fingerprint,
                recipe.machine,
                recipe.buckets[-1],
                plan,
                formats=recipe.formats,
            )
        except (PlanError, ScratchError):
            return False
        return True

    return {name: plan for name, plan in plans.items() if fits(plan)}
