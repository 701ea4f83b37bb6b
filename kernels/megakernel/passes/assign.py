"""assign: every tile gets a worker. A worker takes its tiles op by op, in an op in the order of its tiles."""

from xdsl.dialects.builtin import ModuleOp

from megakernel.dialect.graph_ops import sizes_of
from megakernel.dialect.tiled_ops import AttentionOp, ReduceOp, TiledOp
from megakernel.passes.context import PassContext, PlanError
from megakernel.tiles import tiles_of


def assign(module: ModuleOp, context: PassContext) -> None:
    known: dict[tuple[type[TiledOp], str], tuple[int, ...]] = {}  # layers share a role's plan
    for op in module.body.block.ops:
        if isinstance(op, TiledOp):
            key = (type(op), op.role)
            if key not in known:
                known[key] = workers_of(op, context)
            op.decide(workers=known[key])


def workers_of(op: TiledOp, context: PassContext) -> tuple[int, ...]:
    num_tiles = len(tiles_of(op, context.num_attention_parts, context.machine.kind))
    planned = context.op_plan(op.role).tile_workers
    if planned is not None:
        return planned_workers(op, planned, num_tiles, context.machine.num_workers)
    if context.machine.kind == "cuda":
        return tuple(tile % context.machine.num_workers for tile in range(num_tiles))
    if isinstance(op, AttentionOp):
        return dealt(num_tiles, context.num_attention_parts, context.machine.num_workers)
    return contiguous(num_tiles, context.machine.num_workers)


def contiguous(num_tiles: int, num_workers: int) -> tuple[int, ...]:
    """A run of tiles a worker, their lengths at most one apart."""
    return tuple(tile * num_workers // num_tiles for tile in range(num_tiles))


def dealt(num_tiles: int, num_parts: int, num_workers: int) -> tuple[int, ...]:
    """Part p of head group g on worker g + p, so that few splits still keep many workers busy."""
    return tuple((tile // num_parts + tile % num_parts) % num_workers for tile in range(num_tiles))


def planned_workers(
    op: TiledOp, planned: tuple[int, ...], num_tiles: int, num_workers: int
) -> tuple[int, ...]:
    """As the plan says. A reduce runs where the first of its K-tiles did."""
    if isinstance(op, ReduceOp):
        num_parts = sizes_of(op.parts)[0]
        planned, expected = planned[::num_parts], len(planned) == num_tiles * num_parts
    else:
        expected = len(planned) == num_tiles
    if not expected:
        raise PlanError(f"{op.label.data}: tile_workers does not have one worker for each of its tiles")
    wrong = [worker for worker in planned if not 0 <= worker < num_workers]
    if wrong:
        raise PlanError(f"{op.label.data}: worker {wrong[0]} is not one of {num_workers}")
    return planned
