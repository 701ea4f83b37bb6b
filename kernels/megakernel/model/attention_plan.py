"""Which queries meet which keys in one forward pass: decided once a step, used by every layer.

Keys are cut by absolute position into splits of SPLIT_TOKENS. A row's attention is one partial result a
split, combined in order of position; what a split holds and how it is computed depends on the row's own
prefix and path alone. So batch company, chunking and tree shape cannot change a bit:

- a *tile* is a set of rows that lie on one path from the committed prefix to a leaf, beside the keys of that
  path in order of position; a row sees the keys up to its own position;
- the splits that lie wholly inside the committed prefix are common to all paths of a sequence, so there
  one tile holds rows of several paths; as are those inside prefix and held ancestors, to paths that have the
  same ones.
"""

from collections.abc import Iterator, Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.model.row_batch import IntArray, RowBatch, RowSpan, leaf_paths
from megakernel.model.row_invariant import bucket_for

SPLIT_TOKENS = 128
"""Part of what a token's bits depend on: two workers that hand KV to one another use the same."""
ATTENTION_TILES = (4, 8, 16, 32, 64)
"""Rows of a query tile, ascending."""
ITEM_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Items computed together. Few enough that their keys stay in cache, and memory is bounded."""

ItemCounts = Mapping[int, Sequence[int]]
"""By tile size, how many items may be computed together, ascending: what `tree_attention` verified."""


class TileGroup(msgspec.Struct, frozen=True, eq=False):
    """Work items (a query tile beside one split of keys) of one tile size."""

    tile_rows: int
    rows: IntArray
    """[items * tile_rows] row of the batch; 0 where the tile is padded."""
    key_slots: IntArray
    """[items * SPLIT_TOKENS] KV slot; the zero slot past the path's end."""
    is_hidden: npt.NDArray[np.bool_]
    """[items, tile_rows, 1, SPLIT_TOKENS] true where the row must not see the key."""


class AttentionPlan(msgspec.Struct, frozen=True, eq=False):
    groups: tuple[TileGroup, ...]
    partials: IntArray
    """[padded rows, splits] index into all groups' item rows, one after another; splits is a power of two."""
    is_padding: npt.NDArray[np.bool_]
    """[padded rows, splits] true past the row's last split."""


class _Tile(msgspec.Struct, frozen=True, eq=False):
    rows: IntArray
    first_split: int
    key_slots: IntArray
    """[splits, SPLIT_TOKENS]"""


class _Items(msgspec.Struct, frozen=True, eq=False):
    rows: IntArray
    """[items, tile rows]"""
    row_positions: IntArray
    """[items, tile rows] -1 where the tile is padded."""
    key_slots: IntArray
    """[items, SPLIT_TOKENS]"""
    key_positions: IntArray
    """[items, SPLIT_TOKENS]"""


def plan_attention(
    batch: RowBatch, num_padded_rows: int, zero_slot: int, item_counts: ItemCounts
) -> AttentionPlan:
    """`zero_slot` is a slot of zeros: stale memory must not reach a product, not even times zero."""
    sizes = sorted(item_counts)
    tiles_by_size: dict[int, list[_Tile]] = {}
    for span in batch.spans:
        for tile in _span_tiles(batch, span, zero_slot, sizes[-1]):
            tiles_by_size.setdefault(bucket_for(len(tile.rows), sizes), []).append(tile)
    num_splits = max(
        (t.first_split + len(t.key_slots) for tiles in tiles_by_size.values() for t in tiles), default=1
    )
    partials = np.full((num_padded_rows, 1 << (num_splits - 1).bit_length()), -1, dtype=np.int64)
    groups: list[TileGroup] = []
    for size, tiles in sorted(tiles_by_size.items()):
        first_partial = sum(len(group.rows) for group in groups)
        for tile in tiles:
            _number_partials(partials, tile, size, first_partial)
            first_partial += size * len(tile.key_slots)
        groups.extend(_groups(_items(batch, size, tiles), zero_slot, item_counts[size]))
    is_padding = partials < 0
    # A missing split points at a partial of the row's own, so that nothing of another row is ever read.
    own_first = np.maximum(partials[:, :1], 0)
    return AttentionPlan(tuple(groups), np.where(is_padding, own_first, partials), is_padding)


def _span_tiles(batch: RowBatch, span: RowSpan, zero_slot: int, max_rows: int) -> Iterator[_Tile]:
    num_context = len(span.context_slots)
    rows = np.arange(span.start, span.end, dtype=np.int64)
    is_chain = bool(np.array_equal(batch.parents[span.start + 1 : span.end], rows[:-1]))
    if is_chain:
        before = np.concatenate([span.context_slots, batch.held(span.start)])
        yield from _path_tiles(batch, [rows], before, 0, zero_slot, max_rows)
        return
    num_shared = num_context // SPLIT_TOKENS
    yield from _shared_tiles(rows, span.context_slots, 0, max_rows)
    for paths in _paths_by_held(batch, span):
        before = np.concatenate([span.context_slots, batch.held(int(paths[0][0]))])
        num_own = len(before) // SPLIT_TOKENS
        if num_own > num_shared:
            yield from _shared_tiles(np.unique(np.concatenate(paths)), before, num_shared, max_rows)
        yield from _path_tiles(batch, paths, before, num_own, zero_slot, max_rows)


