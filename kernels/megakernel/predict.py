"""What decode steps take, predicted: schedules compiled for a machine, under the cost model."""

from collections.abc import Iterator, Mapping
from functools import partial

import msgspec

from megakernel.artifact import Progress
from megakernel.cost import bandwidth_bound_us, simulate
from megakernel.default_plan import default_plan
from megakernel.graph import DEFAULT_SPLIT_TOKENS
from megakernel.machine import Machine
from megakernel.model.shape import ModelShape
from megakernel.pipeline import compile_program
from megakernel.plan import OpPlan, Plan
from megakernel.program import Program
from megakernel.report import peak_bytes, split_rows
from megakernel.schedule import (
    fewest_k_tiles,
    list_schedule,
    num_loads,
    role_shapes,
    with_fewest_loads,
)
from megakernel.scratch import check_pages
from megakernel.search import Budget, SearchResult, search
from megakernel.work import DEFAULT_CONTEXT_TOKENS, step_bytes

_FINGERPRINT = "predicted"
_MS_DIGITS = 4


class Question(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    shape: ModelShape
    formats: Mapping[str, str]
    """As packed, by weight name."""
    machine: Machine
    batches: tuple[int, ...]
    """Rows of a step, one a sequence; each has a program of its own. Ascending."""
    contexts: tuple[int, ...]
    """Tokens that a row attends to, its own among them; no two rows share any. Ascending."""
    search_s: float = 0.0
    """Of each batch; 0: list scheduling."""

    @property
    def schedule_context(self) -> int:
        """What schedules are judged at."""
        return min(DEFAULT_CONTEXT_TOKENS, self.shape.max_context_tokens)


class StepPrediction(msgspec.Struct, frozen=True, kw_only=True):
    batch: int
    context_tokens: int
    predicted_ms: float
    weight_bytes: int
    """Embedding rows included; the head whole."""
    kv_bytes: int
    bound_ms: float
    """To read those bytes at the machine's bandwidth."""
    ratio: float
    """Of predicted to bound."""
    bubble_share: float
    """Of the workers' time: waits for one another, and ends before the step's."""


class ScheduleFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one batch's program, at `Prediction.schedule_context`."""

    k_tiles: dict[str, int]
    """By linear role; on a GPU loads of a tile, which are summed in registers."""
    stages: dict[str, int]
    peak_bytes: int
    """Of a worker's scratch memory, held at once, with what kernels reserve."""
    predicted_ms: float
    bubble_share: float


class TileFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The schedule's output tiles with K whole and with K as it is: of the role that needs most."""

    whole_bytes: int
    """Two stages of weights, input and output."""
    split_bytes: int
    whole_stages: int
    """Those that fit; 0: not even one does."""
    split_stages: int


class BatchSchedule(msgspec.Struct, frozen=True, kw_only=True):
    batch: int
    num_searched: int | None
    """Plans that the search tried in its time; None: list scheduling."""
    planned: ScheduleFigures
    least_split: ScheduleFigures
    """To compare with: list scheduling, K whole where such a tile fits, else in the fewest tiles that fit; on
    a GPU in the fewest loads of which two fit."""
    tiles: TileFigures


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    machine: str
    scratch_bytes: int
    """A worker's."""
    schedule_context: int
    steps: tuple[StepPrediction, ...]
    schedules: tuple[BatchSchedule, ...]
    assumptions: tuple[str, ...]


def predict(
    question: Question, assumptions: tuple[str, ...] = (), progress: Progress | None = None
) -> Prediction:
    """Raises ScratchError where no tile fits, MachineError for a machine that states no rate."""
    steps: list[StepPrediction] = []
    schedules: list[BatchSchedule] = []
    for done, batch in enumerate(question.batches):
        if progress is not None:
            progress(f"{batch} rows", done / len(question.batches))
        found = _search(question, batch) if question.search_s else None
        listed = list_schedule(question.shape, question.machine, batch, question.formats)
        plan = listed if found is None else found.plan
        program = _compile(question, batch, plan)
        steps += _steps(question, program)
        schedules.append(_schedule(question, program, plan, found.evaluations if found else None))
    return Prediction(
        model=question.model,
        machine=question.machine.name,
        scratch_bytes=question.machine.scratch_bytes,
        schedule_context=question.schedule_context,
        steps=tuple(steps),
        schedules=tuple(schedules),
        assumptions=assumptions,
    )


def _search(question: Question, batch: int) -> SearchResult:
    shape, machine, formats = question.shape, question.machine, question.formats
    return search(
        shape,
        _FINGERPRINT,
        machine,
        batch,
        partial(compile_program, split_tokens=DEFAULT_SPLIT_TOKENS),
        formats=formats,
        context_tokens=question.schedule_context,
        starts=[default_plan(shape, machine, batch, formats)],
        budget=Budget(seconds=question.search_s),
    )


def _compile(question: Question, batch: int, plan: Plan) -> Program:
    return compile_program(
        question.shape, _FINGERPRINT, question.machine, batch, plan, formats=question.formats
    )


def _steps(question: Question, program: Program) -> Iterator[StepPrediction]:
    machine, formats = question.machine, question.formats
    weight_bytes = int(step_bytes(program, machine, formats, 0))
    for context in question.contexts:
        trace = simulate(program, machine, formats, context, is_shared=False)
        bound_us = bandwidth_bound_us(program, machine, formats, context, is_shared=False)
        yield StepPrediction(
            batch=program.bucket,
            context_tokens=context,
            predicted_ms=_ms(trace.makespan_us),
            weight_bytes=weight_bytes,
            kv_bytes=int(step_bytes(program, machine, formats, context, is_shared=False)) - weight_bytes,
            bound_ms=_ms(bound_us),
            ratio=round(trace.makespan_us / bound_us, 3),
            bubble_share=round(trace.bubble_share, 4),
        )


def _schedule(question: Question, program: Program, plan: Plan, num_searched: int | None) -> BatchSchedule:
    shape, machine, formats, batch = question.shape, question.machine, question.formats, program.bucket
    planned = _figures(question, program, plan)
    if machine.kind == "cuda":
        least = _with_fewest_loads(question, batch)
    else:
        fewest = fewest_k_tiles(shape, machine, batch, formats)
        least = list_schedule(shape, machine, batch, formats, k_tiles=fewest)
    return BatchSchedule(
        batch=batch,
        num_searched=num_searched,
        planned=planned,
        least_split=planned if least == plan else _figures(question, _compile(question, batch, least), least),
        tiles=_tiles(question, plan, batch),
    )


def _with_fewest_loads(question: Question, batch: int) -> Plan:
    shape, machine, formats = question.shape, question.machine, question.formats
    plan = list_schedule(shape, machine, batch, formats)
    roles = role_shapes(shape, formats, kind=machine.kind)
    ops = {
        name: with_fewest_loads(roles[name], op, batch, machine) if roles[name].in_features else op
        for name, op in plan.ops.items()
    }
    return msgspec.structs.replace(plan, ops=ops)


def _tiles(question: Question, plan: Plan, batch: int) -> TileFigures:
    rows = split_rows(question.shape, question.machine, batch, plan, question.formats)
    # Where a role's K is whole, split_rows compares with a split that the plan does not have.
    is_gpu = question.machine.kind == "cuda"
    is_split = {row.role: is_gpu or plan.ops[row.role].num_k_tiles > 1 for row in rows}
    return TileFigures(
        whole_bytes=peak_bytes(row.whole for row in rows),
        split_bytes=peak_bytes(row.split if is_split[row.role] else row.whole for row in rows),
        whole_stages=min(row.whole_stages for row in rows),
        split_stages=min(row.split_stages if is_split[row.role] else row.whole_stages for row in rows),
    )


def _figures(question: Question, program: Program, plan: Plan) -> ScheduleFigures:
    machine = question.machine
    trace = simulate(program, machine, question.formats, question.schedule_context, is_shared=False)
    linear = {role: op for role, op in plan.ops.items() if role not in ("embed", "attention")}
    return ScheduleFigures(
        k_tiles={role: _parts_of_k(question, program, role, op) for role, op in linear.items()},
        stages={role: op.stages for role, op in linear.items()},
        peak_bytes=machine.reserved_bytes + check_pages(program) * program.page_bytes,
        predicted_ms=_ms(trace.makespan_us),
        bubble_share=round(trace.bubble_share, 4),
    )


def _parts_of_k(question: Question, program: Program, role: str, op: OpPlan) -> int:
    machine = question.machine
    if machine.kind != "cuda":
        return op.num_k_tiles
    roles = role_shapes(question.shape, question.formats, kind=machine.kind)
    return num_loads(roles[role], op, program.bucket, machine)


def _ms(us: float) -> float:
    return round(us / 1e3, _MS_DIGITS)
