"""Phrases that a tenant uploads: what goes on once an output ends with the beginning of one.

Source of fallbacks: A. Aho, M. Corasick, Efficient string matching, CACM 18 (1975).
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from operator import itemgetter

from cluster.messages import Record
from decode_workers.drafting.place import Guess

ROOT = 0
MAX_PHRASE_TOKENS = 65_536
"""Of all phrases of a tenant together."""
MOST_GUESSES = 4


class TooManyPhrasesError(ValueError):
    """More tokens than a tenant's phrases may have. For whoever uploads them."""


class PhraseTrie:
    """Immutable once built. Raises TooManyPhrasesError."""

    __slots__ = ("_children", "_depths", "_fallbacks", "_weights")

    def __init__(self, phrases: Iterable[SequenceOf[int]]) -> None:
        self._children: list[dict[int, int]] = [{}]
        self._depths = [0]
        self._weights = [0]
        """[nodes] phrases that begin so."""
        num_tokens = 0
        for phrase in phrases:
            num_tokens += len(phrase)
            if num_tokens > MAX_PHRASE_TOKENS:
                raise TooManyPhrasesError(f"phrases of more than {MAX_PHRASE_TOKENS} tokens in all")
            self._add(phrase)
        self._fallbacks = [ROOT] * len(self._children)
        self._link()

    @property
    def num_nodes(self) -> int:
        """The root not counted."""
        return len(self._children) - 1

    def follow(self, node: int, token: int) -> int:
        """The longest beginning of a phrase that the node's text and `token` end with."""
        while True:
            child = self._children[node].get(token)
            if child is not None:
                return child
            if node == ROOT:
                return ROOT
            node = self._fallbacks[node]

    def place(self, node: int, length: int = 0) -> "PhrasePlace | None":
        """None where nothing can follow; `length` where more is known to match."""
        while node != ROOT and not self._children[node]:
            node = self._fallbacks[node]
        return None if node == ROOT else PhrasePlace(self, node, max(length, self._depths[node]))

    def guesses(self, place: "PhrasePlace") -> list[Guess]:
        node = place.node
        children = [(token, self._weights[child]) for token, child in self._children[node].items()]
        total = self._weights[node]
        best = sorted(children, key=itemgetter(1), reverse=True)[:MOST_GUESSES]
        return [Guess(token, weight / total, self._after(place, token)) for token, weight in best]

    def _after(self, place: "PhrasePlace", token: int) -> "PhrasePlace":
        node = self.follow(place.node, token)
        return self.place(node, place.length + 1) or PhrasePlace(self, ROOT, 0)

    def _add(self, phrase: SequenceOf[int]) -> None:
        node = ROOT
        for token in phrase:
            child = self._children[node].get(token)
            if child is None:
                child = len(self._children)
                self._children[node][token] = child
                self._children.append({})
                self._depths.append(self._depths[node] + 1)
                self._weights.append(0)
            node = child
            self._weights[node] += 1

    def _link(self) -> None:
        """Breadth first: a fallback is always shorter."""
        waiting = deque(self._children[ROOT].values())
        while waiting:
            node = waiting.popleft()
            for token, child in self._children[node].items():
                self._fallbacks[child] = self.follow(self._fallbacks[node], token)
                waiting.append(child)


class PhrasePlace(Record, frozen=True, gc=False):
    trie: PhraseTrie
    node: int
    length: int

    def guesses(self) -> list[Guess]:
        return self.trie.guesses(self) if self.node != ROOT else []


class PhraseBook:
    """Each tenant's phrases; of more than `max_tenants`, the least recently set go."""

    def __init__(self, max_tenants: int = 256) -> None:
        self._max_tenants = max_tenants
        self._tries: OrderedDict[str, PhraseTrie] = OrderedDict()

    def set(self, tenant: str, phrases: Iterable[SequenceOf[int]]) -> None:
        """Instead of those before. Raises TooManyPhrasesError, having changed nothing."""
        trie = PhraseTrie(phrases)
        self._tries.pop(tenant, None)
        if trie.num_nodes:
            self._tries[tenant] = trie
        if len(self._tries) > self._max_tenants:
            self._tries.popitem(last=False)

    def get(self, tenant: str) -> PhraseTrie | None:
        return self._tries.get(tenant)
