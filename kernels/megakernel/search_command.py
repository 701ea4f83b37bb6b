"""`compile --search` at a terminal: bars while it searches and measures, and what it came to."""

import sys
from collections.abc import Iterator

from megakernel.measure import Refinement
from megakernel.plan_search import Searched, SearchQuestion, searched_plan
from megakernel.search import Progress

_BAR_WIDTH = 30


def search_with_bars(question: SearchQuestion) -> Searched:
    """Says on standard error how it went: results may be piped into a file."""
    searched = searched_plan(question, _show_search, lambda done, of: _show(done, of, "plans measured"))
    for line in lines_of(searched):
        print(line, file=sys.stderr)
    return searched


def lines_of(searched: Searched) -> Iterator[str]:
    found = searched.found
    yield (
        f"{found.evaluations} plans searched: {found.predicted_us:.0f} us predicted, {found.baseline_us:.0f} "
        f"by list scheduling, at least {found.bandwidth_bound_us:.0f} by bandwidth"
    )
    if searched.refinement is not None:
        yield from table(searched.refinement)
    elif searched.why_not_measured:
        yield f"not measured: {searched.why_not_measured}"


def table(refined: Refinement) -> Iterator[str]:
    yield f"{'plan':18}{'predicted us':>14}{'measured us':>14}"
    for plan in refined.plans:
        chosen = "  <- taken" if plan.is_chosen else ""
        yield f"{plan.name:18}{plan.predicted_us:14.0f}{plan.measured_us:14.0f}{chosen}"


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
