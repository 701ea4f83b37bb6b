"""Drafters for tests, beside the one that serves."""

import random
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf

import numpy as np

from cluster.messages import CatalogueRef, GenerateRequest, StepCost
from cluster.placement.predict import StepTable, step_table
from cluster.text import Tokenizer
from decode_workers.draft_tree import NO_DRAFT, DraftTree
from decode_workers.drafting.history import History
from decode_workers.drafting.phrases import BareWords, Phrases
from decode_workers.drafting.speculator import Speculator
from decode_workers.scheduler import RowGrant
from decode_workers.sequence import Sequence
from tests.decode_workers.support import EOS, TOKENIZER
from tests.decode_workers.tries import build_trie

DraftOne = Callable[[Sequence, int], DraftTree]
"""(sequence, most nodes) -> a tree below its last token."""
CHEAP_ROWS = step_table((StepCost(rows=1, ms=10.0), StepCost(rows=64, ms=12.0)))


class EqualShares:
    """A drafter that sees one sequence at a time, with as many rows for each."""

    def __init__(self, draft_one: DraftOne) -> None:
        self._draft_one = draft_one

    def expect(self, request: GenerateRequest) -> None:
        pass

    def draft(
        self,
        grants: SequenceOf[RowGrant],
        spare_rows: int,
        table: StepTable | None,
    ) -> list[DraftTree]:
        rooms = [min(grant.max_draft_nodes, spare_rows // len(grants)) for grant in grants]
        return [
            self._draft_one(grant.sequence, room) if room else NO_DRAFT
            for grant, room in zip(grants, rooms, strict=True)
        ]

    def learn(self, sequence: Sequence) -> None:
        pass


def ref_of(name: str) -> CatalogueRef:
    return CatalogueRef(name=name, version=1, checksum=name, num_bytes=0, path="")


def phrases_of(items: Iterable[SequenceOf[int]], end_token: int = EOS) -> Phrases:
    """Of items' tokens, whatever texts they are; equal ones once."""
    trie = build_trie(list(dict.fromkeys((*item, end_token) for item in items)))
    root_child = np.full(int(trie.token.max()) + 1, -1, np.int32)
    begin, end = trie.first_child[:2].tolist()
    root_child[trie.token[begin:end]] = np.arange(begin, end)
    return Phrases(trie, root_child)


class HeldPhrases:
    """What `PhraseFiles` finds, by the catalogues' names, without their files."""

    def __init__(
        self, is_open: Callable[[], bool] = lambda: True, tokenizer: Tokenizer = TOKENIZER, **phrases: Phrases
    ) -> None:
        """`is_open` is asked each time that a catalogue is."""
        self.bare_words = BareWords(tokenizer)
        self.wanted: list[tuple[str, str]] = []
        self._is_open = is_open
        self._phrases = phrases

    def want(self, ref: CatalogueRef, tenant: str) -> None:
        self.wanted.append((ref.name, tenant))

    def find(self, ref: CatalogueRef) -> Phrases | None:
        return self._phrases.get(ref.name) if self._is_open() else None


class Serving(Speculator):
    """The serving drafter where extra rows cost next to nothing, and what it drafted."""

    def __init__(self, phrases: HeldPhrases | None = None, table: StepTable | None = CHEAP_ROWS) -> None:
        super().__init__(History(5_000, 3_000), phrases)
        self.num_drafted = 0
        self._fixed_table = table

    def draft(
        self, grants: SequenceOf[RowGrant], spare_rows: int, table: StepTable | None
    ) -> SequenceOf[DraftTree]:
        trees = super().draft(grants, spare_rows, self._fixed_table or table)
        self.num_drafted += sum(tree.num_nodes for tree in trees)
        return trees


class RandomRows(Serving):
    """It again, but it may use a random number of rows each step."""

    def __init__(self, seed: int, phrases: HeldPhrases | None = None) -> None:
        super().__init__(phrases)
        self._rng = random.Random(seed)

    def draft(
        self, grants: SequenceOf[RowGrant], spare_rows: int, table: StepTable | None
    ) -> SequenceOf[DraftTree]:
        rows = self._rng.randint(0, spare_rows)
        cut = [
            RowGrant(
                sequence=grant.sequence,
                num_forced=grant.num_forced,
                max_draft_nodes=min(grant.max_draft_nodes, rows),
            )
            for grant in grants
        ]
        return super().draft(cut, rows, table)
