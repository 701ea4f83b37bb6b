"""How often each run of up to `depth` tokens occurs in texts that are appended token by token.

A node is a run. Its link is the node of the run without its first token, which is always there: so a draft
longer than `depth` goes on from the longest run that it ends with. Source of links: E. Ukkonen, On-line
construction of suffix trees, Algorithmica 14 (1995). Nodes are entries of flat arrays: Python's collector of
cycles, which would stop a step, sees a handful of objects however many there are.
"""

from array import array
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

ROOT = 0
NONE = -1
MOST_WALKED = 64
"""Children of one node that are looked at: the most frequent, then the latest new ones."""


class SuffixTrie:
    __slots__ = ("_edges", "_first", "_next", "counts", "depth", "depths", "links", "tokens")

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._edges: dict[int, int] = {}
        """node << 32 | token -> child"""
        self.counts = array("I", [0])
        """[nodes] occurrences of the run."""
        self.links = array("i", [ROOT])
        self.depths = array("B", [0])
        self.tokens = array("i", [NONE])
        """[nodes] the run's last token."""
        self._first = array("i", [NONE])
        self._next = array("i", [NONE])

    @property
    def num_nodes(self) -> int:
        """The root not counted."""
        return len(self.counts) - 1

    def child(self, node: int, token: int) -> int:
        """NONE where the run goes on with no such token."""
        return self._edges.get(node << 32 | token, NONE)

    def append(self, ends: SequenceOf[int], token: int) -> list[int]:
        """Count the runs that end with `token` in a text; at most `depth` new nodes.

        `ends` is what the text's last call returned, `START` at its beginning: the nodes of all runs that it
        ended with, shortest first, but for those that cannot grow.
        """
        edges, counts = self._edges, self.counts
        grown = [ROOT]
        shorter = ROOT
        for node in ends:
            key = node << 32 | token
            child = edges.get(key, NONE)
            if child == NONE:
                child = self._add(node, token, shorter)
                edges[key] = child
            count = counts[child] + 1
            counts[child] = count
            front = self._first[node]
            if front != child and count > counts[front]:
                self._move_to_front(node, child)
            grown.append(child)
            shorter = child
        if len(grown) > self.depth:
            grown.pop()
        return grown

    def find(self, tokens: SequenceOf[int]) -> int:
        """The longest run that `tokens` ends with and that goes on here; ROOT where there is none."""
        end = len(tokens)
        last = self.child(ROOT, tokens[-1]) if end else NONE
        if last == NONE:
            return ROOT
        before = self.child(ROOT, tokens[-2]) if end > 1 else NONE
        if before == NONE or self.child(before, tokens[-1]) == NONE:
            # No run of two, so none of more: what most of a text that nothing foresees comes to.
            return last if self._first[last] != NONE else ROOT
        for start in range(max(0, end - self.depth + 1), end):
            node = ROOT
            for at in range(start, end):
                node = self._edges.get(node << 32 | tokens[at], NONE)
                if node == NONE:
                    break
            else:
                if self._first[node] != NONE:
                    return node
        return ROOT

    def longest(self, ends: SequenceOf[int]) -> int:
        """As `find`, of a text that was appended here: `ends` is what its last call returned."""
        first = self._first
        for node in reversed(ends):
            if first[node] != NONE:
                return node
        return ROOT

    def follow(self, node: int, token: int) -> int:
        """The longest run that the node's and `token` end with and that goes on here."""
        child = self.child(node, token)
        while child == NONE and node != ROOT:
            node = self.links[node]
            child = self.child(node, token)
        if child == NONE:
            return ROOT
        while self._first[child] == NONE:
            child = self.links[child]
        return child

    def children(self, node: int) -> Iterator[int]:
        """The most frequent first, then no order; at most MOST_WALKED."""
        child, left = self._first[node], MOST_WALKED
        while child != NONE and left:
            yield child
            child = self._next[child]
            left -= 1

    def _add(self, parent: int, token: int, link: int) -> int:
        node = len(self.counts)
        self.counts.append(0)
        self.links.append(link)
        self.depths.append(self.depths[parent] + 1)
        self.tokens.append(token)
        self._first.append(NONE)
        front = self._first[parent]
        if front == NONE:
            self._next.append(NONE)
            self._first[parent] = node
        else:
            self._next.append(self._next[front])
            self._next[front] = node
        return node

    def _move_to_front(self, parent: int, child: int) -> None:
        before = self._first[parent]
        while self._next[before] != child:
            before = self._next[before]
        self._next[before] = self._next[child]
        self._next[child] = self._first[parent]
        self._first[parent] = child


START = (ROOT,)