def _shared_tiles(rows: IntArray, slots: IntArray, first_split: int, max_rows: int) -> Iterator[_Tile]:
    """Of all rows, beside whole splits of the slots before them from `first_split` on."""
    num_splits = len(slots) // SPLIT_TOKENS
    shared = slots[first_split * SPLIT_TOKENS : num_splits * SPLIT_TOKENS].reshape(-1, SPLIT_TOKENS)
    for start in range(0, len(rows) if len(shared) else 0, max_rows):
        yield _Tile(rows[start : start + max_rows], first_split, shared)


def _path_tiles(
    batch: RowBatch,
    paths: Sequence[IntArray],
    before: IntArray,
    first_split: int,
    zero_slot: int,
    max_rows: int,
) -> Iterator[_Tile]:
    """Of paths behind the slots `before`, beside splits from `first_split` on; a row is in one tile."""
    placed: set[int] = set()
    tail = before[first_split * SPLIT_TOKENS :]
    for path in paths:
        key_slots = np.concatenate([tail, batch.slots[path]])
        own = np.array([index for index, row in enumerate(path) if int(row) not in placed], dtype=np.int64)
        placed.update(int(row) for row in path)
        for start in range(0, len(own), max_rows):
            part = own[start : start + max_rows]
            num_keys = len(tail) + int(part[-1]) + 1
            yield _Tile(path[part], first_split, _padded_splits(key_slots[:num_keys], zero_slot))


def _paths_by_held(batch: RowBatch, span: RowSpan) -> Iterator[list[IntArray]]:
    """From root to leaf, those with the same held ancestors together."""
    found: dict[bytes, list[IntArray]] = {}
    for path in leaf_paths(batch.parents, span.start, span.end):
        found.setdefault(batch.held(path[0]).tobytes(), []).append(np.array(path, dtype=np.int64))
    yield from found.values()


def _padded_splits(slots: IntArray, zero_slot: int) -> IntArray:
    num_splits = -(-len(slots) // SPLIT_TOKENS)
    padded = np.full(num_splits * SPLIT_TOKENS, zero_slot, dtype=np.int64)
    padded[: len(slots)] = slots
    return padded.reshape(num_splits, SPLIT_TOKENS)


def _items(batch: RowBatch, size: int, tiles: Sequence[_Tile]) -> _Items:
    counts = [len(tile.key_slots) for tile in tiles]
    rows = np.zeros((len(tiles), size), dtype=np.int64)
    positions = np.full((len(tiles), size), -1, dtype=np.int64)
    for index, tile in enumerate(tiles):
        rows[index, : len(tile.rows)] = tile.rows
        positions[index, : len(tile.rows)] = batch.positions[tile.rows]
    splits = np.concatenate([tile.first_split + np.arange(len(tile.key_slots)) for tile in tiles])
    return _Items(
        rows=np.repeat(rows, counts, axis=0),
        row_positions=np.repeat(positions, counts, axis=0),
        key_slots=np.concatenate([tile.key_slots for tile in tiles]),
        key_positions=splits[:, None] * SPLIT_TOKENS + np.arange(SPLIT_TOKENS),
    )


def _groups(items: _Items, zero_slot: int, counts: Sequence[int]) -> Iterator[TileGroup]:
    """Items in order, cut into groups of the largest count; the last is padded to a count that exists."""
    for start in range(0, len(items.rows), counts[-1]):
        part = slice(start, start + counts[-1])
        num_items = len(items.rows[part])
        missing = bucket_for(num_items, counts) - num_items
        is_hidden = items.key_positions[part, None, :] > items.row_positions[part, :, None]
        yield TileGroup(
            tile_rows=items.rows.shape[1],
            rows=_extended(items.rows[part], missing, 0).reshape(-1),
            key_slots=_extended(items.key_slots[part], missing, zero_slot).reshape(-1),
            is_hidden=np.pad(is_hidden, ((0, missing), (0, 0), (0, 0)), constant_values=True)[:, :, None, :],
        )


def _extended(items: IntArray, missing: int, value: int) -> IntArray:
    return np.pad(items, ((0, missing), (0, 0)), constant_values=value) if missing else items


def _number_partials(partials: IntArray, tile: _Tile, size: int, first_partial: int) -> None:
    num_splits = len(tile.key_slots)
    ids = first_partial + np.arange(num_splits) * size
    columns = slice(tile.first_split, tile.first_split + num_splits)
    partials[tile.rows, columns] = ids[None, :] + np.arange(len(tile.rows))[:, None]
