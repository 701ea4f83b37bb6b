"""Regions of the staging memory against a plain list of what is taken."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prefill_workers.staging import StagingArena, StagingFullError, open_staging

PAGE = 4096
PAGES = 8


class Regions(RuleBasedStateMachine):
    """Each is filled with a number of its own when it is taken: whoever overlaps it is found out."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = StagingArena(PAGES * PAGE)
        self.taken: dict[int, tuple[int, int]] = {}
        self.number = 0

    @rule(
        num_bytes=st.sampled_from([0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, PAGES * PAGE, PAGES * PAGE + 1])
    )
    def take(self, num_bytes: int) -> None:
        if not self.arena.can_take(num_bytes):
            with pytest.raises(StagingFullError, match=f"no {num_bytes} bytes in a row"):
                self.arena.take(num_bytes)
            assert self.taken or num_bytes > PAGES * PAGE, "there is room in an empty one"
            return
        start = self.arena.take(num_bytes)
        assert start not in self.taken
        assert 0 <= start <= start + num_bytes <= self.arena.num_bytes
        self.number = self.number % 255 + 1
        self.arena.view(start, num_bytes)[:] = bytes([self.number]) * num_bytes
        self.taken[start] = (num_bytes, self.number)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        start = data.draw(st.sampled_from(sorted(self.taken)))
        self.arena.give_back(start)
        del self.taken[start]

    @invariant()
    def nobody_wrote_over_another(self) -> None:
        for start, (num_bytes, number) in self.taken.items():
            assert bytes(self.arena.view(start, num_bytes)) == bytes([number]) * num_bytes

    @invariant()
    def whole_pages_are_taken(self) -> None:
        pages = sum(max(1, -(-num_bytes // PAGE)) for num_bytes, _ in self.taken.values())
        assert self.arena.num_bytes_taken == pages * PAGE

    def teardown(self) -> None:
        self.arena.close()


Regions.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestRegions = Regions.TestCase


def test_what_one_process_writes_another_reads_and_a_view_outlives_the_arena() -> None:
    arena = StagingArena(PAGE)
    there = open_staging(arena.path)
    view = arena.view(arena.take(10), 10)
    there[:10] = 7
    arena.close()
    assert bytes(view) == b"\x07" * 10
