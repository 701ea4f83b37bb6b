"""Candidate tokens with parents: what a drafter proposes and a step verifies."""

from cluster.messages import Record
from decode_workers.step_batch import NO_PARENT


class DraftTree(Record, frozen=True, kw_only=True):
    """Nodes below the last known token, every parent before its children."""

    token_ids: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    """Index of each node's parent, or NO_PARENT for a child of the last known token."""

    @property
    def num_nodes(self) -> int:
        return len(self.token_ids)


NO_DRAFT = DraftTree()


def check_tree(tree: DraftTree, max_nodes: int) -> None:
    """Assert what a step relies on; siblings may repeat a token, the first of them is followed."""
    assert len(tree.token_ids) == len(tree.parents), "a node without a parent entry"
    assert tree.num_nodes <= max_nodes, f"{tree.num_nodes} nodes drafted, {max_nodes} asked for"
    for node, parent in enumerate(tree.parents):
        assert NO_PARENT <= parent < node, f"node {node} has parent {parent}, not before it"


def node_depths(tree: DraftTree) -> list[int]:
    """Of each node: 1 for a child of the last known token."""
    depths: list[int] = []
    for parent in tree.parents:
        depths.append(1 if parent == NO_PARENT else depths[parent] + 1)
    return depths


def chain_tree(token_ids: tuple[int, ...]) -> DraftTree:
    """Each token below the one before it."""
    return DraftTree(token_ids=token_ids, parents=tuple(range(NO_PARENT, len(token_ids) - 1)))
