"""Attention of rows over paged keys, by the splits of an AttentionPlan: the arithmetic.

What happens inside a split runs at sizes verified on this device; splits are combined by a balanced sum,
which zeros at its end leave as it was. See `attention_plan` for why. All of it is float32, whatever the
pool holds: 16-bit batched products on a CPU give other bits for other numbers of items.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megakernel.model.attention_plan import (
    ATTENTION_TILES,
    ITEM_COUNTS,
    SPLIT_TOKENS,
    AttentionPlan,
    ItemCounts,
)
from megakernel.model.row_invariant import BASE_ROWS, RowVarianceError
from megakernel.model.shape import ModelShape

_HIDDEN = -1e30
"""A hidden key's score: finite, so that a split with no visible key is a weight of zero and not a NaN."""


class _Partials(NamedTuple):
    """Attention over one split of keys, by row and head."""

    outputs: torch.Tensor
    """[..., head_dim] not yet divided by the sum."""
    maxima: torch.Tensor
    """Of the scores."""
    sums: torch.Tensor
    """Of the exponentials of the scores less their maximum."""


class _DeviceGroup(NamedTuple):
    rows: torch.Tensor
    key_slots: torch.Tensor
    is_hidden: torch.Tensor


class DevicePlan(NamedTuple):
    """An AttentionPlan's index arrays on the device."""

    groups: list[_DeviceGroup]
    partials: torch.Tensor
    is_padding: torch.Tensor
    num_splits: int


def to_device(plan: AttentionPlan, device: torch.device) -> DevicePlan:
    def move(array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    groups = [_DeviceGroup(move(g.rows), move(g.key_slots), move(g.is_hidden)) for g in plan.groups]
    num_splits = plan.partials.shape[1]
    return DevicePlan(
        groups, move(plan.partials.reshape(-1)), move(plan.is_padding[None, :, :, None]), num_splits
    )


def tree_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: DevicePlan
) -> torch.Tensor:
    """[rows, heads * head_dim] for scaled `queries` [rows, heads, head_dim].

    `keys` and `values` are one layer's pools [kv_heads, slots, head_dim].
    """
    num_rows, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[0]
    group_heads = num_heads // num_kv_heads
    by_kv_head = queries.view(num_rows, num_kv_heads, -1).transpose(0, 1).float().contiguous()
    parts = [_attend(by_kv_head, keys, values, group, group_heads) for group in plan.groups]
    outputs, maxima, sums = (
        parts[0] if len(parts) == 1 else (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
    )
    outputs = outputs.index_select(1, plan.partials)
    sums = sums.index_select(1, plan.partials)
    if plan.num_splits > 1:
        by_split = (num_kv_heads, num_rows, plan.num_splits, group_heads)
        maxima = maxima.index_select(1, plan.partials).view(by_split)
        maxima = maxima.masked_fill(plan.is_padding, _HIDDEN)
        weights = maxima.sub_(maxima.amax(2, keepdim=True)).exp_()
        sums = _balanced_sum(sums.view(by_split).mul_(weights))
        outputs = _balanced_sum(outputs.view(*by_split, head_dim).mul_(weights.unsqueeze(-1)))
    attended = outputs.view(num_kv_heads, num_rows, group_heads, head_dim).div_(
        sums.view(num_kv_heads, num_rows, group_heads, 1)
    )
    return attended.transpose(0, 1).reshape(num_rows, num_heads * head_dim).to(queries.dtype)


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: _DeviceGroup, group_heads: int
) -> _Partials:
    """Of a group's items, flattened to [kv_heads, item rows, ...]."""
    num_kv_heads, _, head_dim = keys.shape
    num_items, tile_rows = group.is_hidden.shape[:2]
    tiles = (num_kv_heads, num_items, tile_rows, group_heads, head_dim)
    splits = (num_kv_heads, num_items, SPLIT_TOKENS, head_dim)
    partials = _partials(
        queries.index_select(1, group.rows).view(tiles),
        keys.index_select(1, group.key_slots).float().view(splits),
        values.index_select(1, group.key_slots).float().view(splits),
        group.is_hidden,
    )
    return _Partials(*(tensor.flatten(1, 2) for tensor in partials))


