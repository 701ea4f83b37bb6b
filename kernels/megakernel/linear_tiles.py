"""A model's linear roles, and what tiles each may have on a machine: sizes that fit, with a rough cost."""

from collections.abc import Mapping
from itertools import pairwise, product

import msgspec

from megakernel.footprint import ROW_CHUNK, cuda_linear_footprint, linear_footprint, max_stages
from megakernel.footprint_cuda import weight_tile_bytes
from megakernel.k_blocks import k_blocks
from megakernel.machine import Machine
from megakernel.model.shape import ModelShape
from megakernel.program import Epilogue, fits_heads
from megakernel.tiles import epilogue_grain, k_bounds, max_k_tiles, packed_grain
from megakernel.weight_formats import WEIGHT_BITS, activation_bits

MAX_RUN_TILES = 64
"""Tiles of an op that a worker takes in turn, at most, unless smaller ones must be to fit its scratch."""
MAX_K_TILES = 16
MAX_STAGES = 4
COST_TOLERANCE = 0.02
"""Costs that differ by no more, as a part of the least, count as the same: the simpler plan is taken."""
K_SPLIT_MARGIN = 0.1
"""K-splits must promise more than this, as a part of the op's time: the estimate is a rough one."""


class LinearRole(msgspec.Struct, frozen=True, kw_only=True):
    """What the size of a role's tiles depends on."""

    name: str
    in_features: int
    out_features: int
    grain: int
    formats: tuple[str, ...]
    head_dim: int = 0
    """Of QKV: what its tiles must fit, see `program.fits_heads`."""

    @property
    def weight_bits(self) -> float:
        return max(WEIGHT_BITS[name] for name in self.formats)


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes for a role, and what they are estimated to cost."""

    tile_columns: int
    num_k_tiles: int
    stages: int
    run: int
    """Tiles of the worker with the most."""
    cost_us: float


def linear_roles(shape: ModelShape, formats: Mapping[str, str], machine: Machine) -> list[LinearRole]:
    q_columns = shape.num_heads * shape.head_dim
    kv_columns = shape.num_kv_heads * shape.head_dim
    hidden, mlp = shape.hidden_size, shape.intermediate_size

    def role(name: str, k: int, columns: int, epilogue: Epilogue, *weights: str) -> LinearRole:
        stored = {
            formats[f"layers.{layer}.{weight}"] for layer in range(shape.num_layers) for weight in weights
        }
        return LinearRole(
            name=name,
            in_features=k,
            out_features=columns,
            grain=epilogue_grain(epilogue, shape.head_dim, machine.kind),
            formats=tuple(sorted(stored)),
            head_dim=shape.head_dim if epilogue is Epilogue.ROPE_APPEND else 0,
        )

    head = formats["embed" if shape.has_tied_head else "head"]
    return [
        role("qkv", hidden, q_columns + 2 * kv_columns, Epilogue.ROPE_APPEND, "q", "k", "v"),
        role("o", q_columns, hidden, Epilogue.RESIDUAL, "o"),
        role("gate_up", hidden, 2 * mlp, Epilogue.SWIGLU, "gate", "up"),
        role("down", mlp, hidden, Epilogue.RESIDUAL, "down"),
        LinearRole(
            name="head",
            in_features=hidden,
            out_features=shape.vocab_size,
            grain=epilogue_grain(Epilogue.LOGITS, shape.head_dim, machine.kind),
            formats=(head,),
        ),
    ]


def candidates(role: LinearRole, machine: Machine) -> list[Candidate]:
    grain = packed_grain(role.grain)
    widths = {
        even_columns(role.out_features, grain, machine.num_workers * run, role.head_dim)
        for run in range(1, MAX_RUN_TILES + 1)
    }
    splits = range(1, min(MAX_K_TILES, max_k_tiles(role.in_features, machine.kind)) + 1)
    fitting = (candidate(role, machine, width, parts) for width, parts in product(widths | {grain}, splits))
    return [found for found in fitting if found is not None]


def candidate(role: LinearRole, machine: Machine, width: int, parts: int) -> Candidate | None:
    """None where the tile does not fit, or has no room for the next one's weights beside its own."""
    bounds = k_bounds(role.in_features, parts, machine.kind)
    k = max(end - start for start, end in pairwise(bounds))
    needed = linear_footprint(
        columns=width,
        k=k,
        rows=ROW_CHUNK,
        weight_bits=role.weight_bits,
        input_bits=activation_bits(role.formats),
    )
    tile_bytes = needed.weight_stage_bytes
    if machine.kind == "cuda":
        tile_bytes = weight_tile_bytes(role.formats, width, k)
        blocks = k_blocks(columns=width, k=k, rows=ROW_CHUNK, stored=role.formats, machine=machine)
        needed = cuda_linear_footprint(
            columns=width,
            k=blocks.load_k,
            input_k=blocks.input_k,
            in_features=k,
            rows=ROW_CHUNK,
            stored=role.formats,
        )
    stages = min(max_stages(needed, machine), MAX_STAGES)
    if stages == 0:
        return None
    num_tiles = -(-role.out_features // width) * parts
    run = -(-num_tiles // machine.num_workers)
    loaders = min(num_tiles, machine.num_workers)
    rate_gb_s = min(machine.worker_bandwidth_gb_s, machine.bandwidth_gb_s / loaders)
    cost_us = run * (tile_bytes / (rate_gb_s * 1e3) + machine.instruction_us)
    if stages == 1 and not machine.computes_while_loading:  # nothing is loaded ahead
        cost_us += run * machine.load_latency_us
    if parts > 1:
        wave_us = machine.sync_us + machine.load_latency_us + machine.instruction_us
        cost_us = cost_us * (1 + K_SPLIT_MARGIN) + wave_us
    return Candidate(tile_columns=width, num_k_tiles=parts, stages=stages, run=run, cost_us=cost_us)


def even_columns(columns: int, grain: int, num_tiles: int, head_dim: int = 0) -> int:
    """The narrowest whole grains of which `num_tiles` cover the columns, and which fit heads."""
    width = grain * -(-columns // (grain * num_tiles))
    while not fits_heads(width, head_dim):
        width += grain
    return width
