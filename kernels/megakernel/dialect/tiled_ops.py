"""Ops as a schedule sees them: each becomes one tile after another on one worker or another.

Passes leave what they decided in attributes: `tile` the tile sizes, `assign` the workers, `barriers` counters
and waits. An op's tiles are in `megakernel.tiles`, which all of them follow.
"""

from collections.abc import Sequence

import numpy as np
from xdsl.dialects.builtin import BytesAttr, DenseArrayBase, IntegerAttr, StringAttr, i32, i64
from xdsl.ir import SSAValue
from xdsl.irdl import (
    AttrSizedOperandSegments,
    AttrSizedResultSegments,
    IRDLOperation,
    attr_def,
    irdl_op_definition,
    operand_def,
    opt_attr_def,
    opt_operand_def,
    opt_result_def,
    result_def,
    var_operand_def,
)

from megakernel.dialect.graph_ops import check, columns_of, size_of, sizes_of
from megakernel.dialect.types import (
    KvType,
    PartsType,
    RowsType,
    SplitsType,
    StatsType,
    TokensType,
    VectorType,
    WeightsType,
)
from megakernel.program import Epilogue, Prologue


def integers(values: Sequence[int]) -> DenseArrayBase:
    """As `DenseArrayBase.from_list` makes it, without its cost an element."""
    return DenseArrayBase(i32, BytesAttr(np.asarray(values, dtype="<i4").tobytes()))


class TiledOp(IRDLOperation):
    """What every op of a schedule carries."""

    label = attr_def(StringAttr)
    """Such as `layers.3.qkv`."""
    tile_columns = opt_attr_def(IntegerAttr)
    """By `tile`: output columns of a tile; of attention, KV heads."""
    num_k_tiles = opt_attr_def(IntegerAttr)
    """By `tile`."""
    workers = opt_attr_def(DenseArrayBase)
    """By `assign`: the worker of each tile, in the order of `megakernel.tiles`."""
    counter = opt_attr_def(IntegerAttr)
    """By `barriers`: what the op's signals arrive at; absent where nobody waits for the op."""
    signals = opt_attr_def(DenseArrayBase)
    """By `barriers`: the tiles that signal."""
    waits = opt_attr_def(DenseArrayBase)
    """By `barriers`: triples of tile, counter, arrivals to wait for."""

    @property
    def role(self) -> str:
        return self.label.data.rpartition(".")[2]

    @property
    def layer(self) -> int:
        """-1 outside the layers."""
        parts = self.label.data.split(".")
        return int(parts[1]) if parts[0] == "layers" else -1

    def decide(self, **decisions: int | Sequence[int]) -> None:
        """Sets a pass's attributes: integers, or lists of them."""
        for name, value in decisions.items():
            self.attributes[name] = IntegerAttr(value, i64) if isinstance(value, int) else integers(value)

    def decided(self, name: str) -> int:
        value = self.attributes[name]
        assert isinstance(value, IntegerAttr)
        return value.value.data

    def decided_list(self, name: str) -> tuple[int, ...]:
        """Empty where the pass left nothing."""
        value = self.attributes.get(name)
        if value is None:
            return ()
        assert isinstance(value, DenseArrayBase)
        return tuple(np.frombuffer(value.data.data, dtype="<i4").tolist())

    def verify_(self) -> None:
        for name in ("workers", "signals", "waits"):
            listed = self.attributes.get(name)
            is_i32 = isinstance(listed, DenseArrayBase) and listed.elt_type == i32
            check(listed is None or is_i32, self, f"{name} of {self.label.data} must be an array of i32")
        for name in ("tile_columns", "num_k_tiles"):
            value = self.attributes.get(name)
            check(
                value is None or (isinstance(value, IntegerAttr) and value.value.data > 0),
                self,
                f"{name} of {self.label.data} must be positive",
            )
        waits = self.decided_list("waits")
        check(len(waits) % 3 == 0, self, f"waits of {self.label.data} are not triples")
        num_tiles = len(self.decided_list("workers"))
        tiles = (*waits[::3], *self.decided_list("signals"))
        check(
            all(0 <= tile < num_tiles for tile in tiles),
            self,
            f"waits or signals of {self.label.data} name a tile beyond its {num_tiles}",
        )
        check(
            bool(self.decided_list("signals")) == (self.counter is not None),
            self,
            f"{self.label.data} must have both counter and signals, or neither",
        )


@irdl_op_definition
class EmbedOp(TiledOp):
    """The embedding's row of each token."""

    name = "mk.embed"
    tokens = operand_def(TokensType)
    table = operand_def(WeightsType)
    result = result_def(RowsType)

    def __init__(self, tokens: SSAValue, table: SSAValue) -> None:
        assert isinstance(table.type, WeightsType)
        columns = table.type.in_features.data
        super().__init__(
            operands=[tokens, table],
            attributes={"label": StringAttr("embed")},
            result_types=[RowsType.of(columns)],
        )

    def verify_(self) -> None:
        super().verify_()
        width, columns = sizes_of(self.table)[1], columns_of(self.result)
        check(width == columns, self, f"a table of width {width} for {columns} result columns")


