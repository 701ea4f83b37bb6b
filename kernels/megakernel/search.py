"""Schedule search: a better plan than list scheduling, under the cost model, then by measurement.

Each role's tilings are ranked by a closed estimate, then annealing moves between neighbours in that ranking,
turns assignments against each other so that gaps are filled, and changes how far ahead weights are loaded.
A plan is judged by simulating the program it compiles to, on a model of few layers, extrapolated; in the end
the winner and the baseline are compiled and simulated in full, and the winner is never the worse of the two.
Every plan of a result is proved: the validator has accepted the whole model's program.

The result depends on the seed and the number of evaluations alone, unless the time budget ends first
(`SearchResult.is_complete` says).
"""

import hashlib
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from megakernel.judge import CompileProgram, Judge
from megakernel.machine import Machine
from megakernel.memory import ScratchError
from megakernel.model.shape import ModelShape
from megakernel.plan import Plan
from megakernel.schedule import list_schedule, most_prefetched
from megakernel.tilings import CONTIGUOUS, Tilings
from megakernel.user_cache import cache_folder, read_if_there, write_atomically
from megakernel.work import DEFAULT_CONTEXT_TOKENS

_VERSION = 2
"""Of the search and the cost model: raised when their results change."""
_NUM_FINALISTS = 4
_NUM_COMPARED = 2
"""Plans that are simulated in full beside the baseline."""
_RESERVED_SHARE = 1.5
"""Of what the baseline's proof and full simulation took, kept for each of the finalists."""
_START_PREFETCH = 2
_TRIES_AN_EVALUATION = 20
_NEIGHBOURHOOD = 8
"""How far down a role's ranking a move may reach."""
_START_TEMPERATURE = 0.03
_END_TEMPERATURE = 0.001
"""As shares of the current time: how much worse a plan may be and still be moved to, one time in e."""


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    evaluations: int = 96
    seconds: float = 60.0
    """Checked between evaluations, with room kept for the final comparison."""


class Progress(msgspec.Struct, frozen=True):
    evaluations: int
    of: int
    baseline_us: float
    best_us: float


class SearchResult(msgspec.Struct, frozen=True, kw_only=True):
    """Times are of the full model's step under the cost model."""

    plan: Plan
    baseline: Plan
    finalists: tuple[Plan, ...]
    """The best few, best first by the truncated model: what `refine` measures."""
    predicted_us: float
    baseline_us: float
    bandwidth_bound_us: float
    evaluations: int
    is_complete: bool
    """Whether all evaluations were made within the time budget."""

    @property
    def gain(self) -> float:
        """Over plain list scheduling: 0.25 is a quarter less time."""
        return 1.0 - self.predicted_us / self.baseline_us


class Refined(msgspec.Struct, frozen=True):
    plan: Plan
    measured_us: tuple[float, ...]
    """By plan, as they were given; infinite where a plan could not be measured."""


class Point(msgspec.Struct, frozen=True):
    """A place in the search space."""

    ranks: tuple[int, ...]
    """By role of `Tilings.roles`: which of its ranked tilings."""
    turns: tuple[int, ...]
    """By role: by how many workers its assignment is turned, or CONTIGUOUS."""
    prefetch_instructions: int


