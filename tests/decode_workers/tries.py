"""Tries built the slow, obvious way."""

from collections.abc import Sequence

import numpy as np

from cluster.catalogue.trie import INNER, Trie

Path = tuple[int, ...]


def build_trie(paths: Sequence[Path]) -> Trie:
    """Of distinct items' paths in the order of their upload, each with its end-of-text token."""
    assert len(set(paths)) == len(paths) > 0
    order = sorted(range(len(paths)), key=lambda rank: paths[rank])
    items = [paths[rank] for rank in order]
    levels: list[list[Path]] = [[()]]
    while levels[-1]:
        depth = len(levels)
        levels.append(sorted({path[:depth] for path in items if len(path) >= depth}))
    nodes = [prefix for level in levels for prefix in level]
    below: dict[Path, list[int]] = {prefix: [] for prefix in nodes}
    for item, path in enumerate(items):
        for depth in range(len(path) + 1):
            below[path[:depth]].append(item)
    children: dict[Path, list[Path]] = {prefix: [] for prefix in nodes}
    for prefix in nodes[1:]:
        children[prefix[:-1]].append(prefix)
    item_of = {path: item for item, path in enumerate(items)}
    height: dict[Path, int] = {}
    num_inner: dict[Path, int] = {}
    for prefix in reversed(nodes):
        is_inner = prefix not in item_of
        height[prefix] = is_inner + max((height[child] for child in children[prefix]), default=0)
        num_inner[prefix] = is_inner + sum(num_inner[child] for child in children[prefix])
    first_child = np.cumsum([1, *(len(children[prefix]) for prefix in nodes)])
    return Trie(
        first_child=first_child.astype(np.int32),
        token=np.array([prefix[-1] if prefix else -1 for prefix in nodes], dtype=np.int32),
        first_item=np.array([below[prefix][0] for prefix in nodes], dtype=np.int32),
        num_items=np.array([len(below[prefix]) for prefix in nodes], dtype=np.int32),
        leaf_item=np.array([item_of.get(prefix, INNER) for prefix in nodes], dtype=np.int32),
        num_inner=np.array([num_inner[prefix] for prefix in nodes], dtype=np.int32),
        height=np.array([height[prefix] for prefix in nodes], dtype=np.uint8),
        least_rank=np.array([min(order[item] for item in below[prefix]) for prefix in nodes], dtype=np.int32),
        upload_rank=np.array(order, dtype=np.int32),
    )
