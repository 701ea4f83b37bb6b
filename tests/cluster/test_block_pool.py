import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from cluster.block_hash import chain_hashes, chain_salt
from cluster.block_pool import BlockPool, OutOfBlocksError, PrefixMatch
from cluster.ids import ChainHash

SIZE = 3
NUM_BLOCKS = 12
SALTS = [chain_salt("layout", tenant) for tenant in ("", "other")]
SALT = SALTS[0]


class Held:
    """A sequence of the naive model: its tokens, and the blocks it holds for them."""

    def __init__(self, salt: ChainHash, tokens: list[int], block_ids: list[int]) -> None:
        self.salt = salt
        self.tokens = tokens
        self.block_ids = block_ids


class PoolMachine(RuleBasedStateMachine):
    """Beside the pool: what each slot of each block really holds, as (salt, all tokens up to it)."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, SIZE)
        self.slots: dict[tuple[int, int], object] = {}
        self.holders: list[Held] = []
        self.index: set[ChainHash] = set()

    def write(self, sequence: Held, start: int) -> None:
        for position in range(start, len(sequence.tokens)):
            content = (sequence.salt, tuple(sequence.tokens[: position + 1]))
            self.slots[sequence.block_ids[position // SIZE], position % SIZE] = content

    def content(self, sequence: Held, position: int) -> object:
        return self.slots[sequence.block_ids[position // SIZE], position % SIZE]

    def let_go(self, match: PrefixMatch) -> None:
        self.pool.release(match.block_ids)
        if match.tail_block is not None:
            self.pool.release((match.tail_block,))

    @rule(
        target=held, salt=st.sampled_from(SALTS), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14)
    )
    def start(self, salt: ChainHash, tokens: list[int]) -> Held | None:
        match = self.pool.match_prefix(tokens, salt, len(tokens) - 1)
        needed = -(-len(tokens) // SIZE) - len(match.block_ids)
        assert match.num_tokens == len(match.block_ids) * SIZE
        assert match.num_tokens + match.tail_tokens < len(tokens)
        assert (match.tail_block is None) == (match.tail_tokens == 0)
        free = self.pool.num_free_blocks
        if free < needed:
            with pytest.raises(OutOfBlocksError, match=f"{needed} KV blocks needed, {free} free"):
                self.pool.allocate(needed)
            assert self.pool.num_free_blocks == free
            self.let_go(match)
            return None
        own = self.pool.allocate(needed)
        sequence = Held(salt, tokens, [*match.block_ids, *own])
        if match.tail_block is not None:
            for offset in range(match.tail_tokens):
                self.slots[own[0], offset] = self.slots[match.tail_block, offset]
            self.pool.release((match.tail_block,))
        cached = match.num_tokens + match.tail_tokens
        for position in range(cached):
            assert self.content(sequence, position) == (salt, tuple(tokens[: position + 1]))
        self.write(sequence, cached)
        self.holders.append(sequence)
        return sequence

    @rule(sequence=held, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def append(self, sequence: Held | None, tokens: list[int]) -> None:
        if sequence is None:
            return
        start = len(sequence.tokens)
        needed = -(-(start + len(tokens)) // SIZE) - len(sequence.block_ids)
        if needed > self.pool.num_free_blocks:
            return
        sequence.block_ids += self.pool.allocate(needed)
        sequence.tokens = [*sequence.tokens, *tokens]
        self.write(sequence, start)

    @rule(sequence=held)
    def publish(self, sequence: Held | None) -> None:
        if sequence is None:
            return
        self.pool.publish(sequence.tokens, sequence.block_ids, sequence.salt)
        match = self.pool.match_prefix(sequence.tokens, sequence.salt, len(sequence.tokens))
        assert match.num_tokens + match.tail_tokens == len(sequence.tokens)
        self.let_go(match)

    @rule(sequence=consumes(held))
    def release(self, sequence: Held | None) -> None:
        if sequence is not None:
            self.pool.release(sequence.block_ids)
            self.holders.remove(sequence)

    @rule()
    def drain(self) -> None:
        changes = self.pool.drain_changes()
        assert not self.index & set(changes.stored)
        assert set(changes.removed) <= self.index
        self.index = (self.index | set(changes.stored)) - set(changes.removed)
        assert self.index == set(self.pool.all_hashes())

    @invariant()
    def holds(self) -> None:
        self.pool.check()
        held_blocks = {block for sequence in self.holders for block in sequence.block_ids}
        assert self.pool.num_used_blocks == len(held_blocks)
        for sequence in self.holders:
            for position in range(len(sequence.tokens)):
                expected = (sequence.salt, tuple(sequence.tokens[: position + 1]))
                assert self.content(sequence, position) == expected, "somebody wrote into a held block"


PoolMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def stored(pool: BlockPool, tokens: list[int], salt: ChainHash = SALT) -> list[int]:
    block_ids = pool.allocate(-(-len(tokens) // pool.block_size_tokens))
    pool.publish(tokens, block_ids, salt)
    pool.release(block_ids)
    return block_ids


def cached_tokens(pool: BlockPool, tokens: list[int], salt: ChainHash = SALT) -> int:
    match = pool.match_prefix(tokens, salt, len(tokens))
    pool.release(match.block_ids)
    if match.tail_block is not None:
        pool.release((match.tail_block,))
    return match.num_tokens + match.tail_tokens


def test_the_least_recently_used_goes_first_and_a_chain_from_its_end() -> None:
    pool = BlockPool(6, SIZE)
    old, new = [1] * 9, [2] * 9
    stored(pool, old)
    stored(pool, new)
    assert cached_tokens(pool, old) == 9  # used again: the other is older now
    pool.drain_changes()
    chain = chain_hashes(new, SIZE, SALT)
    held = pool.allocate(1)
    assert pool.drain_changes().removed == (chain[2],)
    held += pool.allocate(2)
    assert pool.drain_changes().removed == (chain[1], chain[0])
    assert cached_tokens(pool, old) == 9
    pool.release(held)
    pool.check()


def test_the_first_publisher_of_equal_tokens_wins() -> None:
    pool = BlockPool(8, SIZE)
    first, second = pool.allocate(3), pool.allocate(3)
    tokens = [1, 2, 3, 4, 5, 6, 7]
    pool.publish(tokens, first, SALT)
    pool.publish(tokens, second, SALT)
    pool.release(second)
    assert pool.num_free_blocks == 8 - 3
    match = pool.match_prefix(tokens, SALT, 7)
    assert (list(match.block_ids), match.tail_block) == (first[:2], first[2])


def test_a_limit_inside_a_full_block_matches_it_as_a_tail() -> None:
    pool = BlockPool(4, SIZE)
    blocks = stored(pool, [1, 2, 3, 4, 5, 6])
    match = pool.match_prefix([1, 2, 3, 4, 5, 6], SALT, 5)
    assert (match.block_ids, match.num_tokens) == ((blocks[0],), 3)
    assert (match.tail_block, match.tail_tokens) == (blocks[1], 2)


def test_a_longer_tail_replaces_the_one_it_extends() -> None:
    pool = BlockPool(4, SIZE)
    stored(pool, [1])
    stored(pool, [1, 2])
    assert cached_tokens(pool, [1, 2, 3]) == 2
    held = pool.allocate(3)  # the shorter one was free again without eviction
    assert cached_tokens(pool, [1, 2, 3]) == 2
    pool.release(held)


def test_an_evicted_parent_takes_its_children_along() -> None:
    pool = BlockPool(4, SIZE)
    first, second = pool.allocate(1), pool.allocate(2)
    pool.publish([1, 2, 3], first, SALT)
    pool.publish([1, 2, 3, 4, 5, 6], second, SALT)  # its first block is the other's duplicate
    pool.release(second)
    pool.release(first)
    assert cached_tokens(pool, [1, 2, 3, 4, 5, 6]) == 6
    pool.drain_changes()
    chain = chain_hashes([1, 2, 3, 4, 5, 6], SIZE, SALT)
    held = pool.allocate(3)
    assert pool.drain_changes().removed == (chain[1],)
    held += pool.allocate(1)
    assert pool.drain_changes().removed == (chain[0],)
    pool.release(held)
    pool.check()
    assert pool.num_free_blocks == 4


def test_what_came_and_went_between_two_drains_is_not_told() -> None:
    pool = BlockPool(1, SIZE)
    stored(pool, [1, 2, 3])
    pool.release(pool.allocate(1))
    changes = pool.drain_changes()
    assert (changes.stored, changes.removed) == ((), ())


def test_too_much_names_both_numbers() -> None:
    pool = BlockPool(4, SIZE)
    pool.allocate(3)
    with pytest.raises(OutOfBlocksError, match="2 KV blocks needed, 1 free"):
        pool.allocate(2)


@pytest.mark.parametrize("act", [lambda p: p.release((0,)), lambda p: p.retain((0,))])
def test_blocks_that_nobody_holds_fail_an_assertion(act: object) -> None:
    with pytest.raises(AssertionError):
        act(BlockPool(1, SIZE))  # type: ignore[operator]
