"""What every source of drafts speaks in: a place in some earlier text, and guesses at what follows it."""

from collections.abc import Sequence as SequenceOf
from enum import IntEnum
from typing import Protocol

from cluster.messages import Record


class Source(IntEnum):
    """Who proposes."""

    NGRAM = 0
    """The sequence's own prompt and output."""
    HISTORY = 1
    """Earlier outputs of its campaign."""
    PHRASES = 2
    """Items of the catalogue that its request names."""


class Place(Protocol):
    """Where the last tokens of a text were seen before."""

    @property
    def length(self) -> int:
        """Of the tokens that match there: the more, the surer its guesses."""
        ...

    def guesses(self) -> "SequenceOf[Guess]":
        """Distinct tokens with what share of the times each followed; shares add up to 1 at most."""
        ...


class Guess(Record, frozen=True, gc=False):
    token_id: int
    share: float
    place: Place
    """Where the text is if the guess is right."""
