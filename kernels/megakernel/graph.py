"""A model's shape -> its decode step as a graph in the `mk` dialect, unfused."""

from collections.abc import Mapping
from types import MappingProxyType

from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Block, Operation, Region, SSAValue

from megakernel.cuda_constants import STATS_SPAN
from megakernel.dialect.graph_ops import (
    AddOp,
    CombineOp,
    HeadNormOp,
    HeadStatsOp,
    KvAppendOp,
    KvOp,
    LinearOp,
    OutputOp,
    RmsNormOp,
    RopeOp,
    SwigluOp,
    TokensOp,
    VectorOp,
    WeightOp,
)
from megakernel.dialect.tiled_ops import AttentionOp, EmbedOp
from megakernel.dialect.types import (
    BLOCK_FORMATS,
    QUANT_BLOCK,
    WEIGHT_FORMATS,
    KvType,
    VectorType,
    WeightsType,
)
from megakernel.model.names import expected_shapes
from megakernel.model.shape import ModelShape
from megakernel.weight_formats import format_of

SWIGLU_GROUP = 16
STATS_SPANS: Mapping[str, int] = MappingProxyType({"cpu": 256, "cuda": STATS_SPAN})
"""By kind of machine: columns of the head that share statistics, and so a tile."""
DEFAULT_SPLIT_TOKENS = 128


class GraphError(ValueError):
    """A model the compiler cannot take: says which number is in the way and what would do."""


def build_graph(
    shape: ModelShape,
    formats: Mapping[str, str],
    *,
    split_tokens: int = DEFAULT_SPLIT_TOKENS,
    kv_format: str = "F16",
    stats_span: int = STATS_SPANS["cpu"],
) -> ModuleOp:
    """`formats` by weight name, matrices at least. Raises GraphError."""
    check_shape(shape, split_tokens)
    check_formats(shape, formats)
    builder = _Builder(shape, formats, split_tokens, kv_format, stats_span)
    builder.build()
    return builder.module


def uniform_formats(shape: ModelShape, matrix_format: str) -> dict[str, str]:
    """All matrices in one format, vectors in F32."""
    return {name: matrix_format if len(size) > 1 else "F32" for name, size in expected_shapes(shape).items()}


def usual_formats(shape: ModelShape) -> dict[str, str]:
    """What a Q4_1 file usually holds, where nothing better is known; F32 where blocks would not fit."""
    return {
        name: "F32" if size[-1] % QUANT_BLOCK else format_of(name, None)
        for name, size in expected_shapes(shape).items()
    }


def check_shape(shape: ModelShape, split_tokens: int) -> None:
    for name in (
        "num_layers",
        "hidden_size",
        "intermediate_size",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "vocab_size",
        "max_context_tokens",
    ):
        if getattr(shape, name) <= 0:
            raise GraphError(f"{name} must be positive, got {getattr(shape, name)}")
    if shape.num_heads % shape.num_kv_heads:
        raise GraphError(f"{shape.num_heads} heads cannot share {shape.num_kv_heads} KV heads evenly")
    if shape.head_dim % 2:
        raise GraphError(f"head_dim must be even for RoPE, got {shape.head_dim}")
    if shape.intermediate_size % SWIGLU_GROUP:
        raise GraphError(
            f"intermediate_size must be a multiple of {SWIGLU_GROUP}, got {shape.intermediate_size}"
        )
    if split_tokens <= 0:
        raise GraphError(f"split_tokens must be positive, got {split_tokens}")


def check_formats(shape: ModelShape, formats: Mapping[str, str]) -> None:
    for name, size in expected_shapes(shape).items():
        if len(size) == 1:
            continue
        if name not in formats:
            raise GraphError(f"no format is given for weight {name}")
        if formats[name] not in WEIGHT_FORMATS:
            raise GraphError(f"weight {name} is {formats[name]}; supported are {', '.join(WEIGHT_FORMATS)}")
        if formats[name] in BLOCK_FORMATS and size[1] % QUANT_BLOCK:
            raise GraphError(
                f"weight {name} is {formats[name]}, which needs in_features in blocks of {QUANT_BLOCK}, "
                f"got {size[1]}"
            )


