from tests.decode_workers.tries import build_trie


def test_a_trie_is_numbered_level_by_level() -> None:
    trie = build_trie([(2, 0), (1, 3, 0), (1, 0)])
    # root; 1 2; 1.0 1.3 2.0; 1.3.0
    assert trie.token.tolist() == [-1, 1, 2, 0, 3, 0, 0]
    assert trie.first_child.tolist() == [1, 3, 5, 6, 6, 7, 7, 7]
    assert trie.leaf_item.tolist() == [-1, -1, -1, 0, -1, 2, 1]
    assert trie.first_item.tolist() == [0, 0, 2, 0, 1, 2, 1]
    assert trie.num_items.tolist() == [3, 2, 1, 1, 1, 1, 1]
    assert trie.num_inner.tolist() == [4, 2, 1, 0, 1, 0, 0]
    assert trie.height.tolist() == [3, 2, 1, 0, 1, 0, 0]
    assert trie.least_rank.tolist() == [0, 1, 0, 2, 1, 0, 1]
    assert trie.upload_rank.tolist() == [2, 1, 0]
