"""The search space: each role's tilings that fit, ranked by a closed estimate of the op's time."""

from collections.abc import Mapping, Sequence

import msgspec

from megakernel.footprint import max_stages
from megakernel.k_tiles import shared_k_tiles
from megakernel.machine import Machine
from megakernel.memory import ScratchError
from megakernel.model.shape import ModelShape
from megakernel.passes.context import PlanError
from megakernel.plan import OpPlan, Plan
from megakernel.program import fits_heads
from megakernel.schedule import (
    MAX_STAGES,
    SPLIT_TOKENS,
    RoleShape,
    geometry_of,
    largest_k_tile,
    num_tiles,
    role_shapes,
    tile_footprint,
    with_workers,
)
from megakernel.work import grouped_rows, macs_per_us

CONTIGUOUS = -1
"""The turn that stands for equal runs of adjacent tiles; others turn the list schedule's assignment."""
_MAX_RANKED = 24
_WIDTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)
"""Tile widths that are tried, in granules."""
_IN_FLIGHT = 3
"""Tiles that a worker loads or computes at once, where its stages allow."""
_FLOAT_BYTES = 4
_PARTIAL_BYTES = 8
"""A K-tile's sum is written once and read once."""


class Tilings:
    """K-tiles are the artifact's, never a choice here: a bucket's search must not change a row's bits.

    Raises ScratchError where no tile of a role fits, PlanError for a known plan with other K-tiles.
    """

    def __init__(
        self,
        shape: ModelShape,
        machine: Machine,
        bucket: int,
        formats: Mapping[str, str] | None = None,
        known: Sequence[Plan] = (),
        split_tokens: int = SPLIT_TOKENS,
    ) -> None:
        self._machine = machine
        self._bucket = bucket
        self._geometry = geometry_of(shape)
        self._k_tiles = shared_k_tiles(shape, machine, formats)
        self._known = known
        roles = role_shapes(shape, formats, split_tokens=split_tokens, kind=machine.kind)
        self.roles = tuple(roles.values())
        self.ranked = tuple(self._rank(role) for role in self.roles)

    def plan(self, ranks: tuple[int, ...], turns: tuple[int, ...], prefetch_instructions: int) -> Plan:
        """The plan of a place in the space. `ranks` and `turns` are by role: see `CONTIGUOUS`."""
        ops: dict[str, OpPlan] = {}
        for role, ranked, rank, turn in zip(self.roles, self.ranked, ranks, turns, strict=True):
            ops[role.role] = self._turned(ranked[rank], turn)
        return Plan(ops=ops, prefetch_instructions=prefetch_instructions)

    def ranks_of(self, plan: Plan) -> tuple[int, ...]:
        """Where a known plan's tilings stand, whatever its stages and workers."""
        return tuple(
            [_sizes(op_plan) for op_plan in ranked].index(_sizes(plan.ops[role.role]))
            for role, ranked in zip(self.roles, self.ranked, strict=True)
        )

    def _turned(self, op_plan: OpPlan, turn: int) -> OpPlan:
        if op_plan.tile_workers is None:
            return op_plan
        if turn == CONTIGUOUS:
            return msgspec.structs.replace(op_plan, tile_workers=None)
        workers = tuple((worker + turn) % self._machine.num_workers for worker in op_plan.tile_workers)
        return msgspec.structs.replace(op_plan, tile_workers=workers)

    def _rank(self, role: RoleShape) -> tuple[OpPlan, ...]:
        known = {_sizes(plan.ops[role.role]) for plan in self._known}
        if role.role == "embed":
            return tuple(OpPlan(tile_columns=columns) for columns, _ in sorted(known | {(role.columns, 1)}))
        fitting = [op_plan for op_plan in self._candidates(role, known) if op_plan.stages >= 1]
        if not fitting:
            raise ScratchError(
                f"{role.role}: no tile of {self._bucket} rows fits the {self._machine.usable_bytes} bytes "
                f"of a worker of {self._machine.name}"
            )
        if role.in_features:
            fitting.sort(key=lambda op_plan: self.estimate_us(role, op_plan))
        chosen = fitting[:_MAX_RANKED]
        chosen += [op_plan for op_plan in fitting[_MAX_RANKED:] if _sizes(op_plan) in known]
        return tuple(with_workers(role, op_plan, self._machine) for op_plan in chosen)

    def _candidates(self, role: RoleShape, known: set[tuple[int, int]]) -> list[OpPlan]:
        k_tiles = self._k_tiles.get(role.role, 1)
        if other := sorted({known_k_tiles for _, known_k_tiles in known} - {k_tiles}):
            raise PlanError(f"{role.role}: a plan has {other[0]} K-tiles, all programs have {k_tiles}")
        granules = -(-role.columns // role.granule)
        if role.role == "attention" and self._machine.kind == "cuda":
            granules = 1  # its kernel takes one KV head
        widths = [width for width in _WIDTHS if width <= granules] or [1]
        tried = (width * role.granule for width in widths)
        sizes = {columns for columns in tried if fits_heads(columns, role.head_dim)}
        sizes |= {columns for columns, _ in known}
        return [
            self._staged(role, OpPlan(tile_columns=columns, num_k_tiles=k_tiles)) for columns in sorted(sizes)
        ]

    def _staged(self, role: RoleShape, op_plan: OpPlan) -> OpPlan:
        """With as many stages as fit; 0 where it does not fit at all."""
        needed = tile_footprint(role, self._geometry, op_plan, self._bucket, self._machine)
        return msgspec.structs.replace(op_plan, stages=min(max_stages(needed, self._machine), MAX_STAGES))

    def estimate_us(self, role: RoleShape, op_plan: OpPlan) -> float:
        """One op from first load to last sum, all its workers at once and nothing overlapped with others."""
        machine = self._machine
        tiles = num_tiles(role, op_plan.tile_columns)
        instructions = tiles * op_plan.num_k_tiles
        waves = -(-instructions // machine.num_workers)
        loaders = min(instructions, machine.num_workers)
        rate_gb_s = min(machine.worker_bandwidth_gb_s, machine.bandwidth_gb_s / loaders)
        weights = largest_k_tile(role, op_plan.num_k_tiles) * min(op_plan.tile_columns, role.columns)
        load_us = weights * role.weight_bits / 8 / (rate_gb_s * 1e3)
        compute_us = weights * grouped_rows(self._bucket, machine) / macs_per_us(machine, "Q4_1")
        if op_plan.num_k_tiles > 1:
            compute_us += self._refill_us(largest_k_tile(role, op_plan.num_k_tiles))
        busy_us = compute_us + machine.instruction_us
        through_us = load_us + machine.load_latency_us + busy_us
        in_flight = min(op_plan.stages, _IN_FLIGHT) + machine.computes_while_loading
        each_us = max(load_us, busy_us, through_us / in_flight)
        return waves * each_us + self._reduce_us(op_plan, tiles)

    def _refill_us(self, k: int) -> float:
        return self._bucket * k * _FLOAT_BYTES / (self._machine.worker_bandwidth_gb_s * 1e3)

    def _reduce_us(self, op_plan: OpPlan, tiles: int) -> float:
        if op_plan.num_k_tiles == 1:
            return 0.0
        machine = self._machine
        waves = -(-tiles // machine.num_workers)
        sums = op_plan.num_k_tiles * op_plan.tile_columns * self._bucket * _PARTIAL_BYTES
        read_us = sums / (machine.worker_bandwidth_gb_s * 1e3)
        return machine.sync_us + waves * (machine.instruction_us + machine.load_latency_us + read_us)


def _sizes(op_plan: OpPlan) -> tuple[int, int]:
    return op_plan.tile_columns, op_plan.num_k_tiles
