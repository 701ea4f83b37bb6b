import numpy as np
import pytest
from prometheus_client import Gauge

from cluster.block_hash import chain_salt
from cluster.block_pool import OutOfBlocksError
from decode_workers.kv_pool import NO_BLOCK, KvPool
from tests.decode_workers.support import HashExecutor

SALT = chain_salt("layout", "")


@pytest.fixture
def executor() -> HashExecutor:
    return HashExecutor(num_blocks=6, block_size_tokens=4)


@pytest.fixture
def pool(executor: HashExecutor) -> KvPool:
    return KvPool(
        executor, max_sequences=3, max_context_tokens=20, used_tokens=Gauge("used", "", registry=None)
    )


def test_a_table_row_lives_as_long_as_its_reservation(pool: KvPool) -> None:
    assert pool.block_tables.shape == (3, 6)  # the whole pool: a search has more slots than positions
    reservation = pool.reserve([1, 2, 3], SALT, 9)
    row = pool.block_tables[reservation.table_index]
    assert tuple(row[:3]) == reservation.block_ids
    assert set(row[3:]) == {NO_BLOCK}
    assert (reservation.capacity_tokens, pool.free_tokens) == (12, 12)
    pool.release(reservation)
    assert (pool.block_tables == NO_BLOCK).all()
    assert pool.free_tokens == pool.total_tokens == 24


def test_a_cached_tail_is_copied_and_its_block_let_go(pool: KvPool, executor: HashExecutor) -> None:
    first = pool.reserve([1, 2, 3, 4, 5, 6], SALT, 8)
    positions = pool.slots(first, range(6))
    executor.kv[positions] = np.arange(100, 106)
    pool.publish(first, [1, 2, 3, 4, 5, 6], SALT)
    second = pool.reserve([1, 2, 3, 4, 5, 6, 7], SALT, 8)
    assert second.cached_tokens == 6
    assert second.block_ids[0] == first.block_ids[0]
    assert second.block_ids[1] != first.block_ids[1]
    assert executor.kv[pool.slots(second, range(6))].tolist() == list(range(100, 106))
    pool.release(first)
    pool.release(second)
    pool.check()
    assert pool.free_tokens == pool.total_tokens


def test_the_last_known_token_always_runs(pool: KvPool) -> None:
    first = pool.reserve([1, 2, 3, 4], SALT, 4)
    pool.publish(first, [1, 2, 3, 4], SALT)
    assert pool.reserve([1, 2, 3, 4], SALT, 4).cached_tokens == 3


def test_what_does_not_fit_changes_nothing(pool: KvPool) -> None:
    held = pool.reserve([1, 2, 3, 4, 5], SALT, 16)
    pool.publish(held, [1, 2, 3, 4, 5], SALT)
    with pytest.raises(OutOfBlocksError):
        pool.reserve([1, 2, 3, 4, 5, 6], SALT, 20)
    pool.check()
    assert pool.free_tokens == 8
    pool.release(held)
    pool.release(pool.reserve([1, 2, 3, 4, 5, 6], SALT, 20))
    assert pool.free_tokens == pool.total_tokens


def test_blocks_released_in_a_run_are_given_back_at_its_end(pool: KvPool) -> None:
    first, second = pool.reserve([1, 2, 3], SALT, 8), pool.reserve([4, 5], SALT, 8)
    pool.begin_run()
    pool.publish(first, [1, 2, 3], SALT)
    pool.release(first)
    pool.release(second)
    pool.check()
    assert (pool.free_tokens, pool.block_tables[first.table_index][0]) == (8, first.block_ids[0])
    for copy in (lambda: pool.reserve([1], SALT, 4), lambda: pool.move(first, [1], [2])):
        with pytest.raises(AssertionError, match="beside a run"):
            copy()
    pool.end_run()
    pool.check()
    assert pool.free_tokens == pool.total_tokens
    assert (pool.block_tables == NO_BLOCK).all()
    assert pool.reserve([1, 2, 3, 4], SALT, 8).cached_tokens == 3


def test_moves_may_overlap(pool: KvPool, executor: HashExecutor) -> None:
    reservation = pool.reserve([1], SALT, 12)
    executor.kv[pool.slots(reservation, range(12))] = np.arange(12)
    pool.move(reservation, [3, 5, 8], [2, 3, 5])
    assert executor.kv[pool.slots(reservation, range(9))].tolist() == [0, 1, 3, 5, 4, 8, 6, 7, 8]
