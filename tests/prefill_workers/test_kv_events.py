"""TensorRT-LLM's events against a model of its cache that hashes every prefix anew."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.block_hash import chain_hashes, chain_salt
from cluster.ids import ChainHash
from prefill_workers.kv_events import KvEvents

ENGINE = 4
MAX_BLOCKS = 12
TENANTS = ("", "a", "b")
BLOCKS = ((1, 1, 1, 1), (1, 1, 2, 2), (1, 1, 2, 3))
"""Of few tokens, so that prefixes meet, also inside of a block."""
INDEX_SIZES = (1, 2, 3, 4, 6, 8)

Path = tuple[str, tuple[tuple[int, ...], ...]]
"""A cached block: its tenant, and the blocks from the root to it."""


def stored(path: Path, blocks, *, parent=..., names_salts: bool = True) -> dict:
    tenant, before = path
    found = []
    for block in blocks:
        before = (*before, block)
        one = {
            "type": "stored_block",
            "block_hash": name((tenant, before)),
            "tokens": [{"type": "unique_token", "token_id": t, "token_extra_id": 0} for t in block],
            "cache_level": 0,
            "priority": 35,
        }
        found.append({**one, "cache_salt": tenant or None} if names_salts else one)
    return {
        "type": "stored",
        "parent_hash": (name(path) if path[1] else None) if parent is ... else parent,
        "blocks": found,
    }


def name(path: Path) -> int:
    return hash(path) & (2**64 - 1)


def hashes_ending_in(path: Path, size: int) -> set[ChainHash]:
    """Of the index's blocks whose last token is in the path's last block."""
    tenant, blocks = path
    salt = chain_salt("layout", tenant)
    tokens = [token for block in blocks for token in block]
    return set(chain_hashes(tokens, size, salt)) - set(chain_hashes(tokens[: -len(blocks[-1])], size, salt))


def tell(events: KvEvents, *data: dict, first_id: int = 0) -> None:
    events.take({"event_id": first_id + i, "data": one, "window_size": 64} for i, one in enumerate(data))


class KvEventsMachine(RuleBasedStateMachine):
    """`cached` is the engine's cache; `visible` what can be known of it: all, until an event is lost."""

    @initialize(index=st.sampled_from(INDEX_SIZES), names_salts=st.booleans())
    def start(self, index: int, names_salts: bool) -> None:
        self.index, self.names_salts = index, names_salts
        self.events = KvEvents(
            "layout", engine_block_tokens=ENGINE, index_block_tokens=index, max_blocks=MAX_BLOCKS
        )
        self.cached: set[Path] = set()
        self.visible: set[Path] = set()
        self.announced: set[ChainHash] = set()
        self.next_id, self.is_next_lost = 0, False
        self.is_complete = True
        self.tell({"type": "created", "num_blocks_per_cache_level": [MAX_BLOCKS, 0]})

    def tell(self, data: dict) -> bool:
        """Whether it arrived."""
        event = {"event_id": self.next_id, "data": data, "window_size": 64}
        self.next_id += 1
        if self.is_next_lost:
            self.is_next_lost, self.is_behind_gap = False, True
            self.is_complete = False
            return False
        if getattr(self, "is_behind_gap", False):
            self.visible, self.is_behind_gap = set(), False
        self.events.take([event])
        return True

    def tenants(self) -> tuple[str, ...]:
        # Without salts, one prompt's beginning belongs to one tenant here: see the test of several below.
        return TENANTS if self.names_salts else TENANTS[1:2]

    @rule(data=st.data(), blocks=st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=3))
    def store(self, data, blocks) -> None:
        tenant = data.draw(st.sampled_from(self.tenants()))
        parents = [(tenant, ()), *sorted(path for path in self.cached if path[0] == tenant)]
        parent = data.draw(st.sampled_from(parents))
        self.events.note_prompt([token for block in (*parent[1], *blocks) for token in block], tenant)
        paths = [(tenant, (*parent[1], *blocks[: i + 1])) for i in range(len(blocks))]
        self.cached.update(paths)
        if self.tell(stored(parent, blocks, names_salts=self.names_salts)) and (
            not parent[1] or parent in self.visible
        ):
            self.visible.update(paths)
        if len(self.visible) > MAX_BLOCKS:
            self.visible, self.is_complete = set(), False

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def remove(self, data) -> None:
        """In any order: a parent before its children, several at once, one that was never stored."""
        paths = data.draw(st.lists(st.sampled_from(sorted(self.cached)), min_size=1, max_size=3))
        self.cached.difference_update(paths)
        if self.tell({"type": "removed", "block_hashes": [*map(name, paths), 7]}):
            self.visible.difference_update(paths)

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def update(self, data) -> None:
        path = data.draw(st.sampled_from(sorted(self.cached)))
        level = {"type": "event_diff", "new_value": 1, "old_value": 0}
        self.tell({"type": "updated", "block_hash": name(path), "cache_level": level, "priority": None})

    @rule(data=st.data())
    def store_part_of_a_block(self, data) -> None:
        tenant = data.draw(st.sampled_from(self.tenants()))
        self.tell(stored((tenant, ()), [BLOCKS[0][:3]], names_salts=self.names_salts))

    @rule(block=st.sampled_from(BLOCKS))
    def store_behind_an_unknown_parent(self, block) -> None:
        orphan = stored(("", ((9, 9, 9, 9),)), [block], parent=12345, names_salts=self.names_salts)
        self.tell(orphan)

    @rule()
    def lose_the_next_event(self) -> None:
        self.is_next_lost = True

    @rule()
    def drain(self) -> None:
        changes = self.events.drain_changes()
        assert len(set(changes.stored)) == len(changes.stored)
        assert not set(changes.stored) & (set(changes.removed) | self.announced)
        assert set(changes.removed) <= self.announced
        self.announced = self.announced - set(changes.removed) | set(changes.stored)
        assert self.announced == set(self.events.all_hashes())

    @invariant()
    def announces_what_can_be_known(self) -> None:
        if not hasattr(self, "events") or getattr(self, "is_behind_gap", False):
            return
        known = set().union(*(hashes_ending_in(path, self.index) for path in self.visible))
        assert set(self.events.all_hashes()) == known
        assert len(self.events.all_hashes()) == len(known)
        there = set().union(*(hashes_ending_in(path, self.index) for path in self.cached))
        assert known == there if self.is_complete else known <= there
        assert len(self.events._blocks) <= MAX_BLOCKS


