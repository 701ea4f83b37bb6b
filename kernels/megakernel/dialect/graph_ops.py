"""Ops of the graph as a model defines it, before fusion. All work on every row of the step."""

from collections.abc import Sequence

from xdsl.dialects.builtin import FloatAttr, IntegerAttr, StringAttr, f64, i64
from xdsl.ir import Operation, SSAValue
from xdsl.irdl import (
    IRDLOperation,
    attr_def,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    result_def,
    var_operand_def,
)
from xdsl.utils.exceptions import VerifyException

from megakernel.dialect.types import (
    KvType,
    RowsType,
    SizedType,
    SplitsType,
    StatsType,
    TokensType,
    VectorType,
    WeightsType,
)


def columns_of(value: SSAValue) -> int:
    """Columns of a value that is known to be rows."""
    assert isinstance(value.type, RowsType)
    return value.type.columns.data


def sizes_of(value: SSAValue) -> tuple[int, ...]:
    assert isinstance(value.type, SizedType)
    return value.type.sizes


def size_of(value: SSAValue) -> int:
    """Of a value whose type has one size."""
    (size,) = sizes_of(value)
    return size


def label_of(weight: SSAValue) -> str:
    """The name of a weight or vector that a `mk.weight` or `mk.vector` op defines."""
    assert isinstance(weight.owner, WeightOp | VectorOp)
    return weight.owner.label.data


def check(is_met: bool, op: Operation, message: str) -> None:
    if not is_met:
        raise VerifyException(f"{op.name}: {message}")


@irdl_op_definition
class TokensOp(IRDLOperation):
    """The step's token ids."""

    name = "mk.tokens"
    tokens = result_def(TokensType)

    def __init__(self) -> None:
        super().__init__(result_types=[TokensType.of(element="I32")])


@irdl_op_definition
class WeightOp(IRDLOperation):
    """A matrix, by its name in `megakernel.model.weights`."""

    name = "mk.weight"
    label = attr_def(StringAttr)
    weight = result_def(WeightsType)

    def __init__(self, label: str, type: WeightsType) -> None:
        super().__init__(attributes={"label": StringAttr(label)}, result_types=[type])


@irdl_op_definition
class VectorOp(IRDLOperation):
    """A norm's weight or a bias, by its name in `megakernel.model.weights`."""

    name = "mk.vector"
    label = attr_def(StringAttr)
    vector = result_def(VectorType)

    def __init__(self, label: str, type: VectorType) -> None:
        super().__init__(attributes={"label": StringAttr(label)}, result_types=[type])


@irdl_op_definition
class KvOp(IRDLOperation):
    """A layer's KV pool as the step finds it."""

    name = "mk.kv"
    layer = attr_def(IntegerAttr)
    kv = result_def(KvType)

    def __init__(self, layer: int, type: KvType) -> None:
        super().__init__(attributes={"layer": IntegerAttr(layer, i64)}, result_types=[type])


@irdl_op_definition
class RmsNormOp(IRDLOperation):
    """x / sqrt(mean(x * x) + epsilon) * weight, over all columns."""

    name = "mk.rms_norm"
    rows = operand_def(RowsType)
    weight = operand_def(VectorType)
    epsilon = attr_def(FloatAttr)
    result = result_def(RowsType)

    def __init__(self, rows: SSAValue, weight: SSAValue, epsilon: float) -> None:
        super().__init__(
            operands=[rows, weight],
            attributes={"epsilon": FloatAttr(epsilon, f64)},
            result_types=[rows.type],
        )

    def verify_(self) -> None:
        check(self.rows.type == self.result.type, self, "result type differs from its input's")
        weight, columns = size_of(self.weight), columns_of(self.rows)
        check(weight == columns, self, f"a weight of {weight} for {columns} columns")


@irdl_op_definition
class HeadNormOp(IRDLOperation):
    """RMS norm of each head by itself, all with one weight (QK norm)."""

    name = "mk.head_norm"
    rows = operand_def(RowsType)
    weight = operand_def(VectorType)
    epsilon = attr_def(FloatAttr)
    result = result_def(RowsType)

    def __init__(self, rows: SSAValue, weight: SSAValue, epsilon: float) -> None:
        super().__init__(
            operands=[rows, weight],
            attributes={"epsilon": FloatAttr(epsilon, f64)},
            result_types=[rows.type],
        )

    def verify_(self) -> None:
        check(self.rows.type == self.result.type, self, "result type differs from its input's")
        dim, columns = size_of(self.weight), columns_of(self.rows)
        check(columns % dim == 0, self, f"{columns} columns are not whole heads of {dim}")


@irdl_op_definition
class LinearOp(IRDLOperation):
    """rows times the transposed weight, plus the bias where there is one."""

    name = "mk.linear"
    rows = operand_def(RowsType)
    weight = operand_def(WeightsType)
    bias = opt_operand_def(VectorType)
    result = result_def(RowsType)

    def __init__(self, rows: SSAValue, weight: SSAValue, bias: SSAValue | None = None) -> None:
        assert isinstance(weight.type, WeightsType)
        columns = weight.type.out_features.data
        super().__init__(operands=[rows, weight, bias], result_types=[RowsType.of(columns)])

    def verify_(self) -> None:
        outs, ins = sizes_of(self.weight)
        columns = columns_of(self.rows)
        check(ins == columns, self, f"a weight with {ins} in_features for {columns} input columns")
        results = columns_of(self.result)
        check(outs == results, self, f"a weight with {outs} out_features for {results} result columns")
        if self.bias is not None:
            size = size_of(self.bias)
            check(size == outs, self, f"a bias of {size} for {outs} result columns")


