"""Tries built level by level beside a slow, obvious builder."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.catalogue.trie import ROOT, Trie
from cluster.catalogue.trie_build import MAX_PATH_TOKENS, NODE_FIELDS, EqualPathsError, trie_of
from tests.cluster.catalogue.support import slow_trie


def fields_of(trie: Trie) -> dict[str, list[int]]:
    return {name: getattr(trie, name).tolist() for name in trie.__struct_fields__}


few_tokens = st.lists(st.integers(1, 4), min_size=1, max_size=7)
many_tokens = st.lists(st.integers(1, 60_000), min_size=1, max_size=66)
any_paths = st.lists(st.one_of(few_tokens, many_tokens), min_size=1, max_size=60, unique_by=tuple)


@given(paths=any_paths, end_token=st.sampled_from([0, 60_001, 4_000_000]))
@settings(deadline=None)
def test_equals_the_slow_builder(paths: list[list[int]], end_token: int) -> None:
    trie = trie_of(paths, end_token)
    assert fields_of(trie) == slow_trie(paths, end_token)
    for name, dtype in {**NODE_FIELDS, "upload_rank": np.int32}.items():
        assert getattr(trie, name).dtype == dtype


@pytest.mark.parametrize(
    "paths",
    [
        [[7]],
        [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]],
        [[1, 2, 3, 4], [1, 2, 3], [1, 2], [1]],
        [[i] for i in range(300, 0, -1)],
        [[5] * length for length in range(1, 200)],
    ],
    ids=["one item", "prefixes", "prefixes backwards", "wide", "deep"],
)
def test_edges_equal_the_slow_builder(paths: list[list[int]]) -> None:
    assert fields_of(trie_of(paths, 0)) == slow_trie(paths, 0)


def test_a_large_random_trie_equals_the_slow_builder() -> None:
    rng = np.random.default_rng(11)
    paths = sorted({tuple(rng.integers(1, 6, rng.integers(1, 9)).tolist()) for _ in range(4000)})
    rng.shuffle(paths)
    assert fields_of(trie_of(paths, 0)) == slow_trie(paths, 0)


@given(
    paths=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=30),
)
@settings(deadline=None)
def test_equal_paths_are_named(paths: list[list[int]]) -> None:
    first = {tuple(path): rank for rank, path in reversed(list(enumerate(paths)))}
    expected = {rank: first[tuple(path)] for rank, path in enumerate(paths) if first[tuple(path)] != rank}
    if not expected:
        assert trie_of(paths, 0).count_items == len(paths)
        return
    with pytest.raises(EqualPathsError) as found:
        trie_of(paths, 0)
    later, earlier = found.value.later.tolist(), found.value.earlier.tolist()
    assert dict(zip(later, earlier, strict=True)) == expected


@given(paths=any_paths)
@settings(deadline=None)
def test_children_are_found_by_token(paths: list[list[int]]) -> None:
    trie = trie_of(paths, 0)
    for item, rank in enumerate(trie.upload_rank.tolist()):
        node: int | None = ROOT
        for token in (*paths[rank], 0):
            assert node is not None
            assert trie.child(node, 70_000) is None
            node = trie.child(node, token)
        assert node is not None
        assert trie.leaf_item[node] == item


def test_a_path_too_long_is_refused() -> None:
    assert trie_of([[1] * (MAX_PATH_TOKENS - 1)], 0).height[ROOT] == MAX_PATH_TOKENS
    with pytest.raises(ValueError, match="more than 255 tokens"):
        trie_of([[1] * MAX_PATH_TOKENS], 0)
