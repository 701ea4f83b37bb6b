"""Weights in the order the CPU kernels read them; `kernels/include/cpu/packed.h` draws the layout.

Values are never changed: a packed Q4_1, Q4_0 or Q8_0 matrix has the file's nibbles, bytes and scales.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.float_formats import FLOAT_BYTES, float_values
from megakernel.model.weights import RawTensor
from megakernel.packing import GROUP, Bytes, PackedLinear, PackError, join, padded

BLOCK = 32
"""Columns that share a scale."""
LINE_BYTES = 64

QUANTIZED_FORMATS = ("Q4_1", "Q4_0", "Q8_0")
PACKED_FORMATS = (*QUANTIZED_FORMATS, *FLOAT_BYTES)


class _Layout(msgspec.Struct, frozen=True):
    """Bytes of a format: of a block in the file, and of a group of 16 rows when packed."""

    block_bytes: int
    header_bytes: int
    """Of scales and minima at a block's start, in the file."""

    @property
    def body_bytes(self) -> int:
        return self.block_bytes - self.header_bytes


_LAYOUTS = {"Q4_1": _Layout(20, 4), "Q4_0": _Layout(18, 2), "Q8_0": _Layout(34, 2)}


def common_format(formats: Sequence[str], in_features: int) -> str:
    """What an op's weights are packed as: their own format, or F32, exactly, where they are in several or in
    one that no kernel reads."""
    first = formats[0]
    is_packable = first in PACKED_FORMATS and (first not in QUANTIZED_FORMATS or in_features % BLOCK == 0)
    return first if is_packable and set(formats) == {first} else "F32"


def pack_linear(tensors: Sequence[RawTensor], *, swiglu_group: int | None = None) -> PackedLinear:
    """The matrix that `join` makes of the tensors.

    All must be of one of PACKED_FORMATS: a file that mixes formats within an op gives the op's tensors to
    `float_tensor` first. Raises PackError.
    """
    matrix = join(tensors, swiglu_group, PACKED_FORMATS)
    format, in_features = matrix.format, matrix.in_features
    if format in _LAYOUTS and in_features % BLOCK:
        raise PackError(f"{in_features} input features: a multiple of {BLOCK} is wanted for {format}")
    rows = padded(matrix.rows, GROUP)
    packed = _pack_quantized(rows, format) if format in _LAYOUTS else _pack_float(rows, format)
    return PackedLinear(
        format=format, in_features=in_features, out_features=len(rows), data=_aligned(packed.reshape(-1))
    )


def unpack(packed: PackedLinear) -> npt.NDArray[np.float32]:
    """The dense matrix [out_features, in_features] of a packed one, padding included."""
    groups = packed.data.reshape(packed.out_features // GROUP, -1)
    if packed.format in _LAYOUTS:
        return _unpack_quantized(groups, packed.format, packed.in_features)
    item = FLOAT_BYTES[packed.format]
    body = np.ascontiguousarray(groups[:, : packed.in_features * GROUP * item])
    columns = body.reshape(len(groups), packed.in_features, GROUP, item)
    raw = np.ascontiguousarray(columns.swapaxes(1, 2)).reshape(packed.out_features, -1)
    return float_values(raw, packed.format)


def group_bytes(format: str, in_features: int) -> int:
    """Bytes of 16 packed output rows; `group_bytes` of packed.h."""
    if format in _LAYOUTS:
        layout, blocks = _LAYOUTS[format], in_features // BLOCK
        return _whole_lines(blocks * GROUP * layout.header_bytes) + blocks * GROUP * layout.body_bytes
    return _whole_lines(in_features * GROUP * FLOAT_BYTES[format])


def _pack_quantized(rows: Bytes, format: str) -> Bytes:
    layout = _LAYOUTS[format]
    num_groups = len(rows) // GROUP
    blocks = rows.reshape(num_groups, GROUP, -1, layout.block_bytes).swapaxes(1, 2)
    num_blocks = blocks.shape[1]
    packed = np.zeros((num_groups, group_bytes(format, num_blocks * BLOCK)), np.uint8)
    header_bytes, body_bytes = (
        num_blocks * GROUP * size for size in (layout.header_bytes, layout.body_bytes)
    )
    # [group, block, column, scale or minimum] -> [group, block, scale or minimum, column]
    header = packed[:, :header_bytes].reshape(num_groups, num_blocks, -1, GROUP, 2)
    scales = blocks[..., : layout.header_bytes].reshape(num_groups, num_blocks, GROUP, -1, 2)
    header[...] = scales.swapaxes(2, 3)
    # [group, block, column, quad] -> [group, block, quad, column]
    body = packed[:, -body_bytes:].reshape(num_groups, num_blocks, -1, GROUP, 4)
    quads = blocks[..., layout.header_bytes :].reshape(num_groups, num_blocks, GROUP, -1, 4)
    body[...] = quads.swapaxes(2, 3)
    if format == "Q8_0":
        np.bitwise_xor(body, 0x80, out=body)  # int8 + 128 as an unsigned byte
    return packed


def _pack_float(rows: Bytes, format: str) -> Bytes:
    item = FLOAT_BYTES[format]
    num_groups = len(rows) // GROUP
    in_features = rows.shape[1] // item
    packed = np.zeros((num_groups, group_bytes(format, in_features)), np.uint8)
    body = packed[:, : in_features * GROUP * item].reshape(num_groups, in_features, GROUP, item)
    body[...] = rows.reshape(num_groups, GROUP, in_features, item).swapaxes(1, 2)
    return packed


def _unpack_quantized(groups: Bytes, format: str, in_features: int) -> npt.NDArray[np.float32]:
    layout, num_blocks = _LAYOUTS[format], in_features // BLOCK
    header = groups[:, : num_blocks * GROUP * layout.header_bytes]
    scales = np.ascontiguousarray(header).view(np.float16).reshape(len(groups), num_blocks, -1, GROUP, 1)
    body = groups[:, groups.shape[1] - num_blocks * GROUP * layout.body_bytes :]
    quads = body.reshape(len(groups), num_blocks, -1, GROUP, 4).swapaxes(2, 3)
    stored = np.ascontiguousarray(quads).reshape(len(groups), num_blocks, GROUP, layout.body_bytes)
    if format == "Q8_0":
        numbers = stored.astype(np.float32) - 128
    else:
        numbers = np.concatenate([stored & 15, stored >> 4], axis=-1).astype(np.float32)
        numbers -= 8 if format == "Q4_0" else 0
    values = scales[:, :, 0].astype(np.float32) * numbers
    if format == "Q4_1":
        values += scales[:, :, 1].astype(np.float32)
    return values.swapaxes(1, 2).reshape(len(groups) * GROUP, in_features)


def _whole_lines(num_bytes: int) -> int:
    return -(-num_bytes // LINE_BYTES) * LINE_BYTES


def _aligned(data: Bytes) -> Bytes:
    room = np.empty(len(data) + LINE_BYTES, np.uint8)
    start = -room.ctypes.data % LINE_BYTES
    aligned = room[start : start + len(data)]
    aligned[...] = data
    return aligned