@irdl_op_definition
class RopeOp(IRDLOperation):
    """Rotates each head by its row's position ("rotate half" order), then scales."""

    name = "mk.rope"
    rows = operand_def(RowsType)
    head_dim = attr_def(IntegerAttr)
    scale = attr_def(FloatAttr)
    result = result_def(RowsType)

    def __init__(self, rows: SSAValue, head_dim: int, scale: float) -> None:
        super().__init__(
            operands=[rows],
            attributes={"head_dim": IntegerAttr(head_dim, i64), "scale": FloatAttr(scale, f64)},
            result_types=[rows.type],
        )

    def verify_(self) -> None:
        check(self.rows.type == self.result.type, self, "result type differs from its input's")
        dim, columns = self.head_dim.value.data, columns_of(self.rows)
        check(dim > 0 and dim % 2 == 0, self, f"head_dim must be even, got {dim}")
        check(columns % dim == 0, self, f"{columns} columns are not whole heads of {dim}")


@irdl_op_definition
class KvAppendOp(IRDLOperation):
    """The layer's KV with the rows' keys and values in their slots."""

    name = "mk.kv_append"
    keys = operand_def(RowsType)
    values = operand_def(RowsType)
    kv = operand_def(KvType)
    result = result_def(KvType)

    def __init__(self, keys: SSAValue, values: SSAValue, kv: SSAValue) -> None:
        super().__init__(operands=[keys, values, kv], result_types=[kv.type])

    def verify_(self) -> None:
        check(self.kv.type == self.result.type, self, "result type differs from its KV's")
        heads, dim = sizes_of(self.kv)
        for what, rows in (("keys", self.keys), ("values", self.values)):
            columns = columns_of(rows)
            check(columns == heads * dim, self, f"{columns} columns of {what} for {heads} heads of {dim}")


@irdl_op_definition
class CombineOp(IRDLOperation):
    """Merges each head's splits, ascending."""

    name = "mk.combine"
    splits = operand_def(SplitsType)
    result = result_def(RowsType)

    def __init__(self, splits: SSAValue) -> None:
        assert isinstance(splits.type, SplitsType)
        heads, dim = splits.type.sizes
        super().__init__(operands=[splits], result_types=[RowsType.of(heads * dim)])

    def verify_(self) -> None:
        heads, dim = sizes_of(self.splits)
        columns = columns_of(self.result)
        check(columns == heads * dim, self, f"{columns} result columns for {heads} heads of {dim}")


@irdl_op_definition
class AddOp(IRDLOperation):
    """The residual: hidden + update."""

    name = "mk.add"
    hidden = operand_def(RowsType)
    update = operand_def(RowsType)
    result = result_def(RowsType)

    def __init__(self, hidden: SSAValue, update: SSAValue) -> None:
        super().__init__(operands=[hidden, update], result_types=[hidden.type])

    def verify_(self) -> None:
        check(
            self.hidden.type == self.update.type == self.result.type,
            self,
            f"{columns_of(self.hidden)} columns plus {columns_of(self.update)} "
            f"into {columns_of(self.result)}",
        )


@irdl_op_definition
class SwigluOp(IRDLOperation):
    """silu(gate) * up."""

    name = "mk.swiglu"
    gate = operand_def(RowsType)
    up = operand_def(RowsType)
    result = result_def(RowsType)

    def __init__(self, gate: SSAValue, up: SSAValue) -> None:
        super().__init__(operands=[gate, up], result_types=[gate.type])

    def verify_(self) -> None:
        check(
            self.gate.type == self.up.type == self.result.type,
            self,
            f"{columns_of(self.gate)} gate and {columns_of(self.up)} up columns "
            f"into {columns_of(self.result)}",
        )


@irdl_op_definition
class HeadStatsOp(IRDLOperation):
    """Maximum, its column and log-sum-exp of every `span` columns."""

    name = "mk.head_stats"
    logits = operand_def(RowsType)
    span = attr_def(IntegerAttr)
    stats = result_def(StatsType)

    def __init__(self, logits: SSAValue, span: int) -> None:
        spans = -(-columns_of(logits) // span)
        super().__init__(
            operands=[logits],
            attributes={"span": IntegerAttr(span, i64)},
            result_types=[StatsType.of(spans)],
        )

    def verify_(self) -> None:
        span, columns = self.span.value.data, columns_of(self.logits)
        spans = size_of(self.stats)
        check(
            span > 0 and spans == -(-columns // span), self, f"{spans} spans of {span} for {columns} columns"
        )


@irdl_op_definition
class OutputOp(IRDLOperation):
    """What the step gives back."""

    name = "mk.output"
    values = var_operand_def()

    def __init__(self, values: Sequence[SSAValue]) -> None:
        super().__init__(operands=[values])

    def verify_(self) -> None:
        types = [type(value.type) for value in self.values]
        check(types == [RowsType, StatsType], self, "needs logits (mk.rows), then their stats (mk.stats)")
