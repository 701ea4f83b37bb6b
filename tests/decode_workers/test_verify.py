import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode_workers.draft_tree import NO_DRAFT, DraftTree, chain_tree, check_tree, node_depths
from decode_workers.step_batch import NO_PARENT
from decode_workers.verify import Acceptance, verify


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    size = draw(st.integers(0, 12))
    return DraftTree(
        token_ids=tuple(draw(st.integers(0, 3)) for _ in range(size)),
        parents=tuple(draw(st.integers(NO_PARENT, node - 1)) for node in range(size)),
    )


@given(trees(), st.lists(st.integers(0, 3), min_size=13, max_size=13))
def test_the_path_is_the_targets_own_text(tree: DraftTree, truth: list[int]) -> None:
    # A target whose token depends on depth alone: whatever the tree, its tokens are a prefix of `truth`.
    depths = node_depths(tree)
    asked: list[int] = []

    def target_token(node: int) -> int:
        asked.append(node)
        return truth[0 if node == NO_PARENT else depths[node]]

    acceptance = verify(tree, target_token)
    assert list(acceptance.token_ids) == truth[: len(acceptance.token_ids)]
    assert len(acceptance.token_ids) == len(acceptance.path) + 1
    assert asked == [NO_PARENT, *acceptance.path]
    previous = NO_PARENT
    for node, token_id in zip(acceptance.path, acceptance.token_ids, strict=False):
        assert tree.parents[node] == previous
        assert tree.token_ids[node] == token_id
        previous = node
    stopped_at = acceptance.path[-1] if acceptance.path else NO_PARENT
    children = [i for i, parent in enumerate(tree.parents) if parent == stopped_at]
    assert acceptance.token_ids[-1] not in [tree.token_ids[child] for child in children]


def test_without_a_draft_one_token_comes() -> None:
    assert verify(NO_DRAFT, lambda _node: 5) == Acceptance(token_ids=(5,), path=())


def test_a_whole_chain_and_the_bonus_token() -> None:
    truth = {NO_PARENT: 7, 0: 8, 1: 9, 2: 4}
    acceptance = verify(chain_tree((7, 8, 9)), truth.__getitem__)
    assert acceptance == Acceptance(token_ids=(7, 8, 9, 4), path=(0, 1, 2))


def test_the_first_of_equal_siblings_is_followed() -> None:
    tree = DraftTree(token_ids=(7, 7, 8), parents=(NO_PARENT, NO_PARENT, 1))
    assert verify(tree, {NO_PARENT: 7, 0: 8}.__getitem__).path == (0,)


@pytest.mark.parametrize(
    ("token_ids", "parents"),
    [((1, 2), (NO_PARENT,)), ((1,), (0,)), ((1, 2), (1, NO_PARENT)), ((1,) * 4, (-1,) * 4)],
)
def test_malformed_trees_fail_an_assertion(token_ids: tuple[int, ...], parents: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError):
        check_tree(DraftTree(token_ids=token_ids, parents=parents), max_nodes=3)
