"""List scheduling: the plan without a search, which the search starts from and is compared with.

Ops are scheduled in dependency order, the tiles of each by longest processing time first. Tile sizes follow
one rule: the widest tile of which two stages fit the scratch memory and which leaves no worker without one.
K-tiles are those that all programs of an artifact share (`k_tiles.py`).
"""

import heapq
from collections.abc import Mapping, Sequence

import msgspec

from megakernel.cuda_constants import K_BLOCK, MAX_LOADS_AHEAD
from megakernel.footprint import (
    Footprint,
    attention_footprint,
    cuda_attention_footprint,
    cuda_linear_footprint,
    linear_footprint,
    max_stages,
)
from megakernel.k_blocks import KBlocks, k_blocks, most_columns, planned_k_blocks
from megakernel.k_tiles import shared_k_tiles
from megakernel.machine import Machine
from megakernel.memory import ScratchError
from megakernel.model.shape import ModelShape
from megakernel.plan import ROLES, OpPlan, Plan
from megakernel.program import Epilogue, Geometry, fits_heads
from megakernel.tiles import epilogue_grain, k_block, packed_grain
from megakernel.weight_formats import (
    FLOAT_ACTIVATION_BITS,
    QUANTIZED,
    QUANTIZED_ACTIVATION_BITS,
    WEIGHT_BITS,
    format_of,
)

SPLIT_TOKENS = 128
COLUMN_GRANULE = 16
K_GRANULE = 32
"""A quantization block: K-tiles are whole blocks."""
MAX_K_TILES = 64
MAX_STAGES = 4


class RoleShape(msgspec.Struct, frozen=True, kw_only=True):
    """What tiling must know of a role: the same op in every layer."""

    role: str
    in_features: int
    """0 of embed and attention, which are not multiplied by tiles of K."""
    columns: int
    """What is cut into tiles: output columns; of attention, KV heads."""
    granule: int
    """A tile is a multiple of this."""
    weight_bits: float
    """A weight's, on average; the widest of the layers."""
    input_bits: float
    count: int
    """Ops of the role in the model."""
    num_splits: int = 0
    """Of attention: KV splits of the longest context."""
    k_block: int = 1
    """K-tiles are whole multiples of it."""
    formats: tuple[str, ...] = ()
    head_dim: int = 0
    """Of QKV: what its tiles must fit, see `program.fits_heads`."""


def geometry_of(shape: ModelShape) -> Geometry:
    return Geometry(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_context_tokens=shape.max_context_tokens,
        rms_norm_eps=shape.rms_norm_eps,
    )


