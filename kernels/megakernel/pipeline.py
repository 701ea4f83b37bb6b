"""Graph -> passes -> program. Passes are one list; the IR is verified after each."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Protocol

import msgspec
from xdsl.dialects.builtin import ModuleOp

from megakernel.default_plan import default_plan
from megakernel.graph import DEFAULT_SPLIT_TOKENS, STATS_SPANS, build_graph, usual_formats
from megakernel.lower import lower
from megakernel.machine import Machine
from megakernel.memory import plan_pages
from megakernel.model.shape import ModelShape
from megakernel.passes.assign import assign
from megakernel.passes.barriers import barriers
from megakernel.passes.context import PassContext, PlanError
from megakernel.passes.fuse import fuse
from megakernel.passes.k_split import k_split
from megakernel.passes.tile import tile
from megakernel.plan import ROLES, Plan
from megakernel.program import Program

Pass = Callable[[ModuleOp, PassContext], None]

PASSES: Mapping[str, Pass] = MappingProxyType(
    {"fuse": fuse, "tile": tile, "k-split": k_split, "assign": assign, "barriers": barriers}
)
"""By name, in order."""
STAGE_NAMES = ("graph", *PASSES)
"""What `ir_after` can stop at."""
MAX_BUCKET = 4096
_CACHED_GRAPHS = 8


class PagePlanner(Protocol):
    """Gives every instruction its scratch pages: see `megakernel.memory.plan_pages`."""

    def __call__(
        self, program: Program, machine: Machine, plan: Plan | None, formats: Mapping[str, str] | None, /
    ) -> Program: ...


def compile_program(
    shape: ModelShape,
    fingerprint: str,
    machine: Machine,
    bucket: int,
    plan: Plan | None = None,
    *,
    split_tokens: int = DEFAULT_SPLIT_TOKENS,
    formats: Mapping[str, str] | None = None,
    page_planner: PagePlanner | None = plan_pages,
) -> Program:
    """`formats` by weight name; None: the usual ones. `page_planner` None leaves scratch pages out.

    Raises GraphError for a model, PlanError for a plan and ScratchError for tiles that cannot be.
    """
    stored = usual_formats(shape) if formats is None else formats
    context = pass_context(shape, machine, bucket, plan, split_tokens=split_tokens, formats=stored)
    module = fused_graph(shape, stored, split_tokens, STATS_SPANS[machine.kind]).clone()
    run_passes(module, context, list(PASSES)[1:])
    program = lower(module, fingerprint, context)
    if page_planner is None:
        return program
    return page_planner(program, machine, context.plan, stored)


def ir_after(
    shape: ModelShape,
    machine: Machine,
    bucket: int,
    stop_after: str,
    plan: Plan | None = None,
    *,
    split_tokens: int = DEFAULT_SPLIT_TOKENS,
    formats: Mapping[str, str] | None = None,
) -> ModuleOp:
    """The module as it is after a pass, or as `graph` makes it. Raises ValueError for an unknown pass."""
    if stop_after not in STAGE_NAMES:
        raise ValueError(f"no pass is called `{stop_after}`; there are {', '.join(STAGE_NAMES)}")
    stored = usual_formats(shape) if formats is None else formats
    context = pass_context(shape, machine, bucket, plan, split_tokens=split_tokens, formats=stored)
    module = build_graph(shape, stored, split_tokens=split_tokens, stats_span=STATS_SPANS[machine.kind])
    module.verify()
    run_passes(module, context, list(PASSES)[: STAGE_NAMES.index(stop_after)])
    return module


def run_passes(module: ModuleOp, context: PassContext, names: Sequence[str]) -> None:
    for name in names:
        PASSES[name](module, context)
        module.verify()


def pass_context(
    shape: ModelShape,
    machine: Machine,
    bucket: int,
    plan: Plan | None,
    *,
    split_tokens: int,
    formats: Mapping[str, str],
) -> PassContext:
    """Raises PlanError where bucket or plan make no sense."""
    if not 1 <= bucket <= MAX_BUCKET:
        raise PlanError(f"a bucket has 1 to {MAX_BUCKET} rows, got {bucket}")
    plan = default_plan(shape, machine, bucket, formats) if plan is None else plan
    unknown = sorted(plan.ops.keys() - set(ROLES))
    if unknown:
        raise PlanError(f"the plan has unknown roles {', '.join(unknown)}; roles are {', '.join(ROLES)}")
    return PassContext(shape=shape, machine=machine, bucket=bucket, plan=plan, split_tokens=split_tokens)


def fused_graph(
    shape: ModelShape, formats: Mapping[str, str], split_tokens: int, stats_span: int
) -> ModuleOp:
    """Shared and cached: clone it before changing it."""
    return _fused_graph(shape, tuple(sorted(formats.items())), split_tokens, stats_span)


@lru_cache(maxsize=_CACHED_GRAPHS)
def _fused_graph(
    shape: ModelShape, formats: tuple[tuple[str, str], ...], split_tokens: int, stats_span: int
) -> ModuleOp:
    module = build_graph(shape, dict(formats), split_tokens=split_tokens, stats_span=stats_span)
    module.verify()
    fuse(module)
    module.verify()
    return module


def encode_program(program: Program) -> bytes:
    """Equal programs give equal bytes."""
    return msgspec.msgpack.encode(program)


def decode_program(data: bytes) -> Program:
    """Raises msgspec's DecodeError for what is no program."""
    return msgspec.msgpack.decode(data, type=Program)