@irdl_op_definition
class AttentionOp(TiledOp):
    """Of each head, its KV in splits of `split_tokens` positions: see Opcode.ATTENTION."""

    name = "mk.attention"
    queries = operand_def(RowsType)
    kv = operand_def(KvType)
    split_tokens = attr_def(IntegerAttr)
    splits = result_def(SplitsType)

    def __init__(
        self, queries: SSAValue, kv: SSAValue, *, label: str, num_heads: int, split_tokens: int
    ) -> None:
        assert isinstance(kv.type, KvType)
        super().__init__(
            operands=[queries, kv],
            attributes={"label": StringAttr(label), "split_tokens": IntegerAttr(split_tokens, i64)},
            result_types=[SplitsType.of(num_heads, kv.type.head_dim.data)],
        )

    def verify_(self) -> None:
        super().verify_()
        heads, dim = sizes_of(self.splits)
        kv_heads, kv_dim = sizes_of(self.kv)
        columns = columns_of(self.queries)
        check(dim == kv_dim, self, f"queries of head_dim {dim} on KV of head_dim {kv_dim}")
        check(columns == heads * dim, self, f"{columns} query columns for {heads} heads of {dim}")
        check(
            heads % kv_heads == 0,
            self,
            f"{heads} heads cannot share {kv_heads} KV heads evenly (GQA needs a whole ratio)",
        )
        check(self.split_tokens.value.data > 0, self, "split_tokens must be positive")


class LinearTail(TiledOp):
    """What follows the sum of a linear op, whether all of K is summed at once or in K-tiles."""

    epilogue = attr_def(StringAttr)

    def verify_tail(self, outs: int, residual: SSAValue | None, kv: SSAValue | None) -> None:
        epilogue = self.epilogue.data
        check(epilogue in tuple(Epilogue), self, f"unknown epilogue {epilogue}")
        check(
            (residual is not None) == (epilogue == Epilogue.RESIDUAL),
            self,
            "a residual goes with the residual epilogue, and with no other",
        )
        check(
            (kv is not None) == (epilogue == Epilogue.ROPE_APPEND),
            self,
            "KV goes with the rope_append epilogue, and with no other",
        )
        columns = columns_of(self.results[0])
        expected = outs
        if epilogue == Epilogue.SWIGLU:
            expected = outs // 2
        if kv is not None:
            assert isinstance(kv.type, KvType)
            heads, dim = kv.type.sizes
            expected = outs - 2 * heads * dim
        check(columns == expected, self, f"{columns} result columns, {expected} follow from {outs} sums")


@irdl_op_definition
class FusedLinearOp(LinearTail):
    """prologue(input) times all `weights`, through the epilogue: an Op of kind LINEAR."""

    name = "mk.fused_linear"
    irdl_options = (AttrSizedOperandSegments(), AttrSizedResultSegments())
    input = operand_def(RowsType | SplitsType)
    norm = opt_operand_def(VectorType)
    weights = var_operand_def(WeightsType)
    biases = var_operand_def(VectorType)
    head_norms = var_operand_def(VectorType)
    residual = opt_operand_def(RowsType)
    kv = opt_operand_def(KvType)
    prologue = attr_def(StringAttr)
    result = result_def(RowsType)
    kv_result = opt_result_def(KvType)
    stats = opt_result_def(StatsType)

    @property
    def in_features(self) -> int:
        return sizes_of(self.weights[0])[1]

    @property
    def out_features(self) -> int:
        return sum(sizes_of(weight)[0] for weight in self.weights)

    def verify_(self) -> None:
        super().verify_()
        check(bool(self.weights), self, "needs a weight")
        ins = {sizes_of(weight)[1] for weight in self.weights}
        width = input_columns(self.input)
        check(ins == {width}, self, f"weights with in_features {sorted(ins)} for {width} input columns")
        verify_prologue(self, self.prologue.data, self.input, self.norm)
        outs = self.out_features
        biased = sum(size_of(bias) for bias in self.biases)
        check(not self.biases or biased == outs, self, f"biases of {biased} for {outs} sums")
        self.verify_tail(outs, self.residual, self.kv)


@irdl_op_definition
class PartialLinearOp(TiledOp):
    """prologue(input) times the weights, the sums of each K-tile by themselves."""

    name = "mk.partial_linear"
    irdl_options = (AttrSizedOperandSegments(),)
    input = operand_def(RowsType | SplitsType)
    norm = opt_operand_def(VectorType)
    weights = var_operand_def(WeightsType)
    prologue = attr_def(StringAttr)
    parts = result_def(PartsType)

    @property
    def in_features(self) -> int:
        return sizes_of(self.weights[0])[1]

    def verify_(self) -> None:
        super().verify_()
        outs = sum(sizes_of(weight)[0] for weight in self.weights)
        columns = sizes_of(self.parts)[1]
        check(columns == outs, self, f"{columns} result columns for {outs} out_features")
        verify_prologue(self, self.prologue.data, self.input, self.norm)


@irdl_op_definition
class ReduceOp(LinearTail):
    """Sums K-tiles, ascending, through the epilogue."""

    name = "mk.reduce"
    irdl_options = (AttrSizedOperandSegments(), AttrSizedResultSegments())
    parts = operand_def(PartsType)
    biases = var_operand_def(VectorType)
    head_norms = var_operand_def(VectorType)
    residual = opt_operand_def(RowsType)
    kv = opt_operand_def(KvType)
    result = result_def(RowsType)
    kv_result = opt_result_def(KvType)
    stats = opt_result_def(StatsType)

    def verify_(self) -> None:
        super().verify_()
        self.verify_tail(sizes_of(self.parts)[1], self.residual, self.kv)


def input_columns(value: SSAValue) -> int:
    """Columns of rows, or of splits once combined."""
    if isinstance(value.type, SplitsType):
        return value.type.heads.data * value.type.head_dim.data
    return columns_of(value)


def verify_prologue(op: TiledOp, prologue: str, value: SSAValue, norm: SSAValue | None) -> None:
    check(prologue in tuple(Prologue), op, f"unknown prologue {prologue}")
    check(
        (norm is not None) == (prologue == Prologue.RMS_NORM),
        op,
        "a norm weight goes with the rms_norm prologue, and with no other",
    )
    check(
        isinstance(value.type, SplitsType) == (prologue == Prologue.COMBINE),
        op,
        "attention splits go with the combine prologue, and with no other",
    )
