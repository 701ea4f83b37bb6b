"""fuse: norms, combines, RoPE, KV append, SwiGLU, residuals and statistics go into the linear op beside them.

What is left runs as one wave of tiles an op: embed; then qkv, attention, o, gate_up and down a layer; head.
"""

from collections.abc import Sequence

from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.pattern_rewriter import (
    GreedyRewritePatternApplier,
    PatternRewriter,
    PatternRewriteWalker,
    RewritePattern,
    op_type_rewrite_pattern,
)

from megakernel.dialect.graph_ops import (
    AddOp,
    CombineOp,
    HeadNormOp,
    HeadStatsOp,
    KvAppendOp,
    LinearOp,
    RmsNormOp,
    RopeOp,
    SwigluOp,
    label_of,
)
from megakernel.dialect.tiled_ops import AttentionOp, FusedLinearOp
from megakernel.passes.context import PassContext
from megakernel.program import Epilogue, Prologue


def fused_linear(
    label: str,
    source: SSAValue,
    weights: Sequence[SSAValue],
    epilogue: Epilogue,
    *,
    result: Attribute,
    biases: Sequence[SSAValue] = (),
    head_norms: Sequence[SSAValue] = (),
    residual: SSAValue | None = None,
    kv: SSAValue | None = None,
    stats: Attribute | None = None,
) -> FusedLinearOp:
    """Takes in the norm or the combine that `source` comes from, where it comes from one."""
    norm: SSAValue | None = None
    prologue = Prologue.NONE
    owner = source.owner
    if isinstance(owner, RmsNormOp):
        source, norm, prologue = owner.rows, owner.weight, Prologue.RMS_NORM
    elif isinstance(owner, CombineOp):
        source, prologue = owner.splits, Prologue.COMBINE
    return FusedLinearOp.build(
        operands=[source, norm, weights, biases, head_norms, residual, kv],
        attributes={
            "label": StringAttr(label),
            "prologue": StringAttr(prologue.value),
            "epilogue": StringAttr(epilogue.value),
        },
        result_types=[result, kv.type if kv is not None else None, stats],
    )


def role_label(weight: SSAValue, role: str) -> str:
    """`layers.3.q` and `qkv` -> `layers.3.qkv`."""
    prefix, dot, _ = label_of(weight).rpartition(".")
    return f"{prefix}{dot}{role}"


def linear_behind(value: SSAValue) -> LinearOp | None:
    return value.owner if isinstance(value.owner, LinearOp) else None


def head_norm_behind(value: SSAValue) -> HeadNormOp | None:
    return value.owner if isinstance(value.owner, HeadNormOp) else None


def erase_unused(rewriter: PatternRewriter, ops: Sequence[Operation | None]) -> None:
    """Erases those, in this order, that nothing uses any more."""
    for op in ops:
        if op is not None and not any(result.uses for result in op.results):
            rewriter.erase(op)


def rope_of(value: SSAValue) -> RopeOp | None:
    return value.owner if isinstance(value.owner, RopeOp) else None


class FuseQkv(RewritePattern):
    """Q, K and V of a layer, with their bias, head norms and RoPE, and the append of K and V."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: AttentionOp, rewriter: PatternRewriter) -> None:
        append = op.kv.owner
        if not isinstance(append, KvAppendOp):
            return
        q_rope, k_rope = rope_of(op.queries), rope_of(append.keys)
        if q_rope is None or k_rope is None:
            return
        q_norm, k_norm = head_norm_behind(q_rope.rows), head_norm_behind(k_rope.rows)
        query = linear_behind(q_norm.rows if q_norm else q_rope.rows)
        key = linear_behind(k_norm.rows if k_norm else k_rope.rows)
        value = linear_behind(append.values)
        if query is None or key is None or value is None or not query.rows == key.rows == value.rows:
            return
        projections = (query, key, value)
        fused = fused_linear(
            role_label(query.weight, "qkv"),
            query.rows,
            [linear.weight for linear in projections],
            Epilogue.ROPE_APPEND,
            result=op.queries.type,
            biases=[linear.bias for linear in projections if linear.bias is not None],
            head_norms=[norm.weight for norm in (q_norm, k_norm) if norm is not None],
            kv=append.kv,
        )
        assert fused.kv_result is not None
        normed = query.rows.owner
        rewriter.insert(fused)
        op.operands[0], op.operands[1] = fused.result, fused.kv_result
        rewriter.notify_op_modified(op)
        behind = (append, q_rope, k_rope, q_norm, k_norm, *projections)
        erase_unused(rewriter, [*behind, normed if isinstance(normed, RmsNormOp) else None])


class FuseSwiglu(RewritePattern):
    """Gate and up, alternating, with the SwiGLU of their columns."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: SwigluOp, rewriter: PatternRewriter) -> None:
        gate, up = linear_behind(op.gate), linear_behind(op.up)
        if gate is None or up is None or gate.rows != up.rows:
            return
        source = gate.rows
        fused = fused_linear(
            role_label(gate.weight, "gate_up"),
            source,
            [gate.weight, up.weight],
            Epilogue.SWIGLU,
            result=op.result.type,
        )
        rewriter.replace(op, fused, [fused.result])
        erase_unused(rewriter, [gate, up, _prologue_of(source)])


class FuseResidual(RewritePattern):
    """A linear op with the residual that it is added to."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: AddOp, rewriter: PatternRewriter) -> None:
        update = linear_behind(op.update)
        if update is None:
            return
        source = update.rows
        fused = fused_linear(
            label_of(update.weight),
            source,
            [update.weight],
            Epilogue.RESIDUAL,
            result=op.result.type,
            residual=op.hidden,
        )
        rewriter.replace(op, fused, [fused.result])
        erase_unused(rewriter, [update, _prologue_of(source)])


class FuseHead(RewritePattern):
    """The head with its statistics."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: HeadStatsOp, rewriter: PatternRewriter) -> None:
        head = linear_behind(op.logits)
        if head is None:
            return
        source = head.rows
        fused = fused_linear(
            "head",
            source,
            [head.weight],
            Epilogue.LOGITS,
            result=head.result.type,
            stats=op.stats.type,
        )
        assert fused.stats is not None
        rewriter.replace(op, fused, [fused.stats])
        rewriter.replace(head, [], [fused.result])
        erase_unused(rewriter, [_prologue_of(source)])


def _prologue_of(source: SSAValue) -> Operation | None:
    return source.owner if isinstance(source.owner, RmsNormOp | CombineOp) else None


def fuse(module: ModuleOp, context: PassContext | None = None) -> None:  # noqa: ARG001 (one signature)
    patterns = GreedyRewritePatternApplier([FuseQkv(), FuseSwiglu(), FuseResidual(), FuseHead()])
    PatternRewriteWalker(patterns, apply_recursively=False).rewrite_module(module)
