"""Drafters for tests, beside the one that serves."""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from cluster.placement.predict import StepTable
from decode_workers.draft_tree import NO_DRAFT, DraftTree
from decode_workers.scheduler import RowGrant
from decode_workers.sequence import Sequence

DraftOne = Callable[[Sequence, int], DraftTree]
"""(sequence, most nodes) -> a tree below its last token."""


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
