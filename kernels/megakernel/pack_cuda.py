"""Weights in the order that tensor cores read them: column group by column group, of each unit by unit of K.

A lane of a warp finds what it multiplies in 16 contiguous bytes a time, without a detour: the layout is that
of the fragments of m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16") for weights as the A operand.
Lane l has g = l / 4, t = l % 4; of the 16 columns n and `unit_k` elements k of a unit it holds, for step s,
register i (a0 .. a3) and element e (low half, high half):

    n = g + 8 * (i & 1)        k = 32 * (s / 2) + 8 * t + 4 * (s % 2) + 2 * (i >> 1) + e

The order of K within 32 is the layout's own: so a lane's activations of two steps are 8 neighbours. A unit is
the numbers, then the scales:

    Q4_0, Q4_1, W4G128   bit 16 * e + 4 * i of the word at 512 * (s / 4) + 16 * l + 4 * (s % 4)
    Q8_0, W8G128         byte 512 * (s / 2) + 16 * l + 8 * (s % 2) + 2 * i + e: number + 128
    BF16, F16            byte 512 * s + 16 * l + 4 * i + 2 * e
    scales               [8 columns][groups of K that share them][column, column + 8]: half d, where there
                         is a minimum half m

Values are never changed. Columns are padded to 16 with zeros, K to whole units with blocks of zeros: what
lies past a row's end is multiplied by zeros, and need not be zero in a last, short group of W4G128.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.float_formats import float_values
from megakernel.model.weights import RawTensor
from megakernel.packing import GROUP, Bytes, PackedLinear, PackError, join, padded

_LANES = 32
_STEP_K = 16
_ROWS_AT_ONCE = 1024
"""Their copies stay in a cache, and no matrix is in memory thrice."""


class _Layout(msgspec.Struct, frozen=True, kw_only=True):
    unit_k: int
    bits: int
    """Of a number."""
    block_k: int
    """Elements of K that share scales; of float formats 1, without any."""
    header_bytes: int
    """Of a block's scales; in the file they come first."""
    must_be_whole: bool = False
    """Whether no row may end within a block."""

    @property
    def number_bytes(self) -> int:
        """Of a unit."""
        return self.unit_k * GROUP * self.bits // 8

    @property
    def unit_bytes(self) -> int:
        return self.number_bytes + self.unit_k // self.block_k * GROUP * self.header_bytes

    @property
    def block_bytes(self) -> int:
        return self.header_bytes + self.block_k * self.bits // 8


_LAYOUTS = {
    "Q4_0": _Layout(unit_k=64, bits=4, block_k=32, header_bytes=2, must_be_whole=True),
    "Q4_1": _Layout(unit_k=64, bits=4, block_k=32, header_bytes=4, must_be_whole=True),
    "Q8_0": _Layout(unit_k=64, bits=8, block_k=32, header_bytes=2, must_be_whole=True),
    "W4G128": _Layout(unit_k=128, bits=4, block_k=128, header_bytes=4),
    "W8G128": _Layout(unit_k=128, bits=8, block_k=128, header_bytes=2),
    "BF16": _Layout(unit_k=64, bits=16, block_k=1, header_bytes=0),
    "F16": _Layout(unit_k=64, bits=16, block_k=1, header_bytes=0),
}
PACKED_FORMATS = tuple(_LAYOUTS)


def unit_k(format: str) -> int:
    """Elements of K that are packed together: K is divided among warps and instructions in multiples."""
    return _LAYOUTS[format].unit_k


def unit_bytes(format: str) -> int:
    """Of 16 columns of a unit."""
    return _LAYOUTS[format].unit_bytes


