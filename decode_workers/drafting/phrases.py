"""Phrases out of a catalogue: what goes on once a text ends with the beginning of an item.

The catalogue's trie is read in place, whatever its size. Its items were tokenized each by itself; within a
sentence one begins with other tokens, that have the space before it in them. So each word of a text is also
looked for as the tokens of its text without that space.
"""

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from functools import lru_cache

from cluster.catalogue.trie import Int32Array, Trie
from cluster.messages import Record
from cluster.text import Tokenizer
from decode_workers.drafting.place import Guess

MOST_GUESSES = 4
MOST_BEGUN = 8
"""Beginnings of items that a text is followed in, the longest: one that repeats itself is in very many."""
MOST_WORD_TOKENS = 6
"""Of a first word whose tokens differ within a sentence."""
LOOKBACK = 16
"""Tokens looked at where a text was not followed so far: a prompt's last ones, say."""
MAX_WORDS_REMEMBERED = 16_384
ENDS = 1
"""Height of an inner node behind which items only end."""
_NO_TOKENS = ()


class Phrases(Record, frozen=True, gc=False):
    """Of one catalogue: its arrays."""

    trie: Trie
    root_child: Int32Array
    """[vocabulary] the root's child by token; -1 where there is none."""

    def begin(self, token_ids: SequenceOf[int]) -> int | None:
        """The node of a path from the root, where some item goes on with more text behind it."""
        node = int(self.root_child[token_ids[0]]) if token_ids[0] < len(self.root_child) else -1
        if node < 0 or self.trie.height[node] <= ENDS:
            return None
        for token_id in token_ids[1:]:
            child = self.follow(node, token_id)
            if child is None:
                return None
            node = child
        return node

    def follow(self, node: int, token_id: int) -> int | None:
        """The node's child, where some item goes on with more text behind it."""
        child = self.trie.child(node, token_id)
        return None if child is None or self.trie.height[child] <= ENDS else child


class PhrasePlace(Record, frozen=True, gc=False):
    """An inner node below the root: what goes on there, by the items below."""

    trie: Trie
    node: int
    length: int

    def guesses(self) -> list[Guess]:
        """The end of an item is not among them."""
        trie, total = self.trie, int(self.trie.num_items[self.node])
        return [
            Guess(int(trie.token[child]), weight / total, PhrasePlace(trie, child, self.length + 1))
            for child, weight in _heaviest(trie, self.node)
        ]


def _heaviest(trie: Trie, node: int) -> Iterator[tuple[int, int]]:
    """(inner child, items below it), of equals the lower token first. A pass over all children for each."""
    begin, end = trie.first_child[node : node + 2].tolist()
    weights = trie.num_items[begin:end] * (trie.height[begin:end] > 0)
    for _ in range(min(MOST_GUESSES, end - begin)):
        at = int(weights.argmax())
        weight = int(weights[at])
        if weight == 0:
            break
        yield begin + at, weight
        weights[at] = 0


class BareWords:
    """What words of a text are at the beginning of another: their tokens without the space before them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.of = lru_cache(maxsize=MAX_WORDS_REMEMBERED)(self._new)

    def grown(self, word: tuple[int, ...], token_id: int) -> tuple[int, ...]:
        """The word that a text ends with, when `token_id` comes behind `word`; empty where it is none."""
        if self._tokenizer.token_bytes(token_id).startswith(b" "):
            return (token_id,)
        return (*word, token_id) if 0 < len(word) < MOST_WORD_TOKENS else _NO_TOKENS

    def _new(self, word: tuple[int, ...]) -> SequenceOf[int]:
        """Empty where nothing, or no whole character, is left."""
        raw = b"".join([self._tokenizer.token_bytes(token_id) for token_id in word])
        try:
            return self._tokenizer.encode(raw[1:].decode(), allow_special=False)
        except UnicodeDecodeError:
            return _NO_TOKENS


class PhraseText:
    """Where one text is in a catalogue: which items' beginnings it ends with."""

    __slots__ = ("_begun", "_num_followed", "_word")

    def __init__(self) -> None:
        self._begun: list[tuple[int, int]] = []
        """(tokens of the text, inner node), the longest first."""
        self._word: tuple[int, ...] = _NO_TOKENS
        self._num_followed = 0

    def find(self, phrases: Phrases, bare_words: BareWords, tokens: SequenceOf[int]) -> list[PhrasePlace]:
        """After the longest beginnings that `tokens` ends with: several only where they are spelled so.

        The next call is for the same text, grown, and the same catalogue.
        """
        end = len(tokens)
        if end - self._num_followed > LOOKBACK:
            self._begun, self._word, self._num_followed = [], _NO_TOKENS, end - LOOKBACK
        for at in range(self._num_followed, end):
            self._follow(phrases, bare_words, tokens[at])
        self._num_followed = end
        return [
            PhrasePlace(phrases.trie, node, length)
            for length, node in self._begun
            if length == self._begun[0][0]
        ]

    def _follow(self, phrases: Phrases, bare_words: BareWords, token_id: int) -> None:
        begun: list[tuple[int, int]] = []
        for length, node in self._begun:
            child = phrases.follow(node, token_id)
            if child is not None:
                begun.append((length + 1, child))
        self._word = bare_words.grown(self._word, token_id)
        bare = bare_words.of(self._word) if self._word else _NO_TOKENS
        for length, path in ((len(self._word), bare), (1, (token_id,))):
            new = phrases.begin(path) if path else None
            if new is not None and (length, new) not in begun:
                begun.append((length, new))
        begun.sort(reverse=True)
        self._begun = begun[:MOST_BEGUN]
