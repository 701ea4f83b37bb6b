"""Types of the `mk` dialect: sizes, then the element format, as `!mk.rows<576, F32>`.

Stock MLIR tools read them as opaque types of an unregistered dialect.
"""

from collections.abc import Sequence
from typing import ClassVar, Self

from xdsl.dialects.builtin import IntAttr, StringAttr
from xdsl.ir import Attribute, ParametrizedAttribute, TypeAttribute
from xdsl.irdl import irdl_attr_definition
from xdsl.parser import AttrParser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

FLOAT_FORMATS = ("F32", "F16", "BF16")
BLOCK_FORMATS = ("Q4_0", "Q4_1", "Q8_0")
"""Quantized in blocks of `QUANT_BLOCK` along K."""
QUANT_BLOCK = 32
GROUP_FORMATS = ("W4G128", "W8G128")
"""Quantized in groups of 128 along K, the last of which may be short."""
WEIGHT_FORMATS = FLOAT_FORMATS + BLOCK_FORMATS + GROUP_FORMATS


class SizedType(ParametrizedAttribute, TypeAttribute):
    """What all types of the dialect share: positive sizes and a format that the type allows."""

    FORMATS: ClassVar[tuple[str, ...]] = FLOAT_FORMATS

    @classmethod
    def of(cls, *sizes: int, element: str = "F32") -> Self:
        return cls.new([*(IntAttr(size) for size in sizes), StringAttr(element)])

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(size.data for size in self.parameters if isinstance(size, IntAttr))

    @property
    def element(self) -> str:
        last = self.parameters[-1]
        assert isinstance(last, StringAttr)
        return last.data

    def verify(self) -> None:
        if any(size <= 0 for size in self.sizes):
            raise VerifyException(f"{self.name}: sizes must be positive, got {self.sizes}")
        if self.element not in self.FORMATS:
            raise VerifyException(
                f"{self.name}: format {self.element} is not one of {', '.join(self.FORMATS)}"
            )

    @classmethod
    def parse_parameters(cls, parser: AttrParser) -> Sequence[Attribute]:
        sizes: list[Attribute] = []
        with parser.in_angle_brackets():
            while (size := parser.parse_optional_integer(allow_boolean=False)) is not None:
                sizes.append(IntAttr(size))
                parser.parse_punctuation(",")
            sizes.append(StringAttr(parser.parse_identifier()))
        return sizes

    def print_parameters(self, printer: Printer) -> None:
        with printer.in_angle_brackets():
            printer.print_string(", ".join([*(str(size) for size in self.sizes), self.element]))


@irdl_attr_definition
class TokensType(SizedType):
    """A token id a row."""

    name = "mk.tokens"
    FORMATS: ClassVar[tuple[str, ...]] = ("I32",)
    element_format: StringAttr


@irdl_attr_definition
class RowsType(SizedType):
    """Columns of each row of the step."""

    name = "mk.rows"
    columns: IntAttr
    element_format: StringAttr


@irdl_attr_definition
class WeightsType(SizedType):
    """A matrix [out_features, in_features]."""

    name = "mk.weights"
    FORMATS: ClassVar[tuple[str, ...]] = WEIGHT_FORMATS
    out_features: IntAttr
    in_features: IntAttr
    element_format: StringAttr

    def verify(self) -> None:
        super().verify()
        if self.element in BLOCK_FORMATS and self.in_features.data % QUANT_BLOCK:
            raise VerifyException(
                f"mk.weights: {self.element} needs in_features in blocks of {QUANT_BLOCK}, "
                f"got {self.in_features.data}"
            )


@irdl_attr_definition
class VectorType(SizedType):
    """A norm's weight or a bias."""

    name = "mk.vector"
    size: IntAttr
    element_format: StringAttr


@irdl_attr_definition
class KvType(SizedType):
    """One layer's KV: heads and their width, for K and for V alike."""

    name = "mk.kv"
    FORMATS: ClassVar[tuple[str, ...]] = ("F32", "F16")
    heads: IntAttr
    head_dim: IntAttr
    element_format: StringAttr


@irdl_attr_definition
class SplitsType(SizedType):
    """Attention before its splits are combined: by split and head maximum, sum and `head_dim` values."""

    name = "mk.splits"
    heads: IntAttr
    head_dim: IntAttr
    element_format: StringAttr


@irdl_attr_definition
class PartsType(SizedType):
    """K-tiles of a linear op's columns, before they are summed."""

    name = "mk.parts"
    parts: IntAttr
    columns: IntAttr
    element_format: StringAttr


@irdl_attr_definition
class StatsType(SizedType):
    """Maximum, its column and log-sum-exp of each span of columns of the logits."""

    name = "mk.stats"
    spans: IntAttr
    element_format: StringAttr
