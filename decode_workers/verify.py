"""Acceptance of a draft tree: the target's own tokens, for as long as the tree foresaw them."""

from collections.abc import Callable

from cluster.messages import Record
from decode_workers.draft_tree import DraftTree
from decode_workers.step_batch import NO_PARENT

TargetToken = Callable[[int], int]
"""Node -> the token that the target emits after it; NO_PARENT stands for the last known token's row."""


class Acceptance(Record, frozen=True, kw_only=True):
    token_ids: tuple[int, ...]
    """To emit, in order: one for each node of the path, then the bonus token."""
    path: tuple[int, ...]
    """Accepted nodes, root side first: those whose KV is the sequence's from now on."""


def verify(tree: DraftTree, target_token: TargetToken) -> Acceptance:
    """Take the target's token at the node, follow the child that equals it, else stop.

    So the tokens are those that one row a step would give, drawn or greedy alike, whatever the tree.
    `target_token` is asked along the accepted path only.
    """
    token_ids: list[int] = []
    path: list[int] = []
    node = NO_PARENT
    while True:
        token_id = target_token(node)
        token_ids.append(token_id)
        child = _child(tree, node, token_id)
        if child is None:
            return Acceptance(token_ids=tuple(token_ids), path=tuple(path))
        path.append(child)
        node = child


def _child(tree: DraftTree, node: int, token_id: int) -> int | None:
    for child in range(node + 1, tree.num_nodes):
        if tree.parents[child] == node and tree.token_ids[child] == token_id:
            return child
    return None