class _Builder:
    """Appends ops to one module."""

    def __init__(
        self,
        shape: ModelShape,
        formats: Mapping[str, str],
        split_tokens: int,
        kv_format: str,
        stats_span: int,
    ) -> None:
        self.shape = shape
        self.formats = formats
        self.split_tokens = split_tokens
        self.stats_span = stats_span
        self.kv_type = KvType.of(shape.num_kv_heads, shape.head_dim, element=kv_format)
        self.sizes = expected_shapes(shape)
        self.block = Block()
        self.module = ModuleOp(Region(self.block))

    def build(self) -> None:
        tokens = self._add(TokensOp())
        table = self._matrix("embed")
        hidden = self._add(EmbedOp(tokens, table))
        for layer in range(self.shape.num_layers):
            hidden = self._attention_half(f"layers.{layer}", layer, hidden)
            hidden = self._mlp_half(f"layers.{layer}", hidden)
        normed = self._norm(hidden, "final_norm")
        head = table if self.shape.has_tied_head else self._matrix("head")
        logits = self._add(LinearOp(normed, head))
        stats = self._add(HeadStatsOp(logits, self.stats_span))
        self.block.add_op(OutputOp([logits, stats]))

    def _attention_half(self, prefix: str, layer: int, hidden: SSAValue) -> SSAValue:
        shape = self.shape
        normed = self._norm(hidden, f"{prefix}.attn_norm")
        queries = self._rotated(self._project(normed, prefix, "q"), prefix, "q", shape.head_dim**-0.5)
        keys = self._rotated(self._project(normed, prefix, "k"), prefix, "k", 1.0)
        values = self._project(normed, prefix, "v")
        kv = self._add(KvOp(layer, self.kv_type))
        appended = self._add(KvAppendOp(keys, values, kv))
        splits = self._add(
            AttentionOp(
                queries,
                appended,
                label=f"{prefix}.attention",
                num_heads=shape.num_heads,
                split_tokens=self.split_tokens,
            )
        )
        combined = self._add(CombineOp(splits))
        return self._add(AddOp(hidden, self._add(LinearOp(combined, self._matrix(f"{prefix}.o")))))

    def _mlp_half(self, prefix: str, hidden: SSAValue) -> SSAValue:
        normed = self._norm(hidden, f"{prefix}.mlp_norm")
        gate = self._add(LinearOp(normed, self._matrix(f"{prefix}.gate")))
        up = self._add(LinearOp(normed, self._matrix(f"{prefix}.up")))
        mixed = self._add(SwigluOp(gate, up))
        return self._add(AddOp(hidden, self._add(LinearOp(mixed, self._matrix(f"{prefix}.down")))))

    def _project(self, normed: SSAValue, prefix: str, which: str) -> SSAValue:
        bias = self._vector(f"{prefix}.{which}_bias") if self.shape.has_qkv_bias else None
        return self._add(LinearOp(normed, self._matrix(f"{prefix}.{which}"), bias))

    def _rotated(self, rows: SSAValue, prefix: str, which: str, scale: float) -> SSAValue:
        if self.shape.has_qk_norm:
            weight = self._vector(f"{prefix}.{which}_norm")
            rows = self._add(HeadNormOp(rows, weight, self.shape.rms_norm_eps))
        return self._add(RopeOp(rows, self.shape.head_dim, scale))

    def _norm(self, rows: SSAValue, name: str) -> SSAValue:
        return self._add(RmsNormOp(rows, self._vector(name), self.shape.rms_norm_eps))

    def _matrix(self, name: str) -> SSAValue:
        return self._add(WeightOp(name, WeightsType.of(*self.sizes[name], element=self.formats[name])))

    def _vector(self, name: str) -> SSAValue:
        """Norm weights and biases are float32 in the packed weights, whatever the file has."""
        return self._add(VectorOp(name, VectorType.of(*self.sizes[name])))

    def _add(self, op: Operation) -> SSAValue:
        self.block.add_op(op)
        return op.results[0]
