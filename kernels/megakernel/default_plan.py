"""A plan without search: tiles of equal shares, the fewest that keep all workers about equally busy."""

from collections.abc import Mapping

from megakernel.graph import usual_formats
from megakernel.k_tiles import num_k_tiles
from megakernel.linear_tiles import (
    COST_TOLERANCE,
    MAX_STAGES,
    LinearRole,
    candidates,
    even_columns,
    linear_roles,
)
from megakernel.machine import Machine
from megakernel.model.shape import ModelShape
from megakernel.plan import OpPlan, Plan
from megakernel.schedule import most_prefetched
from megakernel.tiles import packed_grain


def default_plan(
    shape: ModelShape, machine: Machine, bucket: int, formats: Mapping[str, str] | None = None
) -> Plan:
    """The same for every bucket. Raises ScratchError where even the smallest tile does not fit."""
    del bucket
    stored = usual_formats(shape) if formats is None else formats
    ops = {role.name: plan_linear(role, machine) for role in linear_roles(shape, stored, machine)}
    ops["embed"] = OpPlan(tile_columns=even_columns(shape.hidden_size, packed_grain(1), machine.num_workers))
    ops["attention"] = OpPlan(tile_columns=1)
    ahead = most_prefetched(machine) if machine.kind == "cuda" else MAX_STAGES - 1
    return Plan(ops=ops, prefetch_instructions=ahead)


def plan_linear(role: LinearRole, machine: Machine) -> OpPlan:
    """Of the tiles that cost about the least, those of which a worker takes the fewest."""
    k_tiles = num_k_tiles(role, machine)
    found = [candidate for candidate in candidates(role, machine) if candidate.num_k_tiles == k_tiles]
    bearable_us = min(candidate.cost_us for candidate in found) * (1 + COST_TOLERANCE)
    best = min(
        (candidate for candidate in found if candidate.cost_us <= bearable_us),
        key=lambda candidate: (candidate.run, candidate.tile_columns),
    )
    return OpPlan(tile_columns=best.tile_columns, num_k_tiles=k_tiles, stages=best.stages)
