"""How far an op's results may lie from the VM's, element by element, when both have the same input bits.

The VM sums in float64 and rounds once, the kernels sum in float32. Of n roundings on the way to a sum each
is at most EPS of what the sum would be if all its terms were positive: its magnitude. So a sum of products
may be off by n * EPS * magnitude, where n is far less than its terms, as tensor cores and warps share them.
What is rounded to 16 bits before it is multiplied is the same bits in both, but for attention's combined
rows, which are computed: there an element next to the middle of two 16-bit values may be either.

Tolerances are bounds, not measurements: products come to a twentieth of them, what follows to a third. By op:

    EMBED, sums of K-tiles, RESIDUAL of these      none: the same bits
    products, RESIDUAL, LOGITS, K-tiles            roundings of sums, and of RMS norm's scale
    products of COMBINE                            and neighbours in 16 bits of inputs that may be either
    SWIGLU, ROPE_APPEND                            what products' make there, and a few of its own
    K and V                                        the same, before one rounding to float16
    ATTENTION                                      roundings of scores, in the exponential, and of sums

All arrays are float64.
"""

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.program import Op, Opcode, Program, Prologue, split_block
from megakernel.vm_ops import multiplied_as
from megakernel.vm_state import Float64Array, OpMatrix, VmState

EPS = 2.0**-24
"""Half of the distance between 1 and the float32 after it."""
TINIEST = 2.0**-126
_FUNCTION_ROUNDINGS = 8
"""Of exp, log, division or a reciprocal root, and of what goes into it, in units of EPS."""
_WARPS = 8
_TWO_HALVES = 2.0**-22
"""What a number is off by, relatively, as the sum of the float16 next to it and of that next to the rest."""
_HALF_SPACING = 2.0**-24
"""The distance between float16 of the smallest: of numbers so small the rest is off by half of it."""
_OFFSET_REACH = 40.0
"""4-bit numbers are multiplied as 128 + q, and 128 times the scale d comes off again with the input's sum:
both sums are up to (128 + 15) * d * |x|, where a block's largest value is at least 7.5 * d."""


class Input(msgspec.Struct, frozen=True, eq=False):
    """What an op's rows are multiplied as."""

    values: Float64Array
    """[rows, in_features], rounded to 16 bits."""
    spread: Float64Array
    """[rows, in_features] how far the other of two neighbouring 16-bit values is, where it may be either."""
    scale: Float64Array
    """[rows, 1] of rows that are normed; else 1."""


def input_of(state: VmState, op: Op, matrix: OpMatrix) -> Input:
    rows = state.buffers[op.input].astype(np.float64)
    scale = np.ones((len(rows), 1))
    error = np.zeros_like(rows)
    if op.prologue is Prologue.RMS_NORM:
        mean_square = np.mean(rows**2, axis=1, keepdims=True)
        scale = 1 / np.sqrt(mean_square + state.program.geometry.rms_norm_eps)
        rows = (state.buffers[op.input] * state.weights.vector(op.norm)).astype(np.float64)
    elif op.prologue is Prologue.COMBINE:
        rows, error = _combined(state, op)

    def rounded(values: Float64Array) -> Float64Array:
        exact = np.ascontiguousarray(values, np.float32)
        return multiplied_as(exact, matrix.packed_format).astype(np.float64)

    spread = rounded(rows + error) - rounded(rows - error)
    return Input(rounded(rows), spread, scale)


def _combined(state: VmState, op: Op) -> tuple[Float64Array, Float64Array]:
    """Attention's rows, and the error of each: exponentials, sums over splits, a division."""
    geometry = state.program.geometry
    splits = state.buffers[op.input].reshape(
        state.step.num_rows, -1, geometry.num_heads, geometry.head_dim + 2
    )
    weights, sums = np.nan_to_num(splits[..., 0], nan=-np.inf), np.nan_to_num(splits[..., 1])
    values = np.nan_to_num(splits[..., 2:]).astype(np.float64)
    weights = np.exp(weights - weights.max(axis=1, keepdims=True)).astype(np.float64)
    total = (weights * sums).sum(axis=1)[..., None]
    rows = (weights[..., None] * values).sum(axis=1) / total
    magnitude = (weights[..., None] * np.abs(values)).sum(axis=1) / total
    roundings = 3 * _FUNCTION_ROUNDINGS + 2 * splits.shape[1]
    shape = (state.step.num_rows, -1)
    return rows.reshape(shape), (roundings * EPS * magnitude).reshape(shape)


