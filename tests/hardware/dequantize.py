"""Packed weights back to numbers, in torch: from the layout as megakernel/pack_cuda.py documents it.

Shares no code with it: axes are permuted here where it gathers by index.
"""

import torch

from benchmarks.gpu_memory import in_features
from megakernel.artifact import Segment, WeightLayout
from megakernel.model.names import expected_shapes
from megakernel.model.shape import ModelShape

GROUP = 16
"""Columns that are packed together."""
BITS = {"Q4_0": 4, "Q4_1": 4, "W4G128": 4, "Q8_0": 8, "W8G128": 8, "BF16": 16, "F16": 16}
SCALES = {
    "Q4_0": (32, 1),
    "Q4_1": (32, 2),
    "W4G128": (128, 2),
    "Q8_0": (32, 1),
    "W8G128": (128, 1),
    "BF16": (0, 0),
    "F16": (0, 0),
}
"""(elements of K that share them, halves of each)"""
_ZERO = {"Q4_0": 8, "Q8_0": 128, "W8G128": 128, "Q4_1": 0, "W4G128": 0}
_ONCE_COLUMN_GROUPS = 256


def matrix(packed: torch.Tensor, format: str, in_features: int) -> torch.Tensor:
    """[columns, in_features] float64, padded columns included, of one segment's bytes."""
    unit_k = 128 if SCALES[format][0] == 128 else 64
    number_bytes = unit_k * GROUP * BITS[format] // 8
    group_k, halves = SCALES[format]
    scale_bytes = unit_k // group_k * GROUP * 2 * halves if group_k else 0
    num_units = -(-in_features // unit_k)
    units = packed.view(-1, num_units, number_bytes + scale_bytes)
    values = torch.empty((len(units) * GROUP, in_features), dtype=torch.float64, device=packed.device)
    for start in range(0, len(units), _ONCE_COLUMN_GROUPS):
        part = units[start : start + _ONCE_COLUMN_GROUPS]
        found = _numbers(part[:, :, :number_bytes], format, unit_k)
        if halves:
            found = _scaled(found, part[:, :, number_bytes:], format, group_k)
        # [column groups, columns, units, elements]
        whole = found.flatten(2)[:, :, :in_features].flatten(0, 1)
        values[start * GROUP : start * GROUP + len(whole)] = whole
    return values


def tensors(packed: torch.Tensor, layout: WeightLayout, shape: ModelShape) -> dict[str, torch.Tensor]:
    """Every weight by name, float64, from all packed bytes."""
    sizes = expected_shapes(shape)
    found: dict[str, torch.Tensor] = {}
    for segment in layout.segments.values():
        held = packed[segment.offset : segment.offset + segment.num_bytes]
        if segment.is_matrix:
            whole = _in_file_order(matrix(held, segment.format, in_features(shape, segment)), segment)
        else:
            whole = held.view(torch.float32).double()
        start = 0
        for name in segment.weights:
            found[name] = whole[start : start + sizes[name][0]]
            start += sizes[name][0]
    return found


def _in_file_order(whole: torch.Tensor, segment: Segment) -> torch.Tensor:
    """Gate's rows, then up's, of groups of both in turn."""
    if segment.swiglu_group is None:
        return whole
    pairs = whole.view(-1, 2, segment.swiglu_group, whole.shape[1])
    return pairs.transpose(0, 1).reshape(whole.shape)


def _numbers(numbers: torch.Tensor, format: str, unit_k: int) -> torch.Tensor:
    """[column groups, 16 columns, units, unit_k] float64, of [column groups, units, bytes].

    In the documented formulas s = 4 w + 2 p + h, l = 4 g + t and i = 2 r + b: column g + 8 b, element
    64 w + 32 p + 8 t + 4 h + 2 r + e of K.
    """
    groups, units = numbers.shape[:2]
    words = unit_k // 64
    if BITS[format] == 4:
        # Byte of a word is 2 e + r, and b picks its half.
        held = numbers.reshape(groups, units, words, 8, 4, 2, 2, 2, 2)  # w g t p h e r
        halves = torch.stack([held & 15, held >> 4], dim=-1)  # ... e r b
        axes = halves.permute(0, 9, 3, 1, 2, 5, 4, 6, 8, 7)
    elif BITS[format] == 8:
        held = numbers.reshape(groups, units, words, 2, 8, 4, 2, 2, 2, 2)  # w p g t h r b e
        axes = held.permute(0, 8, 4, 1, 2, 3, 5, 6, 7, 9)
    else:
        kind = torch.bfloat16 if format == "BF16" else torch.float16
        held = (
            numbers.contiguous().view(kind).reshape(groups, units, words, 2, 2, 8, 4, 2, 2, 2)
        )  # w p h g t r b e
        axes = held.permute(0, 8, 5, 1, 2, 3, 6, 4, 7, 9)
    return axes.reshape(groups, GROUP, units, unit_k).double()


def _scaled(numbers: torch.Tensor, scales: torch.Tensor, format: str, group_k: int) -> torch.Tensor:
    groups, _, units, unit_k = numbers.shape
    halves = scales.contiguous().view(torch.float16).double()
    # Column groups, units, g, groups of K, b, halves: to columns g + 8 b.
    by_pair = halves.view(groups, units, GROUP // 2, unit_k // group_k, 2, -1)
    by_column = by_pair.permute(0, 4, 2, 1, 3, 5).flatten(1, 2)
    by_group = numbers.view(groups, GROUP, units, unit_k // group_k, group_k)
    values = (by_group - _ZERO[format]) * by_column[..., :1]
    if by_column.shape[-1] == 2:
        values = values + by_column[..., 1:]
    return values.reshape(numbers.shape)
