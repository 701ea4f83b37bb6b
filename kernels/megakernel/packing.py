"""What the packings of all backends have in common: which tensors make one matrix, and its rows as stored."""

from collections.abc import Collection, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.model.weights import RawTensor

GROUP = 16
"""Output rows packed together."""

Bytes = npt.NDArray[np.uint8]


class PackError(ValueError):
    """Tensors that cannot be one packed matrix: names the formats or shapes, and what would be right."""


class PackedLinear(msgspec.Struct, frozen=True, kw_only=True):
    format: str
    in_features: int
    out_features: int
    """Padded to a multiple of 16; the rows added are zeros."""
    data: Bytes
    """Whole; packed for a CPU, it starts at a multiple of 64 bytes."""


class StoredMatrix(msgspec.Struct, frozen=True, kw_only=True):
    format: str
    in_features: int
    rows: Bytes
    """[out_features, bytes of a row], not padded."""


def join(tensors: Sequence[RawTensor], swiglu_group: int | None, known: Collection[str]) -> StoredMatrix:
    """One matrix of all tensors' rows: one after the other, or, with `swiglu_group`, groups of that many rows
    of the first (gate) and the second (up) in turn.

    Raises PackError unless all are matrices of equal width in one of the `known` formats.
    """
    format, in_features = _check(tensors, known)
    parts = [tensor.data.view(np.uint8).reshape(tensor.shape[0], -1) for tensor in tensors]
    rows = np.concatenate(parts) if swiglu_group is None else _alternate(parts, swiglu_group)
    return StoredMatrix(format=format, in_features=in_features, rows=rows)


def padded(rows: Bytes, multiple: int) -> Bytes:
    """With rows of zeros up to a multiple."""
    missing = -len(rows) % multiple
    return np.concatenate([rows, np.zeros((missing, rows.shape[1]), np.uint8)]) if missing else rows


def _check(tensors: Sequence[RawTensor], known: Collection[str]) -> tuple[str, int]:
    formats = [tensor.format for tensor in tensors]
    if len(set(formats)) != 1:
        raise PackError(f"formats {formats} in one op: exactly one is wanted (see float_tensor)")
    if formats[0] not in known:
        raise PackError(f"format {formats[0]}: one of {', '.join(known)} is wanted (see float_tensor)")
    shapes = [tensor.shape for tensor in tensors]
    if any(len(shape) != 2 or shape[1] != shapes[0][-1] for shape in shapes):
        raise PackError(f"shapes {shapes}: matrices of equal in_features (their second size) are wanted")
    return formats[0], shapes[0][1]


def _alternate(parts: list[Bytes], group: int) -> Bytes:
    if len(parts) != 2 or len(parts[0]) != len(parts[1]) or group % GROUP:
        sizes = [len(part) for part in parts]
        raise PackError(f"{sizes} rows in groups of {group}: equal gate and up, groups of 16s are wanted")
    gate, up = (padded(part, group).reshape(-1, group, part.shape[1]) for part in parts)
    return np.stack([gate, up], axis=1).reshape(-1, parts[0].shape[1])
