"""Bytes of weights and activations by format: what memory planning and the cost model have in common."""

from collections.abc import Mapping

from megakernel.program import Epilogue, Geometry, Op, OpKind

WEIGHT_BITS: Mapping[str, float] = {
    "Q4_0": 4.5,
    "Q4_1": 5.0,
    "Q8_0": 8.5,
    "W4G128": 4.25,
    "W8G128": 8.125,
    "BF16": 16.0,
    "F16": 16.0,
    "F32": 32.0,
}
"""Bits a weight, scales and offsets included."""

QUANTIZED = frozenset({"Q4_0", "Q4_1", "Q8_0", "W4G128", "W8G128"})
QUANTIZED_ACTIVATION_BITS = 9.0
"""int8 and one float32 scale a block of 32."""
FLOAT_ACTIVATION_BITS = 32.0


class UnknownFormatError(ValueError):
    """A weight format without a known size; names the weight and what is known."""


def format_of(name: str, formats: Mapping[str, str] | None) -> str:
    """The stored format of a weight; what a Q4_1 file usually holds where `formats` does not say."""
    stored = (formats or {}).get(name) or _usual_format(name)
    if stored not in WEIGHT_BITS:
        raise UnknownFormatError(f"weight {name} is {stored}; sizes are known of {', '.join(WEIGHT_BITS)}")
    return stored


def _usual_format(name: str) -> str:
    if name.endswith(("norm", "bias")):
        return "F32"
    return "Q8_0" if name in ("embed", "head") else "Q4_1"


def op_formats(op: Op, formats: Mapping[str, str] | None) -> tuple[str, ...]:
    """Format of each of an op's weights. An embedding op reads `embed`."""
    return tuple(format_of(name, formats) for name in op.weights or _implied_weights(op))


def _implied_weights(op: Op) -> tuple[str, ...]:
    return ("embed",) if op.kind is OpKind.EMBED else ()


def column_bits(op: Op, geometry: Geometry, stored: tuple[str, ...], n0: int, n1: int) -> float:
    """Bits of one K element summed over the op's columns [n0, n1)."""
    bits = [WEIGHT_BITS[name] for name in stored]
    if op.epilogue is Epilogue.ROPE_APPEND and len(bits) == 3:
        q_columns = geometry.num_heads * geometry.head_dim
        kv_columns = geometry.num_kv_heads * geometry.head_dim
        bounds = (0, q_columns, q_columns + kv_columns, q_columns + 2 * kv_columns)
        overlaps = (max(0, min(n1, bounds[i + 1]) - max(n0, bounds[i])) * bits[i] for i in range(len(bits)))
        return sum(overlaps)
    return (n1 - n0) * sum(bits) / len(bits) if bits else 0.0


def activation_bits(stored: tuple[str, ...]) -> float:
    """Bits of an input element as it is multiplied: quantized where the weights are."""
    return QUANTIZED_ACTIVATION_BITS if set(stored) <= QUANTIZED else FLOAT_ACTIVATION_BITS
