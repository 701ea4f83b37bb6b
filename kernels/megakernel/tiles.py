"""Which tiles an op has, in the order that plans, passes and programs number them."""

from collections.abc import Iterator
from functools import lru_cache
from math import lcm

import msgspec

from megakernel.cuda_constants import K_BLOCK
from megakernel.dialect.graph_ops import columns_of, sizes_of
from megakernel.dialect.tiled_ops import (
    AttentionOp,
    EmbedOp,
    FusedLinearOp,
    LinearTail,
    PartialLinearOp,
    ReduceOp,
    TiledOp,
)
from megakernel.dialect.types import QUANT_BLOCK
from megakernel.graph import STATS_SPANS, SWIGLU_GROUP
from megakernel.program import Epilogue

COLUMN_GROUP = 16
"""Output columns whose weights are packed together: default tiles are whole groups of them."""


class Tile(msgspec.Struct, frozen=True):
    """The fields of an instruction that say what it computes: see Opcode."""

    n0: int
    n1: int
    k0: int = 0
    k1: int = 0
    part: int = 0
    num_parts: int = 1


def width_of(op: TiledOp) -> int:
    """Columns that an op's tiles divide among them; of attention, KV heads."""
    match op:
        case EmbedOp():
            return columns_of(op.result)
        case AttentionOp():
            return sizes_of(op.kv)[0]
        case FusedLinearOp():
            return op.out_features
        case PartialLinearOp() | ReduceOp():
            return sizes_of(op.parts)[1]
        case _:
            raise AssertionError(f"{op.name} has no tiles")


def grain_of(op: TiledOp, head_dim: int, kind: str) -> int:
    """Columns that must stay in one tile: for the epilogue's sake, and on CUDA as weights are packed."""
    grain = 1
    if isinstance(op, LinearTail):
        grain = epilogue_grain(op.epilogue.data, head_dim, kind)
    return packed_grain(grain) if kind == "cuda" and not isinstance(op, AttentionOp) else grain


def epilogue_grain(epilogue: str, head_dim: int, kind: str) -> int:
    """Of heads, which on CUDA several tiles may make up, not the only rule: see `program.fits_heads`."""
    match epilogue:
        case Epilogue.ROPE_APPEND:
            return COLUMN_GROUP if kind == "cuda" and head_dim % COLUMN_GROUP == 0 else head_dim
        case Epilogue.SWIGLU:
            return 2 * SWIGLU_GROUP
        case Epilogue.LOGITS:
            return STATS_SPANS[kind]
        case _:
            return 1


def packed_grain(grain: int) -> int:
    """The smallest tile that also is whole column groups."""
    return lcm(grain, COLUMN_GROUP)


def k_block(in_features: int, kind: str) -> int:
    """What K-tiles are whole multiples of, on a kind of machine: quantization blocks, or units as packed."""
    if kind == "cuda":
        return K_BLOCK
    return 1 if in_features % QUANT_BLOCK else QUANT_BLOCK


def k_bounds(in_features: int, num_k_tiles: int, kind: str = "cpu") -> tuple[int, ...]:
    """Where K-tiles begin and end: as equal as whole blocks allow."""
    block = k_block(in_features, kind)
    num_blocks = -(-in_features // block)
    return tuple(
        min(in_features, block * (num_blocks * tile // num_k_tiles)) for tile in range(num_k_tiles + 1)
    )


def max_k_tiles(in_features: int, kind: str = "cpu") -> int:
    """A GPU takes K whole: what does not fit is loaded in blocks (`k_blocks.py`)."""
    if kind == "cuda":
        return 1
    return -(-in_features // k_block(in_features, kind))


def tiles_of(op: TiledOp, num_attention_parts: int, kind: str = "cpu") -> tuple[Tile, ...]:
    """An op's tiles, after `tile`: columns ascending, of each its K-tiles or attention parts ascending.

    On CUDA attention's parts ascend, of each its KV heads: the first splits are those that every context has.
    """
    width, step = width_of(op), op.decided("tile_columns")
    match op:
        case AttentionOp():
            tiles = _dealt_tiles(width, step, num_attention_parts)
            return _part_by_part(tiles) if kind == "cuda" else tiles
        case PartialLinearOp():
            return _k_tiles(width, step, op.in_features, sizes_of(op.parts)[0], kind)
        case ReduceOp():
            return _column_tiles(width, step, 0, sizes_of(op.parts)[0])
        case FusedLinearOp():
            return _column_tiles(width, step, op.in_features, 1)
        case _:
            return _column_tiles(width, step, 0, 1)


def _columns(width: int, step: int) -> Iterator[tuple[int, int]]:
    return ((n0, min(n0 + step, width)) for n0 in range(0, width, step))


# Layers are alike, and a search compiles many plans: tiles are computed once.


@lru_cache(maxsize=256)
def _column_tiles(width: int, step: int, k: int, num_parts: int) -> tuple[Tile, ...]:
    return tuple(Tile(n0, n1, 0, k, num_parts=num_parts) for n0, n1 in _columns(width, step))


@lru_cache(maxsize=256)
def _k_tiles(width: int, step: int, in_features: int, num_parts: int, kind: str) -> tuple[Tile, ...]:
    bounds = k_bounds(in_features, num_parts, kind)
    return tuple(
        Tile(n0, n1, bounds[part], bounds[part + 1], part, num_parts)
        for n0, n1 in _columns(width, step)
        for part in range(num_parts)
    )


@lru_cache(maxsize=256)
def _dealt_tiles(width: int, step: int, num_parts: int) -> tuple[Tile, ...]:
    return tuple(
        Tile(n0, n1, part=part, num_parts=num_parts)
        for n0, n1 in _columns(width, step)
        for part in range(num_parts)
    )


@lru_cache(maxsize=256)
def _part_by_part(tiles: tuple[Tile, ...]) -> tuple[Tile, ...]:
    return tuple(sorted(tiles, key=lambda tile: (tile.part, tile.n0)))