def group_bytes(format: str, in_features: int) -> int:
    """Of 16 columns of all K."""
    return -(-in_features // unit_k(format)) * unit_bytes(format)


def common_format(formats: Sequence[str], in_features: int) -> str:
    """What an op's weights are packed as: their own format, or BF16 where they are in several or in one that
    tensor cores do not multiply, F32 among them."""
    first = formats[0]
    return first if set(formats) == {first} and _is_packable(first, in_features) else "BF16"


def pack_linear(tensors: Sequence[RawTensor], *, swiglu_group: int | None = None) -> PackedLinear:
    """The matrix that `packing.join` makes of tensors that all are of one of PACKED_FORMATS.

    Raises PackError.
    """
    matrix = join(tensors, swiglu_group, PACKED_FORMATS)
    format, in_features = matrix.format, matrix.in_features
    if not _is_packable(format, in_features):
        block = _LAYOUTS[format].block_k
        raise PackError(f"{in_features} input features: a multiple of {block} is wanted for {format}")
    out_features = -(-len(matrix.rows) // GROUP) * GROUP
    packed = np.empty((out_features // GROUP, group_bytes(format, in_features)), np.uint8)
    for start in range(0, out_features, _ROWS_AT_ONCE):
        rows = padded(matrix.rows[start : start + _ROWS_AT_ONCE], GROUP)
        _pack_rows(rows, _LAYOUTS[format], packed[start // GROUP : (start + len(rows)) // GROUP])
    return PackedLinear(
        format=format, in_features=in_features, out_features=out_features, data=packed.reshape(-1)
    )


def _is_packable(format: str, in_features: int) -> bool:
    layout = _LAYOUTS.get(format)
    return layout is not None and not (layout.must_be_whole and in_features % layout.block_k)


def _pack_rows(rows: Bytes, layout: _Layout, packed: Bytes) -> None:
    """Whole column groups, [columns, bytes] as stored, into [column groups, bytes]."""
    units = packed.reshape(len(packed), -1, layout.unit_bytes)
    num_blocks = units.shape[1] * layout.unit_k // layout.block_k
    stored = np.zeros((len(rows), num_blocks, layout.block_bytes), np.uint8)
    stored.reshape(len(rows), -1)[:, : rows.shape[1]] = rows
    numbers = stored[:, :, layout.header_bytes :]
    units[:, :, : layout.number_bytes] = _fragments(numbers, layout).reshape(*units.shape[:2], -1)
    if layout.header_bytes:
        scales = stored[:, :, : layout.header_bytes].reshape(
            len(packed), 2, GROUP // 2, units.shape[1], -1, layout.header_bytes
        )
        ordered = np.einsum("cbgujx->cugjbx", scales)
        units[:, :, layout.number_bytes :] = ordered.reshape(*units.shape[:2], -1)


def _fragments(numbers: Bytes, layout: _Layout) -> Bytes:
    """Of [columns, blocks, bytes]: numbers as lanes hold them, units of each column group in turn.

    Axes: c column group, u unit, S and h step / 2 and step % 2 (w and v: S / 2 and S % 2), g and t lane,
    r and b register / 2 and register % 2, e element.
    """
    groups, pairs = len(numbers) // GROUP, layout.unit_k // (2 * _STEP_K)
    fragments: npt.NDArray[np.generic]
    match layout.bits:
        case 16:
            halves = np.ascontiguousarray(numbers).view(np.uint16)
            fragments = np.einsum("cbguSthre->cuShgtrbe", halves.reshape(groups, 2, 8, -1, pairs, 4, 2, 2, 2))
        case 8:
            from_zero = numbers ^ np.uint8(0x80)  # int8 + 128
            axes = from_zero.reshape(groups, 2, 8, -1, pairs, 4, 2, 2, 2)
            fragments = np.einsum("cbguSthre->cuSgthrbe", axes)
        case _:
            nibbles = np.concatenate([numbers & 15, numbers >> 4], axis=-1)
            low, high = np.moveaxis(nibbles.reshape(groups, 2, 8, -1), 1, 0)
            axes = (low | high << 4).reshape(groups, 8, -1, pairs // 2, 2, 4, 2, 2, 2)
            fragments = np.einsum("cguwvthre->cuwgtvher", axes)
    return np.ascontiguousarray(fragments).view(np.uint8)


def unpack(packed: PackedLinear) -> npt.NDArray[np.float32]:
    """The dense matrix [out_features, in_features] of a packed one, padded columns included.

    Reads as the formulas above say, and shares nothing with packing.
    """
    layout = _LAYOUTS[packed.format]
    units = packed.data.reshape(packed.out_features // GROUP, -1, layout.unit_bytes)
    numbers = _numbers(units, layout)
    if layout.bits == 16:
        values = float_values(numbers, packed.format)
    else:
        values = _scaled(numbers, units[:, :, layout.number_bytes :], packed.format, layout)
    dense = values.swapaxes(1, 2).reshape(packed.out_features, -1)
    return np.ascontiguousarray(dense[:, : packed.in_features])


def _numbers(units: Bytes, layout: _Layout) -> Bytes:
    """[column groups, units, 16 columns, elements of K * bytes of a number]"""
    lane, s, i, e = np.meshgrid(
        *(np.arange(size) for size in (_LANES, layout.unit_k // _STEP_K, 4, 2)), indexing="ij"
    )
    g, t = lane // 4, lane % 4
    column = g + 8 * (i & 1)
    k = 32 * (s // 2) + 8 * t + 4 * (s % 2) + 2 * (i >> 1) + e
    item = max(1, layout.bits // 8)
    numbers = np.empty((*units.shape[:2], GROUP, layout.unit_k, item), np.uint8)
    match layout.bits:
        case 16:
            at = 512 * s + 16 * lane + 4 * i + 2 * e
            numbers[:, :, column, k, 0], numbers[:, :, column, k, 1] = units[..., at], units[..., at + 1]
        case 8:
            at = 512 * (s // 2) + 16 * lane + 8 * (s % 2) + 2 * i + e
            numbers[:, :, column, k, 0] = units[..., at]
        case _:
            at, bit = 512 * (s // 4) + 16 * lane + 4 * (s % 4), 16 * e + 4 * i
            numbers[:, :, column, k, 0] = units[..., at + bit // 8] >> (bit % 8).astype(np.uint8) & 15
    return numbers.reshape(*units.shape[:2], GROUP, -1)


def _scaled(numbers: Bytes, scales: Bytes, format: str, layout: _Layout) -> npt.NDArray[np.float32]:
    """Scales: [column groups, units, bytes], of which for columns n and n + 8 those of each group of K."""
    halves = np.ascontiguousarray(scales).view(np.float16).astype(np.float32)
    by_pair = halves.reshape(*numbers.shape[:2], GROUP // 2, -1, 2, layout.header_bytes // 2)
    by_column = np.concatenate([by_pair[:, :, :, :, 0], by_pair[:, :, :, :, 1]], axis=2)
    by_element = np.repeat(by_column, layout.block_k, axis=3)
    d, q = by_element[..., 0], numbers.astype(np.float32)
    match format:
        case "Q4_0":
            return d * (q - 8)
        case "Q8_0" | "W8G128":
            return d * (q - 128)
        case _:
            return np.asarray(d * q + by_element[..., 1])
