"""Attention of rows over paged keys, by the splits of an AttentionPlan: the arithmetic.

Every product runs at verified tile sizes, every reduction has a fixed length (one split, one head) or is a
balanced sum over splits, which zeros at its end leave as it was. See `attention_plan` for why.
All of it is float32, whatever the pool holds: 16-bit batched products on a CPU fail the tiles' check.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megakernel.model.attention_plan import ATTENTION_TILES, SPLIT_TOKENS, AttentionPlan
from megakernel.model.row_invariant import verified_tiles
from megakernel.model.shape import ModelShape

_HIDDEN = -1e30
"""A hidden key's score: finite, so that a split with no visible key is a weight of zero and not a NaN."""


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
        parts[0] if len(parts) == 1 else [torch.cat(tensors, 1) for tensors in zip(*parts, strict=True)]
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per item row: output not yet divided by its sum, maximum score, sum of exponentials."""
    num_kv_heads, _, head_dim = keys.shape
    num_items, tile_rows = group.is_hidden.shape[:2]
    num_matrices, num_queries = num_kv_heads * num_items, tile_rows * group_heads
    tiles = queries.index_select(1, group.rows).view(num_matrices, num_queries, head_dim)
    split_keys = keys.index_select(1, group.key_slots).float().view(num_matrices, SPLIT_TOKENS, head_dim)
    scores = torch.bmm(tiles, split_keys.transpose(1, 2))
    scores.view(num_kv_heads, num_items, tile_rows, group_heads, SPLIT_TOKENS).masked_fill_(
        group.is_hidden, _HIDDEN
    )
    maxima = scores.amax(-1, keepdim=True)
    scores.sub_(maxima).exp_()
    sums = scores.sum(-1)
    split_values = values.index_select(1, group.key_slots).float().view(num_matrices, SPLIT_TOKENS, head_dim)
    outputs = torch.bmm(scores, split_values)
    by_row = (num_kv_heads, num_items * tile_rows, group_heads)
    return outputs.view(*by_row, head_dim), maxima.view(by_row), sums.view(by_row)


def _balanced_sum(terms: torch.Tensor) -> torch.Tensor:
    """Sum over dimension 2, of a power of two: balanced, so more zeros at the end change nothing."""
    while terms.shape[2] > 1:
        terms = terms[:, :, 0::2] + terms[:, :, 1::2]
    return terms.squeeze(2)


def verified_attention_tiles(shape: ModelShape, device: torch.device) -> tuple[int, ...]:
    """Query tile sizes whose products give the base tile's bits here (`row_invariant.verified_tiles`).

    Raises RowVarianceError.
    """
    generator = torch.Generator().manual_seed(2)

    def sample(*dims: int) -> torch.Tensor:
        return torch.randn(*dims, generator=generator).to(device)

    keys = sample(shape.num_kv_heads, SPLIT_TOKENS, shape.head_dim)

    def scores(tile: torch.Tensor) -> torch.Tensor:
        return _per_matrix(tile, keys.transpose(1, 2))

    def outputs(tile: torch.Tensor) -> torch.Tensor:
        return _per_matrix(tile, keys)

    num_rows = 2 * ATTENTION_TILES[-1]
    queries = sample(num_rows, shape.num_heads * shape.head_dim)
    probabilities = sample(num_rows, shape.num_heads * SPLIT_TOKENS)
    passed = verified_tiles(scores, queries, ATTENTION_TILES)
    return tuple(tile for tile in verified_tiles(outputs, probabilities, ATTENTION_TILES) if tile in passed)


def _per_matrix(tile: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[rows, heads * width] times `right` [kv_heads, width, n], alone and among more matrices."""
    num_rows, (num_kv_heads, width, _) = len(tile), right.shape
    left = tile.view(num_rows, num_kv_heads, -1).transpose(0, 1).reshape(num_kv_heads, -1, width)
    alone = torch.bmm(left, right)
    among = torch.bmm(left.repeat(5, 1, 1), right.repeat(5, 1, 1))[-num_kv_heads:]
    if not torch.equal(alone, among):
        alone = torch.full_like(alone, torch.nan)  # never equal to anything: the tile does not pass
    return alone.view(num_kv_heads, num_rows, -1).transpose(0, 1).reshape(num_rows, -1)
