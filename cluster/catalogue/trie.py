"""A catalogue's items as a trie of their tokens, in compressed sparse rows.

Every item's path is its text's tokens and then the model's end of text: so no item is a prefix of another,
and a path's probability is that of the whole item. A node is *inner* (a token of some text: a row that a step
can run) or a *leaf* (an end: never run, as its logit is its parent's).

Nodes are numbered level by level, siblings side by side by ascending token; node 0 is the root, and stands
for the context. Items are sorted by their paths, so those below a node are a range.
"""

import msgspec
import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
UInt8Array = npt.NDArray[np.uint8]

ROOT = 0
INNER = -1


class Trie(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Arrays of nodes; read-only, and memory-mapped where they come from a file."""

    first_child: Int32Array
    """[nodes + 1] children of node n are [first_child[n], first_child[n + 1]): ascending tokens, unique."""
    token: Int32Array
    """[nodes] the token that leads here; -1 for the root."""
    first_item: Int32Array
    """[nodes] items below node n are the sorted items [first_item[n], first_item[n] + num_items[n])."""
    num_items: Int32Array
    """[nodes] at least 1."""
    leaf_item: Int32Array
    """[nodes] the sorted item that ends here; INNER for an inner node."""
    num_inner: Int32Array
    """[nodes] inner nodes of the subtree, the node itself included: rows that score all items below it. 0 for
    a leaf."""
    height: UInt8Array
    """[nodes] inner nodes on the longest path down from here, the node itself included; 0 for a leaf."""
    least_rank: Int32Array
    """[nodes] the lowest upload rank of the items below: what ties are broken by."""
    upload_rank: Int32Array
    """[items] where each sorted item stood in the upload, from 0."""

    @property
    def num_nodes(self) -> int:
        return len(self.token)

    @property
    def count_items(self) -> int:
        return len(self.upload_rank)

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that `token` leads to."""
        begin, end = self.first_child[node : node + 2].tolist()
        # A number of another type would have all of the children converted to it.
        found: int = begin + int(self.token[begin:end].searchsorted(np.int32(token)))
        return found if found < end and self.token[found] == token else None