def role_shapes(
    shape: ModelShape,
    formats: Mapping[str, str] | None = None,
    *,
    split_tokens: int = SPLIT_TOKENS,
    kind: str = "cpu",
) -> dict[str, RoleShape]:
    """By role, in dependency order (`plan.ROLES`)."""
    q_columns = shape.num_heads * shape.head_dim
    kv_columns = shape.num_kv_heads * shape.head_dim
    hidden, inner, layers = shape.hidden_size, shape.intermediate_size, shape.num_layers

    def grain(epilogue: Epilogue) -> int:
        return epilogue_grain(epilogue, shape.head_dim, kind)

    head = "embed" if shape.has_tied_head else "head"
    linear = {
        "qkv": (
            hidden,
            {"q": q_columns, "k": kv_columns, "v": kv_columns},
            packed_grain(grain(Epilogue.ROPE_APPEND)),
        ),
        "o": (q_columns, {"o": hidden}, COLUMN_GRANULE),
        "gate_up": (hidden, {"gate": inner, "up": inner}, grain(Epilogue.SWIGLU)),
        "down": (inner, {"down": hidden}, COLUMN_GRANULE),
        "head": (hidden, {head: shape.vocab_size}, grain(Epilogue.LOGITS)),
    }
    shapes = {
        role: _linear_role(role, *linear[role], 1 if role == "head" else layers, formats, kind)
        for role in linear
    }
    shapes["qkv"] = msgspec.structs.replace(shapes["qkv"], head_dim=shape.head_dim)
    bits = WEIGHT_BITS[format_of("embed", formats)]
    shapes["embed"] = _plain_role("embed", hidden, COLUMN_GRANULE, bits, 1)
    num_splits = -(-shape.max_context_tokens // split_tokens)
    shapes["attention"] = _plain_role("attention", shape.num_kv_heads, 1, 0.0, layers, num_splits)
    return {role: shapes[role] for role in ROLES}


def _plain_role(
    role: str, columns: int, granule: int, bits: float, count: int, num_splits: int = 0
) -> RoleShape:
    return RoleShape(
        role=role,
        in_features=0,
        columns=columns,
        granule=granule,
        weight_bits=bits,
        input_bits=FLOAT_ACTIVATION_BITS,
        count=count,
        num_splits=num_splits,
    )


def _linear_role(
    role: str,
    in_features: int,
    columns: Mapping[str, int],
    granule: int,
    count: int,
    formats: Mapping[str, str] | None,
    kind: str,
) -> RoleShape:
    """Widths of the layer with the most bits: what fits there fits in all."""
    names = ["{}"] if role == "head" else [f"layers.{layer}.{{}}" for layer in range(count)]
    stored = [[format_of(name.format(part), formats) for part in columns] for name in names]
    total = sum(columns.values())
    weight_bits = max(
        sum(WEIGHT_BITS[name] * width for name, width in zip(layer, columns.values(), strict=True)) / total
        for layer in stored
    )
    is_quantized = all(set(layer) <= QUANTIZED for layer in stored)
    return RoleShape(
        role=role,
        in_features=in_features,
        columns=total,
        granule=granule,
        weight_bits=weight_bits,
        k_block=k_block(in_features, kind),
        formats=tuple(sorted({name for layer in stored for name in layer})),
        input_bits=QUANTIZED_ACTIVATION_BITS if is_quantized else FLOAT_ACTIVATION_BITS,
        count=count,
    )


def tile_footprint(
    role: RoleShape, geometry: Geometry, op_plan: OpPlan, bucket: int, machine: Machine
) -> Footprint:
    """Of the role's largest tile."""
    if role.role == "attention" and machine.kind == "cuda":
        return cuda_attention_footprint(geometry, SPLIT_TOKENS, machine.usable_bytes)
    if role.role == "attention":
        return attention_footprint(
            kv_heads=op_plan.tile_columns,
            geometry=geometry,
            rows=bucket,
            num_pages=machine.num_pages,
            page_bytes=machine.page_bytes,
        )
    columns = min(op_plan.tile_columns, role.columns)
    k = largest_k_tile(role, op_plan.num_k_tiles)
    if machine.kind == "cuda":
        blocks = _k_blocks(role, op_plan, bucket, machine)
        return cuda_linear_footprint(
            columns=columns,
            k=blocks.load_k,
            input_k=blocks.input_k,
            in_features=role.in_features,
            rows=bucket,
            stored=role.formats,
        )
    return linear_footprint(
        columns=columns, k=k, rows=bucket, weight_bits=role.weight_bits, input_bits=role.input_bits
    )


def _k_blocks(role: RoleShape, op_plan: OpPlan, bucket: int, machine: Machine) -> KBlocks:
    return planned_k_blocks(
        op_plan,
        columns=min(op_plan.tile_columns, role.columns),
        k=role.in_features,
        rows=bucket,
        stored=role.formats,
        machine=machine,
    )


def num_loads(role: RoleShape, op_plan: OpPlan, bucket: int, machine: Machine) -> int:
    """Of a tile on a GPU."""
    return -(-role.in_features // _k_blocks(role, op_plan, bucket, machine).load_k)


def with_fewest_loads(role: RoleShape, op_plan: OpPlan, bucket: int, machine: Machine) -> OpPlan:
    """On a GPU, the tile loaded whole where it fits, else in the fewest loads."""
    columns = min(op_plan.tile_columns, role.columns)
    blocks = k_blocks(
        columns=columns,
        k=role.in_features,
        rows=bucket,
        stored=role.formats,
        machine=machine,
        loads_in_memory=2,
    )
    input_k = blocks.input_k if blocks.input_k < role.in_features else 0
    load_k = -(-blocks.load_k // K_BLOCK) * K_BLOCK
    return msgspec.structs.replace(op_plan, load_k=load_k, input_k=input_k)


def largest_k_tile(role: RoleShape, num_k_tiles: int) -> int:
    """Elements."""
    blocks = -(-role.in_features // role.k_block)
    return min(role.in_features, role.k_block * -(-blocks // num_k_tiles))


def k_tile_choices(role: RoleShape) -> tuple[int, ...]:
    """Ascending numbers of K-tiles that cut K into equal runs of whole quantization blocks."""
    granule = max(K_GRANULE, role.k_block)
    blocks, rest = divmod(role.in_features, granule)
    if not blocks or rest:
        return (1,)
    return tuple(n for n in range(1, min(blocks, MAX_K_TILES) + 1) if blocks % n == 0)


def fewest_k_tiles(
    shape: ModelShape, machine: Machine, bucket: int, formats: Mapping[str, str] | None = None
) -> dict[str, int]:
    """By linear role: 1 where a tile with K whole fits. Raises ScratchError where none does."""
    geometry = geometry_of(shape)
    fewest: dict[str, int] = {}
    for role in role_shapes(shape, formats, kind=machine.kind).values():
        if not role.in_features:
            continue
        for k_tiles in k_tile_choices(role):
            narrowest = OpPlan(tile_columns=role.granule, num_k_tiles=k_tiles)
            if max_stages(tile_footprint(role, geometry, narrowest, bucket, machine), machine):
                fewest[role.role] = k_tiles
                break
        else:
            raise ScratchError(f"{role.role}: no tile of {bucket} rows fits a worker of {machine.name}")
    return fewest


def num_tiles(role: RoleShape, tile_columns: int) -> int:
    return -(-role.columns // tile_columns)


def list_schedule(
    shape: ModelShape,
    machine: Machine,
    bucket: int,
    formats: Mapping[str, str] | None = None,
    *,
    split_tokens: int = SPLIT_TOKENS,
    k_tiles: Mapping[str, int] | None = None,
) -> Plan:
    """The baseline plan, for programs of `split_tokens`.

    `k_tiles` by role, 1 where it does not say; None: those that all programs have. Raises ScratchError where
    even the smallest tile does not fit.
    """
    geometry = geometry_of(shape)
    if k_tiles is None:
        k_tiles = shared_k_tiles(shape, machine, formats)
    ops = {
        role.role: _plan_role(role, geometry, machine, bucket, k_tiles.get(role.role, 1))
        for role in role_shapes(shape, formats, split_tokens=split_tokens, kind=machine.kind).values()
    }
    return Plan(ops=ops, prefetch_instructions=most_prefetched(machine) if machine.kind == "cuda" else 1)


def most_prefetched(machine: Machine) -> int:
    """What `Plan.prefetch_instructions` may be: a GPU's loader takes what its pages and barriers hold."""
    return MAX_LOADS_AHEAD if machine.kind == "cuda" else MAX_STAGES


def _plan_role(role: RoleShape, geometry: Geometry, machine: Machine, bucket: int, k_tiles: int) -> OpPlan:
    if role.role == "embed" and machine.kind == "cuda":
        tiles = -(-role.columns // (role.granule * machine.num_workers))
        return with_workers(role, OpPlan(tile_columns=tiles * role.granule), machine)
    if role.role == "embed":
        return OpPlan(tile_columns=role.columns)
    if role.role == "attention":
        return with_workers(role, OpPlan(tile_columns=1), machine)
    for stages in (2, 1):
        for columns in _tile_widths(role, machine, bucket, k_tiles):
            op_plan = OpPlan(tile_columns=columns, num_k_tiles=k_tiles, stages=stages)
            if max_stages(tile_footprint(role, geometry, op_plan, bucket, machine), machine) >= stages:
                return with_workers(role, op_plan, machine)
    narrowest = OpPlan(tile_columns=role.granule, num_k_tiles=k_tiles)
    smallest = tile_footprint(role, geometry, narrowest, bucket, machine)
    raise ScratchError(
        f"{role.role}: its smallest tile, {role.granule} columns in {k_tiles} K-tiles of {bucket} rows, "
        f"needs {smallest.total_bytes(1)} bytes; a worker of {machine.name} has {machine.usable_bytes}"
    )


def _tile_widths(role: RoleShape, machine: Machine, bucket: int, k_tiles: int) -> tuple[int, ...]:
    """Widest first: that which gives each worker one K-tile of it, halves of it, and a single granule.

    On a GPU those first that give the busiest SM the fewest columns.
    """
    granules = -(-role.columns // role.granule)
    if machine.kind == "cuda":
        most = most_columns(bucket, role.formats, role.in_features, machine) // role.granule
        widths = [
            width * role.granule
            for width in range(1, max(1, min(granules, most)) + 1)
            if role.role != "qkv" or fits_heads(width * role.granule, role.head_dim)
        ]
        return tuple(sorted(widths, key=lambda width: (_most_columns(role, width, machine), -width)))
    widest = max(1, granules * k_tiles // machine.num_workers)
    halves = {max(1, widest >> halvings) for halvings in range(widest.bit_length() + 1)} | {1}
    return tuple(width * role.granule for width in sorted(halves, reverse=True))


def _most_columns(role: RoleShape, tile_columns: int, machine: Machine) -> int:
    """Of the busiest worker."""
    return tile_columns * -(-num_tiles(role, tile_columns) // machine.num_workers)


def with_workers(role: RoleShape, op_plan: OpPlan, machine: Machine) -> OpPlan:
    """The plan with each instruction's worker, longest processing time first."""
    columns = op_plan.tile_columns
    if machine.kind == "cuda":
        return msgspec.structs.replace(op_plan, tile_workers=_in_turn(role, op_plan, machine))
    widths = [min(columns, role.columns - first) for first in range(0, role.columns, columns)]
    if role.role == "attention":
        # Part p has work wherever the context reaches its first split: the lower, the more often.
        parts = min(machine.num_workers, role.num_splits)
        costs = [width / (1 + part) for width in widths for part in range(parts)]
    else:
        costs = [float(width) for width in widths for _ in range(op_plan.num_k_tiles)]
    return msgspec.structs.replace(op_plan, tile_workers=balanced(costs, machine.num_workers))


def _in_turn(role: RoleShape, op_plan: OpPlan, machine: Machine) -> tuple[int, ...]:
    """Tiles dealt to workers in order: SMs whose tiles are evenly spaced share code."""
    tiles = num_tiles(role, op_plan.tile_columns)
    parts = min(machine.num_workers, role.num_splits) if role.role == "attention" else op_plan.num_k_tiles
    return tuple(number % machine.num_workers for number in range(tiles * parts))


def balanced(costs: Sequence[float], num_workers: int) -> tuple[int, ...]:
    """A worker for each cost, longest first, each to the least loaded (the lowest-numbered of equals)."""
    loads = [(0.0, worker) for worker in range(num_workers)]
    workers = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        load, worker = heapq.heappop(loads)
        workers[item] = worker
        heapq.heappush(loads, (load + costs[item], worker))
    return tuple(workers)
