"""Builds a trie level by level, all items at once.

A level's nodes are the distinct (parent, token) pairs of the items that have not ended, so sorting those
pairs sorts the items within their parents' ranges, numbers the nodes as `Trie` has them, and finds equal
paths. What needs children (`num_inner`, `height`) comes after, from the last level up. Memory is that of one
level: the nodes of others are on disk.
"""

import tempfile
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from cluster.catalogue.spool import AnyArray, ArraySpool
from cluster.catalogue.trie import INNER, Int32Array, Trie

NODE_FIELDS: dict[str, type] = {
    "first_child": np.int32,
    "token": np.int32,
    "first_item": np.int32,
    "num_items": np.int32,
    "leaf_item": np.int32,
    "num_inner": np.int32,
    "height": np.uint8,
    "least_rank": np.int32,
}
MAX_PATH_TOKENS = 255
"""`height` is one byte; the root is one of the nodes that it counts."""

LevelProgress = Callable[[int, int], None]
"""Items that have ended, of how many."""


class BuiltTrie(msgspec.Struct, frozen=True):
    """A trie whose arrays of nodes are in `nodes`, on disk."""

    nodes: dict[str, ArraySpool]
    num_nodes: int
    upload_rank: Int32Array


class EqualPathsError(ValueError):
    """Items of one path; `later[i]` is an upload rank whose path `earlier[i]` has, too."""

    def __init__(self, earlier: Int32Array, later: Int32Array) -> None:
        super().__init__(f"{len(later)} items have the tokens of others")
        self.earlier = earlier
        self.later = later


def build_trie(
    tokens: AnyArray,
    starts: npt.NDArray[np.int64],
    *,
    end_token: int,
    vocab_size: int,
    folder: Path,
    progress: LevelProgress | None = None,
) -> BuiltTrie:
    """Item i's path is tokens[starts[i]:], up to the first `end_token`, which must be there within
    MAX_PATH_TOKENS. At least one item. Raises EqualPathsError."""
    nodes = {field: ArraySpool(folder, f"trie.{field}", dtype) for field, dtype in NODE_FIELDS.items()}
    try:
        level_starts, order = _build_down(tokens, starts, end_token, vocab_size, nodes, progress)
        _build_up(level_starts, nodes)
    except BaseException:
        for spool in nodes.values():
            spool.close()
        raise
    return BuiltTrie(nodes, level_starts[-1], order)


def trie_of(paths: Sequence[Sequence[int]], end_token: int) -> Trie:
    """In memory, of texts' tokens without the end. Raises EqualPathsError."""
    tokens = np.fromiter(chain.from_iterable((*path, end_token) for path in paths), np.int32)
    lengths = np.fromiter((len(path) + 1 for path in paths), np.int64, len(paths))
    with tempfile.TemporaryDirectory(prefix="headrace-trie-") as folder:
        built = build_trie(
            tokens,
            np.cumsum(lengths) - lengths,
            end_token=end_token,
            vocab_size=int(tokens.max()) + 1,
            folder=Path(folder),
        )
        arrays = {}
        for field, spool in built.nodes.items():
            arrays[field] = spool.read()
            arrays[field].flags.writeable = False
            spool.close()
    return Trie(**arrays, upload_rank=built.upload_rank)


def _build_down(
    tokens: AnyArray,
    starts: npt.NDArray[np.int64],
    end_token: int,
    vocab_size: int,
    nodes: dict[str, ArraySpool],
    progress: LevelProgress | None,
) -> tuple[list[int], Int32Array]:
    """Each level's first node, the number of nodes at the end; and the items in the order of their paths."""
    num_items = len(starts)
    order = np.arange(num_items, dtype=np.int32)
    slots = order.copy()  # of `order`, those whose items have not ended
    parents = np.zeros(num_items, np.int32)  # of each slot, within the level above
    _append(nodes, token=-1, first_item=0, num_items=num_items, leaf_item=INNER, least_rank=0)
    level_starts, num_parents, depth = [0, 1], 1, 0
    equal: list[tuple[Int32Array, Int32Array]] = []
    while len(slots):
        if depth == MAX_PATH_TOKENS:
            raise ValueError(f"a path of more than {MAX_PATH_TOKENS} tokens")
        items = order[slots]
        keys = parents.astype(np.int64)
        keys *= vocab_size
        keys += tokens[starts[items] + depth]
        sorting = np.argsort(keys, kind="stable")
        keys, items = keys[sorting], items[sorting]
        del sorting
        order[slots] = items
        begins = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
        keys = keys[begins]
        token = (keys % vocab_size).astype(np.int32)
        counts = np.diff(begins, append=len(items)).astype(np.int32)
        is_leaf = token == end_token
        first_item = slots[begins]
        least_rank = np.minimum.reduceat(items, begins)
        num_children = np.bincount(keys // vocab_size, minlength=num_parents)
        nodes["first_child"].extend(level_starts[-1] + np.cumsum(num_children) - num_children)
        _append(
            nodes,
            token=token,
            first_item=first_item,
            num_items=counts,
            leaf_item=np.where(is_leaf, first_item, INNER),
            least_rank=least_rank,
        )
        if (counts[is_leaf] > 1).any():
            of_item = np.repeat(np.where(is_leaf, least_rank, -1), counts)
            is_later = (of_item >= 0) & (of_item != items)
            equal.append((of_item[is_later], items[is_later]))
        goes_on = np.repeat(~is_leaf, counts)
        num_parents = len(token)
        parents = np.repeat(np.arange(num_parents, dtype=np.int32), counts)[goes_on]
        slots = slots[goes_on]
        level_starts.append(level_starts[-1] + num_parents)
        depth += 1
        if progress is not None:
            progress(num_items - len(slots), num_items)
    nodes["first_child"].extend(np.full(num_parents + 1, level_starts[-1]))
    if equal:
        raise EqualPathsError(*(np.concatenate(side) for side in zip(*equal, strict=True)))
    return level_starts, order


def _append(nodes: dict[str, ArraySpool], **values: npt.ArrayLike) -> None:
    for field, value in values.items():
        nodes[field].extend(np.atleast_1d(value))


def _build_up(level_starts: list[int], nodes: dict[str, ArraySpool]) -> None:
    child_inner = np.zeros(0, np.int32)
    child_height = np.zeros(0, np.uint8)
    for start, end in reversed(list(pairwise(level_starts))):
        first_child = nodes["first_child"].read(start, end - start + 1)
        is_inner = first_child[1:] > first_child[:-1]
        num_inner = np.zeros(end - start, np.int32)
        height = np.zeros(end - start, np.uint8)
        if is_inner.any():
            begins = first_child[:-1][is_inner] - end
            num_inner[is_inner] = 1 + np.add.reduceat(child_inner, begins)
            height[is_inner] = 1 + np.maximum.reduceat(child_height, begins)
        nodes["num_inner"].overwrite(start, num_inner)
        nodes["height"].overwrite(start, height)
        child_inner, child_height = num_inner, height