def search(
    shape: ModelShape,
    fingerprint: str,
    machine: Machine,
    bucket: int,
    compile_program: CompileProgram,
    *,
    formats: Mapping[str, str] | None = None,
    context_tokens: int = DEFAULT_CONTEXT_TOKENS,
    starts: Sequence[Plan] = (),
    budget: Budget | None = None,
    seed: int = 0,
    folder: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> SearchResult:
    """The best plan found for one bucket.

    K-tiles are what `k_tiles.py` says, in every bucket: rows would differ in bits otherwise. `starts` are
    judged with the plans found, so that none of them is better than the result on a few layers. `folder`
    holds results of equal searches (None: the user's cache folder). Raises ScratchError where no tile fits,
    PlanError for a start with other K-tiles.
    """
    budget = budget or Budget()
    judge = Judge(shape, fingerprint, machine, bucket, compile_program, formats, context_tokens)
    baseline = list_schedule(shape, machine, bucket, formats)
    split_tokens = judge.split_tokens(baseline)
    question = (
        _VERSION,
        shape,
        machine,
        bucket,
        _sorted(formats),
        context_tokens,
        starts,
        split_tokens,
    )
    path = _path(folder, (*question, budget, seed))
    cached = _cached(path)
    if cached is not None:
        return cached
    baseline = list_schedule(shape, machine, bucket, formats, split_tokens=split_tokens)
    tilings = Tilings(shape, machine, bucket, formats, (baseline, *starts), split_tokens)
    result = _Search(judge, tilings, baseline, starts, budget, seed, on_progress, clock).run()
    write_atomically(path, msgspec.json.encode(result))
    return result


def refine(plans: Sequence[Plan], measure: Callable[[Plan], float]) -> Refined:
    """The plan that measures fastest, the earliest of equals; `measure` answers in microseconds.

    A plan that cannot be built for want of scratch memory counts as infinitely slow. Raises ScratchError
    where that is true of all of them.
    """
    measured: list[float] = []
    reason = "no plan was given"
    for plan in plans:
        try:
            measured.append(measure(plan))
        except ScratchError as error:
            measured.append(math.inf)
            reason = str(error)
    if not any(map(math.isfinite, measured)):
        raise ScratchError(f"no plan could be measured: {reason}")
    return Refined(plans[measured.index(min(measured))], tuple(measured))


class _Search:
    def __init__(
        self,
        judge: Judge,
        tilings: Tilings,
        baseline: Plan,
        starts: Sequence[Plan],
        budget: Budget,
        seed: int,
        on_progress: Callable[[Progress], None] | None,
        clock: Callable[[], float],
    ) -> None:
        self._judge = judge
        self._tilings = tilings
        self._baseline = baseline
        self._starts = starts
        self._budget = budget
        self._random = random.Random(seed)  # noqa: S311 - a search, not a secret
        self._on_progress = on_progress
        self._clock = clock
        self._begin_s = clock()
        self._known: dict[Point, float] = {}
        self._reserved_s = 0.0

    def run(self) -> SearchResult:
        baseline_us, bound_us = self._judge.full_us(self._baseline)
        self._reserved_s = _RESERVED_SHARE * _NUM_FINALISTS * (self._clock() - self._begin_s)
        quick_baseline_us = self._judge.quick_us(self._baseline)
        judged = [(self._judge.quick_us(plan), plan) for plan in self._starts]
        self._anneal(self._starting_points(), quick_baseline_us)
        judged += [(known_us, self._plan(point)) for point, known_us in self._known.items()]
        better = [pair for pair in judged if pair[0] < quick_baseline_us]
        best = [plan for _, plan in sorted(better, key=lambda pair: pair[0])]
        plan, predicted_us = self._baseline, baseline_us
        for finalist in best[_NUM_COMPARED:_NUM_FINALISTS]:
            self._judge.prove(finalist)
        for finalist in best[:_NUM_COMPARED]:
            full_us, full_bound_us = self._judge.full_us(finalist)
            if full_us < predicted_us:
                plan, predicted_us, bound_us = finalist, full_us, full_bound_us
        return SearchResult(
            plan=plan,
            baseline=self._baseline,
            finalists=tuple(best[:_NUM_FINALISTS]) or (self._baseline,),
            predicted_us=predicted_us,
            baseline_us=baseline_us,
            bandwidth_bound_us=bound_us,
            evaluations=len(self._known),
            is_complete=len(self._known) >= self._budget.evaluations,
        )

    def _starting_points(self) -> list[Point]:
        """Known tilings and the top of each ranking, under list scheduling's and contiguous assignment."""
        num_roles = len(self._tilings.roles)
        tilings = [(0,) * num_roles]
        tilings += [self._tilings.ranks_of(plan) for plan in (self._baseline, *self._starts)]
        return [
            Point(ranks, (turn,) * num_roles, _START_PREFETCH)
            for ranks in dict.fromkeys(tilings)
            for turn in (0, CONTIGUOUS)
        ]

    def _anneal(self, starts: list[Point], baseline_us: float) -> None:
        """From the best of the starting points; what is known is not evaluated again."""
        for point in starts:
            if len(self._known) < self._budget.evaluations and self._has_time():
                self._evaluate(point, baseline_us)
        if not self._known:
            return
        current = min(self._known, key=lambda point: self._known[point])
        for _ in range(_TRIES_AN_EVALUATION * self._budget.evaluations):
            candidate = self._neighbour(current)
            if candidate not in self._known:
                if len(self._known) >= self._budget.evaluations or not self._has_time():
                    return
                self._evaluate(candidate, baseline_us)
            if self._is_accepted(self._known[candidate], self._known[current]):
                current = candidate

    def _evaluate(self, point: Point, baseline_us: float) -> None:
        self._known[point] = self._judge.quick_us(self._plan(point))
        if self._on_progress is not None:
            best_us = min(baseline_us, *self._known.values())
            progress = Progress(len(self._known), self._budget.evaluations, baseline_us, best_us)
            self._on_progress(progress)

    def _has_time(self) -> bool:
        return self._clock() - self._begin_s < self._budget.seconds - self._reserved_s

    def _is_accepted(self, candidate_us: float, current_us: float) -> bool:
        """Metropolis, cooling by evaluations made."""
        if candidate_us <= current_us:
            return True
        if math.isinf(candidate_us):
            return False
        cooled = len(self._known) / self._budget.evaluations
        share = _START_TEMPERATURE * (_END_TEMPERATURE / _START_TEMPERATURE) ** cooled
        return self._random.random() < math.exp((current_us - candidate_us) / (share * current_us))

    def _neighbour(self, point: Point) -> Point:
        kind = self._random.random()
        role = self._random.randrange(len(self._tilings.roles))
        if kind < 0.15:
            step = self._random.choice((-1, 1))
            ahead = min(max(point.prefetch_instructions + step, 0), most_prefetched(self._judge.machine))
            return msgspec.structs.replace(point, prefetch_instructions=ahead)
        if kind < 0.3:
            turn = self._random.choice((CONTIGUOUS, self._random.randrange(self._judge.machine.num_workers)))
            return msgspec.structs.replace(point, turns=_with(point.turns, role, turn))
        reach = min(_NEIGHBOURHOOD, len(self._tilings.ranked[role]))
        rank = self._random.randrange(reach)
        return msgspec.structs.replace(point, ranks=_with(point.ranks, role, rank))

    def _plan(self, point: Point) -> Plan:
        return self._tilings.plan(point.ranks, point.turns, point.prefetch_instructions)


def _with(values: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    return (*values[:index], value, *values[index + 1 :])


def _sorted(mapping: Mapping[str, str] | None) -> list[tuple[str, str]]:
    return sorted((mapping or {}).items())


def _path(folder: Path | None, question: object) -> Path:
    key = hashlib.sha256(msgspec.json.encode(question)).hexdigest()[:24]
    return (folder or cache_folder()) / "schedules" / f"{key}.json"


def _cached(path: Path) -> SearchResult | None:
    content = read_if_there(path)
    if content is None:
        return None
    try:
        return msgspec.json.decode(content, type=SearchResult)
    except msgspec.DecodeError:
        return None