def _partials(
    tiles: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, is_hidden: torch.Tensor
) -> _Partials:
    """Query tiles [kv_heads, items, tile_rows, group_heads, head_dim] beside splits of as many items."""
    num_kv_heads, num_items, tile_rows, group_heads, head_dim = tiles.shape
    by_matrix = (num_kv_heads * num_items, tile_rows * group_heads, -1)
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    scores = torch.bmm(tiles.reshape(by_matrix), keys.transpose(1, 2))
    scores.view(*tiles.shape[:-1], SPLIT_TOKENS).masked_fill_(is_hidden, _HIDDEN)
    maxima = scores.amax(-1, keepdim=True)
    sums = scores.sub_(maxima).exp_().sum(-1)
    outputs = torch.bmm(scores, values)
    by_row = tiles.shape[:-1]
    return _Partials(outputs.view(*by_row, head_dim), maxima.view(by_row), sums.view(by_row))


def _balanced_sum(terms: torch.Tensor) -> torch.Tensor:
    """Sum over dimension 2, of a power of two: balanced, so more zeros at the end change nothing."""
    while terms.shape[2] > 1:
        terms = terms[:, :, 0::2] + terms[:, :, 1::2]
    return terms.squeeze(2)


def verified_item_counts(shape: ModelShape, device: torch.device) -> ItemCounts:
    """How many items of which tile size give, on this device, the bits of one fixed size and count.

    Whatever the place of a row in its tile and of an item among the others. Raises RowVarianceError.
    """
    generator = torch.Generator().manual_seed(2)
    num_rows = 2 * ATTENTION_TILES[-1]
    group_heads = shape.num_heads // shape.num_kv_heads

    def sample(*dims: int) -> torch.Tensor:
        return torch.randn(*dims, generator=generator).to(device)

    queries = sample(shape.num_kv_heads, num_rows, group_heads, shape.head_dim)
    keys, values = (sample(shape.num_kv_heads, 1, SPLIT_TOKENS, shape.head_dim) for _ in range(2))

    def agrees(tile: int, count: int, expected: _Partials, first_row: int) -> bool:
        """Every one of `count` equal items, of rows [first_row, first_row + tile)."""
        rows = slice(first_row, first_row + tile)
        is_hidden = torch.zeros((count, tile, 1, SPLIT_TOKENS), dtype=torch.bool, device=device)
        partials = _partials(
            queries[:, None, rows].expand(-1, count, -1, -1, -1),
            keys.expand(-1, count, -1, -1),
            values.expand(-1, count, -1, -1),
            is_hidden,
        )
        return all(
            torch.equal(got, want[:, None, rows].expand_as(got))
            for got, want in zip(partials, expected, strict=True)
        )

    base = _base_partials(queries, keys, values)
    passed = {
        tile: tuple(c for c in ITEM_COUNTS if agrees(tile, c, base, 0) and agrees(tile, c, base, 3))
        for tile in ATTENTION_TILES
    }
    if ITEM_COUNTS[-1] not in passed[BASE_ROWS]:
        raise RowVarianceError(f"attention depends on the order of rows or items on this device ({device})")
    # A tile that cannot go to the largest count costs more in small groups than it saves in padding.
    return {tile: counts for tile, counts in passed.items() if ITEM_COUNTS[-1] in counts}


def _base_partials(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> _Partials:
    """[kv_heads, rows, ...] of all sample rows, in tiles of BASE_ROWS and the largest number of items."""
    count = ITEM_COUNTS[-1]
    parts = []
    for tile in torch.split(queries, BASE_ROWS, dim=1):
        is_hidden = torch.zeros((count, BASE_ROWS, 1, SPLIT_TOKENS), dtype=torch.bool, device=keys.device)
        items = tile[:, None].expand(-1, count, -1, -1, -1)
        splits = keys.expand(-1, count, -1, -1), values.expand(-1, count, -1, -1)
        parts.append([tensor[:, 0] for tensor in _partials(items, *splits, is_hidden)])
    return _Partials(*(torch.cat(tensors, 1) for tensors in zip(*parts, strict=True)))
