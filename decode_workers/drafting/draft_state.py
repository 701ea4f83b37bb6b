"""What drafting remembers of one sequence; it lives and ends with it."""

from collections.abc import Sequence as SequenceOf

from decode_workers.drafting.growth import Found
from decode_workers.drafting.history import HistoryWriter
from decode_workers.drafting.ngrams import NgramIndex
from decode_workers.drafting.phrases import PhraseText
from decode_workers.drafting.place import Source


class DraftState:
    __slots__ = ("expected", "ngrams", "num_learned", "phrases", "streaks", "writer")

    def __init__(self, num_tokens: int) -> None:
        """`num_tokens`: known when drafting begins."""
        self.num_learned = num_tokens
        """Tokens that everything here but `ngrams` and `phrases` has heard of."""
        self.ngrams = NgramIndex()
        self.writer = HistoryWriter()
        self.phrases = PhraseText()
        self.expected: SequenceOf[Found] = ()
        """Where sources see the text now: what the next token is compared with."""
        self.streaks = [0] * len(Source)
        """Tokens in a row that each source has foreseen."""
