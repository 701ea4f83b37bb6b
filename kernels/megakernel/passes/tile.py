"""tile: every op gets the tile sizes that the plan has for its role."""

from xdsl.dialects.builtin import ModuleOp

from megakernel.cuda_constants import K_BLOCK
from megakernel.dialect.tiled_ops import AttentionOp, FusedLinearOp, LinearTail, TiledOp
from megakernel.passes.context import PassContext, PlanError
from megakernel.program import Epilogue, fits_heads
from megakernel.tiles import grain_of, max_k_tiles, width_of


def tile(module: ModuleOp, context: PassContext) -> None:
    for op in module.body.block.ops:
        if isinstance(op, TiledOp):
            tile_op(op, context)


def tile_op(op: TiledOp, context: PassContext) -> None:
    plan = context.op_plan(op.role)
    check_columns(op, plan.tile_columns, context)
    check_k_tiles(op, plan.num_k_tiles, context.machine.kind)
    check_k_blocks(op, plan.load_k, plan.input_k)
    op.decide(tile_columns=min(plan.tile_columns, width_of(op)), num_k_tiles=plan.num_k_tiles)


def check_columns(op: TiledOp, tile_columns: int, context: PassContext) -> None:
    kind = context.machine.kind
    if kind == "cuda" and isinstance(op, AttentionOp) and tile_columns != 1:
        raise PlanError(f"{op.label.data}: CUDA's attention takes one KV head a tile, got {tile_columns}")
    head_dim = context.shape.head_dim
    grain = grain_of(op, head_dim, kind)
    if tile_columns <= 0 or (tile_columns % grain and tile_columns < width_of(op)):
        raise PlanError(
            f"{op.label.data}: tile_columns must be a positive multiple of {grain}, got {tile_columns}"
        )
    has_heads = isinstance(op, LinearTail) and op.epilogue.data == Epilogue.ROPE_APPEND
    if has_heads and tile_columns < width_of(op) and not fits_heads(tile_columns, head_dim):
        raise PlanError(
            f"{op.label.data}: tile_columns must divide a head's {head_dim} or be a multiple of them, "
            f"got {tile_columns}"
        )


def check_k_tiles(op: TiledOp, num_k_tiles: int, kind: str) -> None:
    most = max_k_tiles(op.in_features, kind) if isinstance(op, FusedLinearOp) else 1
    if not 1 <= num_k_tiles <= most:
        raise PlanError(f"{op.label.data}: num_k_tiles must be 1 to {most}, got {num_k_tiles}")


def check_k_blocks(op: TiledOp, load_k: int, input_k: int) -> None:
    if load_k < 0 or load_k % K_BLOCK:
        raise PlanError(f"{op.label.data}: load_k must be a multiple of {K_BLOCK}, got {load_k}")
    if input_k and (not load_k or input_k % load_k):
        raise PlanError(f"{op.label.data}: input_k must be a multiple of load_k, {load_k}, got {input_k}")