def products(
    source: Input, matrix: OpMatrix, k0: int, k1: int, *, is_normed: bool
) -> tuple[Float64Array, Float64Array]:
    """[rows, out_features] of K [k0, k1), and their tolerances."""
    weights = matrix.values[:, k0:k1].astype(np.float64)
    x, spread = source.values[:, k0:k1], source.spread[:, k0:k1]
    magnitude = np.abs(x) @ _reach(weights, matrix.packed_format).T
    # A warp takes every eighth unit: 4 or 8 matrix instructions, and as many scalings. Then warps are added.
    roundings = 16 * -(-(k1 - k0) // 512) + _WARPS + 4
    if is_normed:  # a mean of squares, all of one sign, and its root
        roundings += _FUNCTION_ROUNDINGS + 24
    tolerances = roundings * EPS * magnitude + spread @ np.abs(weights).T
    return x @ weights.T * source.scale, tolerances * source.scale


def _reach(weights: Float64Array, packed_format: str) -> Float64Array:
    """What roundings of a weight's products are relative to."""
    match packed_format:
        case "Q4_0" | "Q4_1":
            group = 32
        case "W4G128":
            group = 128
        case _:
            return np.abs(weights)
    padded = np.pad(np.abs(weights), ((0, 0), (0, -weights.shape[1] % group)))
    largest = padded.reshape(len(weights), -1, group).max(axis=2)
    return _OFFSET_REACH * np.repeat(largest, group, axis=1)[:, : weights.shape[1]]


def sums(state: VmState, op: Op, opcode: Opcode) -> tuple[Float64Array, Float64Array]:
    """What goes into an op's epilogue, [rows, out_features], and its tolerances. Sums of K-tiles are added in
    one order by both, in float32: they have none."""
    program = state.program
    if opcode is Opcode.REDUCE:
        parts = state.buffers[program.partial_buffers[op.index]]
        by_part = parts.reshape(len(parts), -1, op.out_features)
        total = np.zeros((len(parts), op.out_features), np.float32)
        for part in range(by_part.shape[1]):
            total += by_part[:, part]
        return total.astype(np.float64), np.zeros(total.shape)
    matrix = state.weights.matrix(op, program.swiglu_group)
    source = input_of(state, op, matrix)
    return products(source, matrix, 0, op.in_features, is_normed=op.prologue is Prologue.RMS_NORM)


def residual(results: Float64Array, of_sums: Float64Array) -> Float64Array:
    """Adding to what is there rounds once, wherever that falls."""
    return np.where(of_sums > 0, of_sums + 2 * EPS * np.abs(results), 0)


def swiglu(program: Program, values: Float64Array, of_sums: Float64Array) -> Float64Array:
    """The slope of silu is at most 1.1; an exponential, a division and a product round."""
    pairs = [array.reshape(len(array), -1, 2, program.swiglu_group) for array in (values, of_sums)]
    (gate, up), (of_gate, of_up) = ((pair[:, :, 0], pair[:, :, 1]) for pair in pairs)
    gated = gate / (1 + np.exp(-gate))
    tolerances = (
        1.1 * of_gate * (np.abs(up) + of_up)
        + of_up * np.abs(gated)
        + 2 * _FUNCTION_ROUNDINGS * EPS * (1 + np.abs(gate)) * np.abs(gated * up)
    )
    return tolerances.reshape(len(values), -1)


def rounded(values: Float64Array, tolerances: Float64Array, format: str) -> Float64Array:
    """Once more to 16 bits, as matrices of that format are multiplied by."""
    half_a_step, smallest = (2.0**-11, 2.0**-25) if format == "F16" else (2.0**-8, 2.0**-134)
    return tolerances + half_a_step * (np.abs(values) + tolerances) + smallest


def rotated(state: VmState, op: Op, values: Float64Array, of_sums: Float64Array) -> Float64Array:
    """[rows, Q columns then K and V]: bias and norm of a head, then each element turns with its partner."""
    geometry, dim = state.program.geometry, state.program.geometry.head_dim
    if op.biases:
        values = values + state.weights.bias(op)
        of_sums = of_sums + EPS * np.abs(values)
    x, error = (array.reshape(len(values), -1, dim) for array in (values, of_sums))
    num_keys = geometry.num_heads + geometry.num_kv_heads
    if op.head_norms:
        mean_square = (x**2).mean(axis=2, keepdims=True) + geometry.rms_norm_eps
        of_scale = (np.abs(x) * error).mean(axis=2, keepdims=True) / mean_square
        of_scale = of_scale + (_FUNCTION_ROUNDINGS + dim / 8) * EPS
        norms = np.ones((num_keys + geometry.num_kv_heads, dim))
        norms[: geometry.num_heads] = state.weights.vector(op.head_norms[0])
        norms[geometry.num_heads : num_keys] = state.weights.vector(op.head_norms[1])
        scale = np.abs(norms) / np.sqrt(mean_square)
        has_norm = np.arange(len(norms))[:, None] < num_keys
        error = np.where(has_norm, scale * (error + np.abs(x) * of_scale), error)
        x = np.where(has_norm, scale * x, x)
    partner = np.roll(np.arange(dim), dim // 2)
    turned = error + error[:, :, partner] + 4 * EPS * (np.abs(x) + np.abs(x[:, :, partner]))
    is_value = np.arange(x.shape[1])[:, None] >= num_keys
    error = np.where(is_value, error, turned)
    error[:, : geometry.num_heads] *= dim**-0.5
    error[:, : geometry.num_heads] += 2 * EPS * np.abs(x[:, : geometry.num_heads]) * dim**-0.5
    return error.reshape(len(values), -1) + TINIEST


def attended(state: VmState, op: Op) -> npt.NDArray[np.float64]:
    """[rows, attention columns]. A score is a sum over head_dim, of queries as two float16; what it and the
    maximum are off by moves its exponential in the ratio. Then 128 tokens are summed, by warps, weighted by
    exponentials as two float16."""
    program, geometry = state.program, state.program.geometry
    dim, group = geometry.head_dim, geometry.num_heads // geometry.num_kv_heads
    rows, heads = state.step.num_rows, geometry.num_heads
    tolerances = np.zeros((rows, program.buffers[op.output].columns // (heads * (dim + 2)), heads, dim + 2))
    queries = state.buffers[op.input].reshape(rows, geometry.num_kv_heads, group, dim).astype(np.float64)
    for row, slots in enumerate(state.key_slots):
        for split, start in enumerate(range(0, len(slots), program.split_tokens)):
            own = state.kv.layers[op.layer][slots[start : start + program.split_tokens]]
            keys, values = (
                own.reshape(len(own), 2, geometry.num_kv_heads, dim).astype(np.float64).swapaxes(0, 1)
            )
            scores = np.einsum("hgd,thd->hgt", queries[row], keys)
            magnitudes = np.einsum("hgd,thd->hgt", np.abs(queries[row]), np.abs(keys)).max(axis=2)
            least = _HALF_SPACING / 2 * np.abs(keys).sum(axis=2).max(axis=0)[:, None]
            of_score = (8 + 5) * EPS * magnitudes + _TWO_HALVES * magnitudes + least
            weights = np.exp(scores - scores.max(axis=2, keepdims=True))
            relative = 2 * of_score + (2 * _FUNCTION_ROUNDINGS + 16 + 5 + 2 * _WARPS) * EPS + _TWO_HALVES
            mixed = np.einsum("hgt,thd->hgd", weights, np.abs(values))
            block = split_block(program, row, split)
            to = tolerances[row, block].reshape(geometry.num_kv_heads, group, dim + 2)
            to[:, :, 0] = of_score
            to[:, :, 1] = relative * weights.sum(axis=2)
            to[:, :, 2:] = relative[:, :, None] * mixed
    return tolerances.reshape(rows, -1)


def log_sums(values: Float64Array, num_terms: int) -> Float64Array:
    """Of a log-sum-exp: as many exponentials summed, a logarithm, the maximum added."""
    return (num_terms + 2 * _FUNCTION_ROUNDINGS) * EPS * (1 + np.abs(values))
