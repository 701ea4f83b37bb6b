"""Weights in the order the CPU kernels read them; `kernels/include/cpu/packed.h` draws the layout.

Values are never changed: a packed Q4_1, Q4_0 or Q8_0 matrix has the file's nibbles, bytes and scales.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.model.gguf import RawTensor

GROUP = 16
"""Output rows packed together."""
BLOCK = 32
"""Columns that share a scale."""
LINE_BYTES = 64

QUANTIZED_FORMATS = ("Q4_1", "Q4_0", "Q8_0")
_FLOAT_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
PACKED_FORMATS = (*QUANTIZED_FORMATS, *_FLOAT_BYTES)

Bytes = npt.NDArray[np.uint8]


class PackError(ValueError):
    """Tensors that cannot be one packed matrix: names the formats or shapes, and what would be right."""


class PackedLinear(msgspec.Struct, frozen=True, kw_only=True):
    format: str
    in_features: int
    out_features: int
    """Padded to a multiple of 16; the rows added are zeros."""
    data: Bytes
    """Whole, starting at a multiple of 64 bytes."""


class _Layout(msgspec.Struct, frozen=True):
    """Bytes of a format: of a block in the file, and of a group of 16 rows when packed."""

    block_bytes: int
    header_bytes: int
    """Of scales and minima at a block's start, in the file."""

    @property
    def body_bytes(self) -> int:
        return self.block_bytes - self.header_bytes


_LAYOUTS = {"Q4_1": _Layout(20, 4), "Q4_0": _Layout(18, 2), "Q8_0": _Layout(34, 2)}


def pack_linear(tensors: Sequence[RawTensor], *, swiglu_group: int | None = None) -> PackedLinear:
    """One matrix of all tensors' rows: one after the other, or, with `swiglu_group`, groups of that many rows
    of the first (gate) and the second (up) in turn.

    All tensors must be of one of PACKED_FORMATS: a file that mixes formats within an op gives the op's
    tensors to `float_tensor` first.
    """
    format, in_features = _check(tensors)
    if swiglu_group is None:
        rows = np.concatenate([_rows(tensor) for tensor in tensors])
    else:
        rows = _alternate([_rows(tensor) for tensor in tensors], swiglu_group)
    rows = _padded(rows, GROUP)
    packed = _pack_quantized(rows, format) if format in _LAYOUTS else _pack_float(rows, format)
    return PackedLinear(
        format=format, in_features=in_features, out_features=len(rows), data=_aligned(packed.reshape(-1))
    )


def unpack(packed: PackedLinear) -> npt.NDArray[np.float32]:
    """The dense matrix [out_features, in_features] of a packed one, padding included."""
    groups = packed.data.reshape(packed.out_features // GROUP, -1)
    if packed.format in _LAYOUTS:
        return _unpack_quantized(groups, packed.format, packed.in_features)
    item = _FLOAT_BYTES[packed.format]
    body = np.ascontiguousarray(groups[:, : packed.in_features * GROUP * item])
    columns = body.reshape(len(groups), packed.in_features, GROUP, item)
    raw = np.ascontiguousarray(columns.swapaxes(1, 2)).reshape(packed.out_features, -1)
    return _floats(raw, packed.format)


def float_tensor(values: npt.NDArray[np.float32], format: str = "F32") -> RawTensor:
    """Dense values as a tensor to pack: exact as F32, rounded to nearest even as F16 or BF16."""
    values = np.ascontiguousarray(values, np.float32)
    match format:
        case "F32":
            raw = values.view(np.uint8)
        case "F16":
            with np.errstate(over="ignore"):  # infinity, as IEEE 754 has it
                raw = values.astype(np.float16).view(np.uint8)
        case "BF16":
            bits = values.view(np.uint32)
            bits = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
            raw = np.ascontiguousarray((bits >> np.uint32(16)).astype(np.uint16)).view(np.uint8)
        case _:
            raise PackError(f"float format {format!r}: one of {', '.join(_FLOAT_BYTES)} is wanted")
    return RawTensor(format=format, shape=values.shape, data=raw.reshape(len(values), -1))


def group_bytes(format: str, in_features: int) -> int:
    """Bytes of 16 packed output rows; `group_bytes` of packed.h."""
    if format in _LAYOUTS:
        layout, blocks = _LAYOUTS[format], in_features // BLOCK
        return _whole_lines(blocks * GROUP * layout.header_bytes) + blocks * GROUP * layout.body_bytes
    return _whole_lines(in_features * GROUP * _FLOAT_BYTES[format])


def _check(tensors: Sequence[RawTensor]) -> tuple[str, int]:
    formats = [tensor.format for tensor in tensors]
    if len(set(formats)) != 1:
        raise PackError(f"formats {formats} in one op: exactly one is wanted (see float_tensor)")
    if formats[0] not in PACKED_FORMATS:
        raise PackError(
            f"format {formats[0]}: one of {', '.join(PACKED_FORMATS)} is wanted (see float_tensor)"
        )
    shapes = [tensor.shape for tensor in tensors]
    if any(len(shape) != 2 or shape[1] != shapes[0][-1] for shape in shapes):
        raise PackError(f"shapes {shapes}: matrices of equal in_features (their second size) are wanted")
    if formats[0] in _LAYOUTS and shapes[0][1] % BLOCK:
        raise PackError(f"{shapes[0][1]} input features: a multiple of {BLOCK} is wanted for {formats[0]}")
    return formats[0], shapes[0][1]


def _rows(tensor: RawTensor) -> Bytes:
    return tensor.data.view(np.uint8).reshape(tensor.shape[0], -1)


def _padded(rows: Bytes, multiple: int) -> Bytes:
    missing = -len(rows) % multiple
    return np.concatenate([rows, np.zeros((missing, rows.shape[1]), np.uint8)]) if missing else rows


def _alternate(parts: list[Bytes], group: int) -> Bytes:
    if len(parts) != 2 or len(parts[0]) != len(parts[1]) or group % GROUP:
        sizes = [len(part) for part in parts]
        raise PackError(f"{sizes} rows in groups of {group}: equal gate and up, groups of 16s are wanted")
    gate, up = (_padded(part, group).reshape(-1, group, part.shape[1]) for part in parts)
    return np.stack([gate, up], axis=1).reshape(-1, parts[0].shape[1])


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
    item = _FLOAT_BYTES[format]
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


def _floats(raw: Bytes, format: str) -> npt.NDArray[np.float32]:
    match format:
        case "F32":
            return raw.view(np.float32)
        case "F16":
            return raw.view(np.float16).astype(np.float32)
        case _:
            return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _whole_lines(num_bytes: int) -> int:
    return -(-num_bytes // LINE_BYTES) * LINE_BYTES


def _aligned(data: Bytes) -> Bytes:
    room = np.empty(len(data) + LINE_BYTES, np.uint8)
    start = -room.ctypes.data % LINE_BYTES
    aligned = room[start : start + len(data)]
    aligned[...] = data
    return aligned