TestKvEvents = KvEventsMachine.TestCase
TestKvEvents.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.fixture
def events() -> KvEvents:
    return KvEvents("layout", engine_block_tokens=ENGINE, index_block_tokens=2, max_blocks=MAX_BLOCKS)


def test_a_gap_withdraws_all_and_begins_anew(events) -> None:
    tell(events, stored(("", ()), BLOCKS[:2]))
    first = set(events.drain_changes().stored)
    assert len(first) == 4
    tell(events, stored(("", (BLOCKS[0],)), [BLOCKS[2]]), first_id=2)
    changes = events.drain_changes()
    assert (changes.stored, set(changes.removed)) == ((), first)
    tell(events, stored(("", ()), [BLOCKS[0]]), first_id=3)
    assert set(events.drain_changes().stored) == hashes_ending_in(("", (BLOCKS[0],)), 2)


@pytest.mark.parametrize(
    "unreadable", [{"type": "cleared"}, {"type": "removed"}, {"type": "stored", "parent_hash": 1.5}, None]
)
def test_an_event_that_cannot_be_read_is_a_gap(events, unreadable, caplog) -> None:
    tell(events, stored(("", ()), [BLOCKS[0]]), unreadable)
    assert events.all_hashes() == []
    assert "cannot be read" in caplog.text
    tell(events, stored(("", ()), [BLOCKS[1]]), first_id=2)
    assert set(events.all_hashes()) == hashes_ending_in(("", (BLOCKS[1],)), 2)


def test_a_cache_that_is_created_again_is_empty(events) -> None:
    created = {"type": "created", "num_blocks_per_cache_level": [4]}
    tell(events, created, stored(("", ()), [BLOCKS[0]]), created)
    assert events.all_hashes() == []


def test_without_salts_a_block_is_whose_prompt_began_with_it(events) -> None:
    events.note_prompt((*BLOCKS[0], 5), "a")
    tell(events, stored(("a", ()), [BLOCKS[0]], names_salts=False))
    mine = hashes_ending_in(("a", (BLOCKS[0],)), 2)
    assert set(events.all_hashes()) == mine
    events.note_prompt(BLOCKS[0], "b")
    tell(events, stored(("b", ()), [BLOCKS[0]], names_salts=False), first_id=1)
    assert set(events.all_hashes()) == mine, "it may be either's"
    tell(events, stored(("", ()), [BLOCKS[1]], names_salts=False), first_id=2)
    assert set(events.all_hashes()) == mine, "nobody is known to have asked for it"


def test_of_prompts_no_more_are_remembered_than_blocks(events) -> None:
    for number in range(3 * MAX_BLOCKS):
        events.note_prompt((number,) * ENGINE, "a")
        events.note_prompt((number,), "a")
    assert len(events._tenants) == MAX_BLOCKS
