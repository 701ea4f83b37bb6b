"""Drafts out of a sequence's own text: what followed the last time that its last tokens stood there.

Source: A. Saxena, Prompt Lookup Decoding (2023); here the index grows with the text.
"""

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from itertools import islice

from cluster.messages import Record
from decode_workers.drafting.place import Guess

SHORTEST, LONGEST = 2, 5
"""Tokens that must match, and as many as are looked for."""
MOST_COUNTED = 16
"""Of a match that goes on further back."""


class NgramPlace(Record, frozen=True, gc=False):
    """Position `at` follows the match. The text's end, once reached, is taken to repeat itself."""

    tokens: SequenceOf[int]
    """The sequence's own, as they grow: a place is good until then."""
    at: int
    length: int
    num_tokens: int
    """Of the text when the match was found."""
    period: int
    """How far back the match lies."""

    def guesses(self) -> list[Guess]:
        following = self.at + 1
        if following == self.num_tokens:
            following -= self.period
        place = NgramPlace(self.tokens, following, self.length + 1, self.num_tokens, self.period)
        return [Guess(self.tokens[self.at], 1.0, place)]


class NgramIndex:
    """Where each run of SHORTEST to LONGEST tokens was last followed by another token."""

    __slots__ = ("_num_indexed", "_places")

    def __init__(self) -> None:
        self._places: list[dict[tuple[int, ...], int]] = [{} for _ in range(SHORTEST, LONGEST + 1)]
        self._num_indexed = 0

    def catch_up(self, tokens: SequenceOf[int]) -> None:
        """Index what was appended to `tokens` since: a few dictionary entries a token."""
        end = len(tokens)
        for size, places in enumerate(self._places, start=SHORTEST):
            first = max(size, self._num_indexed)
            if first == end - 1:
                places[tuple(tokens[first - size : first])] = first
            elif first < end:
                places.update(zip(_runs(tokens, first - size, end - 1, size), range(first, end), strict=True))
        self._num_indexed = end

    def find(self, tokens: SequenceOf[int]) -> NgramPlace | None:
        """After the latest earlier occurrence of the longest run that `tokens` ends with and that has one."""
        num_tokens = len(tokens)
        for size in range(min(LONGEST, num_tokens), SHORTEST - 1, -1):
            at = self._places[size - SHORTEST].get(tuple(tokens[num_tokens - size :]))
            if at is not None:
                length = _length(tokens, at, size)
                return NgramPlace(tokens, at, length, num_tokens, num_tokens - at)
        return None


def _runs(tokens: SequenceOf[int], first: int, end: int, size: int) -> Iterator[tuple[int, ...]]:
    """Every run of `size` tokens within `tokens[first:end]`, in order."""
    piece = tokens[first:end]
    return zip(*(islice(piece, start, len(piece) - size + 1 + start) for start in range(size)), strict=True)


def _length(tokens: SequenceOf[int], at: int, length: int) -> int:
    end = len(tokens)
    while length < min(MOST_COUNTED, at) and tokens[at - length - 1] == tokens[end - length - 1]:
        length += 1
    return length
