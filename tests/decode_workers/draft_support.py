"""Drafters for tests, beside the one that serves."""

import random
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from cluster.messages import StepCost
from cluster.placement.predict import StepTable, step_table
from decode_workers.draft_tree import NO_DRAFT, DraftTree
from decode_workers.drafting.history import History
from decode_workers.drafting.phrases import PhraseBook
from decode_workers.drafting.speculator import Speculator
from decode_workers.scheduler import RowGrant
from decode_workers.sequence import Sequence

DraftOne = Callable[[Sequence, int], DraftTree]
"""(sequence, most nodes) -> a tree below its last token."""
CHEAP_ROWS = step_table((StepCost(rows=1, ms=10.0), StepCost(rows=64, ms=12.0)))


class EqualShares:
    """A drafter that sees one sequence at a time, with as many rows for each."""

    def __init__(self, draft_one: DraftOne) -> None:
        self._draft_one = draft_one

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


class Serving(Speculator):
    """The serving drafter where extra rows cost next to nothing, and what it drafted."""

    def __init__(self, phrases: PhraseBook | None = None, table: StepTable | None = CHEAP_ROWS) -> None:
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

    def __init__(self, seed: int, phrases: PhraseBook | None = None) -> None:
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
