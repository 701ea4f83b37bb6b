"""k-split: a linear op with several K-tiles becomes their partial sums, and a reduce with the epilogue.

The split halves what a tile needs of scratch memory, or gives work to more workers, for one more wave.
"""

from xdsl.dialects.builtin import ModuleOp
from xdsl.pattern_rewriter import (
    PatternRewriter,
    PatternRewriteWalker,
    RewritePattern,
    op_type_rewrite_pattern,
)

from megakernel.dialect.tiled_ops import FusedLinearOp, PartialLinearOp, ReduceOp
from megakernel.dialect.types import PartsType
from megakernel.passes.context import PassContext


def partial_of(op: FusedLinearOp) -> PartialLinearOp:
    """The sums of K-tiles, before the epilogue."""
    return PartialLinearOp.build(
        operands=[op.input, op.norm, op.weights],
        attributes={
            "label": op.label,
            "prologue": op.prologue,
            "tile_columns": op.attributes["tile_columns"],
            "num_k_tiles": op.attributes["num_k_tiles"],
        },
        result_types=[PartsType.of(op.decided("num_k_tiles"), op.out_features)],
    )


def reduce_of(op: FusedLinearOp, partial: PartialLinearOp) -> ReduceOp:
    """The sum of K-tiles, through the epilogue."""
    return ReduceOp.build(
        operands=[partial.parts, op.biases, op.head_norms, op.residual, op.kv],
        attributes={
            "label": op.label,
            "epilogue": op.epilogue,
            "tile_columns": op.attributes["tile_columns"],
            "num_k_tiles": op.attributes["num_k_tiles"],
        },
        result_types=[
            op.result.type,
            op.kv_result.type if op.kv_result is not None else None,
            op.stats.type if op.stats is not None else None,
        ],
    )


class SplitK(RewritePattern):
    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: FusedLinearOp, rewriter: PatternRewriter) -> None:
        if op.decided("num_k_tiles") == 1:
            return
        partial = partial_of(op)
        reduce = reduce_of(op, partial)
        rewriter.replace(op, [partial, reduce], list(reduce.results))


def k_split(module: ModuleOp, context: PassContext) -> None:
    if any(plan.num_k_tiles > 1 for plan in context.plan.ops.values()):
        PatternRewriteWalker(SplitK(), apply_recursively=False).rewrite_module(module)
