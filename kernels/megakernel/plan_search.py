"""The plan of a search, chosen by measurement: the best few under the cost model, each compiled and run."""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megakernel.artifact import Progress
from megakernel.compiled import compile_here
from megakernel.step_times import BLOCK_TOKENS, fill_kv, measured_ms, scratch_rows
from megakernel.memory import ScratchError
from megakernel.model.weights import Weights
from megakernel.passes.context import PlanError
from megakernel.pipeline import compile_program
from megakernel.plan import Plan
from megakernel.program import Program
from megakernel.recipe import Recipe
from megakernel.runtime import Runtime
from megakernel.search import Budget, refine, search
from megakernel.search import Progress as SearchProgress

_MEASURED_BUCKET = 1
"""Plain decode of one sequence, which a deadline is counted in."""
_MEASURED_CONTEXT_TOKENS = 512
_MOST_PLANS = 4
_REPEATS = 25
_SEARCH_SHARE = 0.6
"""Of the time, for the progress bar."""


def searched_plan(
    recipe: Recipe,
    weights: Weights,
    progress: Progress | None = None,
    *,
    budget: Budget | None = None,
    seed: int = 0,
) -> Plan:
    """Never slower, as measured, than the plan without a search. Raises BuildError, StepError, ScratchError.

    A plan is taken only where every bucket can be compiled with it. The search's own result is cached and the
    same for a seed; what is measured fastest may differ between two calls.
    """

    def on_search(at: SearchProgress) -> None:
        if progress is not None:
            progress("searching for a schedule", _SEARCH_SHARE * at.evaluations / at.of)

    start = recipe.plan()
    found = search(
        recipe.shape,
        recipe.fingerprint,
        recipe.machine,
        _MEASURED_BUCKET,
        compile_program,
        formats=recipe.formats,
        starts=(start,),
        budget=budget,
        seed=seed,
        on_progress=on_search,
    )
    plans = _distinct((start, found.plan, *found.finalists))[:_MOST_PLANS]
    with tempfile.TemporaryDirectory(prefix="megakernel-plans-") as folder:
        measuring = _Measuring(recipe, weights, Path(folder), len(plans), progress)
        return refine(plans, measuring).plan


class _Measuring:
    """A plan to microseconds a step."""

    def __init__(
        self, recipe: Recipe, weights: Weights, folder: Path, num_plans: int, progress: Progress | None
    ) -> None:
        self._recipe = recipe
        self._weights = weights
        self._folder = folder
        self._num_plans = num_plans
        self._num_done = 0
        self._progress = progress

    def __call__(self, plan: Plan) -> float:
        """Infinite for a plan that some bucket cannot have."""
        recipe = self._recipe

        def compiled(bucket: int) -> Program:
            return compile_program(
                recipe.shape, recipe.fingerprint, recipe.machine, bucket, plan, formats=recipe.formats
            )

        def show(what: str, fraction: float) -> None:
            if self._progress is not None:
                done = (self._num_done + fraction) / self._num_plans
                what = f"measuring plan {self._num_done + 1} of {self._num_plans}"
                self._progress(what, _SEARCH_SHARE + (1 - _SEARCH_SHARE) * done)

        try:
            compiled(recipe.buckets[-1])
            program = compiled(_MEASURED_BUCKET)
        except (PlanError, ScratchError):
            return math.inf
        model = compile_here(
            [program],
            self._weights,
            kv_format=recipe.kv_format,
            library_folder=self._folder,
            extra_flags=recipe.extra_flags,
            progress=show,
        )
        context = min(_MEASURED_CONTEXT_TOKENS, recipe.shape.max_context_tokens - 1)
        rows = scratch_rows(1, context, first_block=0, block_size_tokens=BLOCK_TOKENS)
        with Runtime(model, -(-context // BLOCK_TOKENS) + 1, BLOCK_TOKENS) as runtime:
            fill_kv(runtime, context)
            taken_us = 1e3 * measured_ms(runtime, rows, _REPEATS)
        self._num_done += 1
        return taken_us


def _distinct(plans: Sequence[Plan]) -> list[Plan]:
    return [plan for index, plan in enumerate(plans) if plan not in plans[:index]]
