import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from cluster import membership
from cluster.block_changes import BlockChanges
from cluster.ids import ChainHash, Epoch, WorkerId
from cluster.membership import (
    LeaseKeeper,
    Seen,
    SeenWorker,
    WorkerDirectory,
    epoch_now,
    merge_seen,
    retry_delay_s,
    usable,
    with_local_load,
)
from cluster.messages import (
    PROTOCOL_VERSION,
    Role,
    WorkerAddress,
    WorkerRecord,
    WorkerStatus,
)
from cluster.placement.embedded import EmbeddedRedis
from cluster.placement.redis_store import RedisPlacementStore, connect
from cluster.placement.store import WorkerIdentity

NOWHERE = "unix:///nonexistent.sock"
StoreFactory = Callable[..., RedisPlacementStore]
KeeperFactory = Callable[..., LeaseKeeper]


def identity(worker_id: str, role: Role = "decode") -> WorkerIdentity:
    return WorkerIdentity(
        worker_id=WorkerId(worker_id),
        role=role,
        model="m",
        grpc_address="h:1",
        host_id="host",
        protocol_version=PROTOCOL_VERSION,
        layout_fingerprint="layout",
        block_size_tokens=16,
    )


def chain(start: int, end: int) -> list[ChainHash]:
    return [ChainHash(f"{i:016d}".encode()) for i in range(start, end)]


async def eventually(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Waits for a plain or an awaitable condition to hold."""
    deadline = time.monotonic() + timeout_s
    while True:
        holds = condition()
        if await holds if asyncio.iscoroutine(holds) else holds:
            return
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.01)


class Worker:
    """What a worker lends its keeper: a status and a cache, and the addresses it was told."""

    def __init__(self) -> None:
        self.status = WorkerStatus(total_kv_tokens=64)
        self.held: set[ChainHash] = set()
        self.stored: set[ChainHash] = set()
        self.removed: set[ChainHash] = set()
        self.addresses: list[WorkerAddress] = []

    def store(self, hashes: list[ChainHash]) -> None:
        self.held.update(hashes)
        self.stored.update(hashes)
        self.removed.difference_update(hashes)

    def remove(self, hashes: list[ChainHash]) -> None:
        self.held.difference_update(hashes)
        self.removed.update(hashes)
        self.stored.difference_update(hashes)

    def drain(self) -> BlockChanges:
        changes = BlockChanges(stored=tuple(self.stored), removed=tuple(self.removed))
        self.stored.clear()
        self.removed.clear()
        return changes

    def keeper(self, store: RedisPlacementStore, worker_id: str = "w", **options) -> LeaseKeeper:
        return LeaseKeeper(
            store,
            identity(worker_id),
            lambda: self.status,
            on_epoch=self.addresses.append,
            drain_blocks=self.drain,
            all_blocks=lambda: list(self.held),
            **options,
        )


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
async def keep(worker: Worker) -> AsyncIterator[KeeperFactory]:
    """Makes keepers that are stopped at the end."""
    keepers: list[LeaseKeeper] = []

    def make(store: RedisPlacementStore, worker_id: str = "w", **options) -> LeaseKeeper:
        keepers.append(worker.keeper(store, worker_id, **options))
        return keepers[-1]

    yield make
    for keeper in keepers:
        await keeper.stop()


@pytest.fixture
def fragile_server() -> Iterator[EmbeddedRedis]:
    """For tests that break it."""
    with EmbeddedRedis() as server:
        yield server


# Lease keeper


async def test_start_registers_and_stop_releases(
    store: RedisPlacementStore, worker: Worker, keep: KeeperFactory
) -> None:
    keeper = keep(store)
    address = await keeper.start()
    assert keeper.is_registered
    assert worker.addresses == [address]
    assert [(r.address, r.status) for r in await store.workers()] == [(address, worker.status)]
    await keeper.stop()
    assert await store.workers() == []
    await keeper.stop()


async def test_a_lease_is_kept_alive_for_much_longer_than_its_ttl(
    store: RedisPlacementStore, worker: Worker, keep: KeeperFactory
) -> None:
    keeper = keep(store, ttl_s=0.3)
    await keeper.start()
    await asyncio.sleep(0.9)
    assert len(await store.workers()) == 1
    assert len(worker.addresses) == 1


async def test_a_changed_status_is_published_soon(
    store: RedisPlacementStore, worker: Worker, keep: KeeperFactory
) -> None:
    # Renewal alone would publish it after a minute.
    keeper = keep(store, ttl_s=180.0, status_interval_s=0.01)
    await keeper.start()
    worker.status = WorkerStatus(queued_tokens=99)

    async def is_published() -> bool:
        return [record.status for record in await store.workers()] == [worker.status]

    await eventually(is_published)


async def test_a_lost_lease_is_taken_again_under_a_higher_epoch_with_all_blocks(
    store: RedisPlacementStore, worker: Worker, keep: KeeperFactory
) -> None:
    worker.store(chain(0, 700))
    keeper = keep(store, ttl_s=0.3)
    first = await keeper.start()
    await store.release(first)
    await eventually(lambda: len(worker.addresses) == 2)
    assert worker.addresses[1].epoch > first.epoch
    assert keeper.address == worker.addresses[1]

    async def are_all_found() -> bool:
        # In two parts: one lookup is bounded.
        parts = [await store.lookup(part, None) for part in (chain(0, 350), chain(350, 700))]
        return [hits.cached_blocks for hits in parts] == [{"w": 350}, {"w": 350}]

    await eventually(are_all_found)


async def test_changes_of_the_cache_are_published(
    store: RedisPlacementStore, worker: Worker, keep: KeeperFactory
) -> None:
    keeper = keep(store)
    await keeper.start()

    async def held_blocks() -> int:
        return (await store.lookup(chain(0, 500), None)).cached_blocks.get(WorkerId("w"), 0)

    async def is_all() -> bool:
        return await held_blocks() == 500

    async def is_part() -> bool:
        return await held_blocks() == 300

    worker.store(chain(0, 500))
    await eventually(is_all)
    worker.remove(chain(300, 350))
    await eventually(is_part)
    worker.store(chain(300, 350))
    await eventually(is_all)


async def test_blocks_are_published_again_before_the_index_forgets(
    new_store: StoreFactory, worker: Worker, keep: KeeperFactory
) -> None:
    store = new_store(block_ttl_s=0.4)
    worker.store(chain(0, 3))
    await keep(store, block_refresh_s=0.1).start()
    for _ in range(8):
        await asyncio.sleep(0.1)
        assert (await store.lookup(chain(0, 3), None)).cached_blocks == {"w": 3}


async def test_without_a_store_a_worker_has_a_provisional_epoch(
    new_store: StoreFactory, worker: Worker, keep: KeeperFactory
) -> None:
    keeper = keep(new_store(url=NOWHERE))
    before = time.time_ns() // 1_000
    address = await keeper.start()
    assert not keeper.is_registered
    assert worker.addresses == [address]
    assert address.epoch > before - 1_000_000
    await keeper.stop()


async def test_a_worker_registers_when_the_store_comes_and_keeps_its_provisional_epoch(
    new_store: StoreFactory, redis_server: EmbeddedRedis, worker: Worker, keep: KeeperFactory, tmp_path: Path
) -> None:
    password = redis_server.url.split(":")[2].split("@")[0]
    link = tmp_path / "redis"
    store = new_store(url=f"unix://:{password}@{link}/redis.sock")
    keeper = keep(store)
    address = await keeper.start()
    # What is cached meanwhile is published on registration.
    worker.store(chain(0, 5))
    await asyncio.sleep(0.1)
    link.symlink_to(redis_server.directory)
    await eventually(lambda: keeper.is_registered)
    assert keeper.address == address
    assert worker.addresses == [address]

    async def are_blocks_there() -> bool:
        return (await store.lookup(chain(0, 5), None)).cached_blocks == {"w": 5}

    await eventually(are_blocks_there)


async def test_a_provisional_epoch_never_goes_below_the_stores(
    store: RedisPlacementStore, keep: KeeperFactory
) -> None:
    ahead = Epoch(epoch_now() + 3_600_000_000)
    await store.register(identity("w"), WorkerStatus(), 1, floor=ahead)
    keeper = keep(store)
    address = await keeper.start()
    assert address.epoch == ahead + 1


async def test_a_flushed_redis_is_healed(
    fragile_server: EmbeddedRedis, new_store: StoreFactory, worker: Worker, keep: KeeperFactory
) -> None:
    store = new_store(url=fragile_server.url)
    worker.store(chain(0, 5))
    keeper = keep(store, ttl_s=0.3)
    first = await keeper.start()
    client = connect(fragile_server.url)
    await client.flushall()
    await client.aclose()

    async def is_healed() -> bool:
        return (await store.lookup(chain(0, 5), None)).cached_blocks == {"w": 5}

    await eventually(is_healed)
    assert keeper.address.epoch > first.epoch


async def test_an_outage_is_logged_once_and_survived(
    fragile_server: EmbeddedRedis,
    new_store: StoreFactory,
    worker: Worker,
    keep: KeeperFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "cluster.membership")
    store = new_store(url=fragile_server.url, op_timeout_s=0.05)
    keeper = keep(store, ttl_s=0.15)
    await keeper.start()
    control = connect(fragile_server.url)
    await control.execute_command("CLIENT", "PAUSE", "600")
    await eventually(lambda: not keeper.is_registered)
    # Drained while the store is away, so that nothing piles up; all of it is published afterwards.
    worker.store(chain(0, 9))
    await eventually(lambda: not worker.stored)

    async def is_back() -> bool:
        return (await new_store(url=fragile_server.url).lookup(chain(0, 9), None)).cached_blocks == {"w": 9}

    await eventually(is_back)
    messages = [record.message for record in caplog.records]
    assert sum("serving without it" in message for message in messages) == 1
    assert "placement store is back" in messages
    await control.aclose()


async def test_two_incarnations_do_not_share_a_lease(
    store: RedisPlacementStore, new_store: StoreFactory
) -> None:
    """The older one's stop must not take the newer one's lease away."""
    old, new = Worker().keeper(store), Worker().keeper(new_store())
    await old.start()
    address = await new.start()
    await old.stop()
    assert [record.address for record in await store.workers()] == [address]
    await new.stop()


async def test_a_failing_callback_is_loud(
    store: RedisPlacementStore, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = LeaseKeeper(store, identity("w"), WorkerStatus, drain_blocks=lambda: 1 / 0)
    await keeper.start()
    await eventually(lambda: any("lease of w stopped" in record.message for record in caplog.records))
    await keeper.stop()
    assert await store.workers() == []


@pytest.mark.parametrize("option", ["ttl_s", "status_interval_s", "block_refresh_s"])
def test_intervals_must_be_positive(worker: Worker, new_store: StoreFactory, option: str) -> None:
    with pytest.raises(ValueError, match="above 0"):
        worker.keeper(new_store(url=NOWHERE), **{option: 0})


def test_retry_delays_double_to_a_limit() -> None:
    delays = [retry_delay_s(failures, 0.0) for failures in range(1, 8)]
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]
    assert retry_delay_s(10**6, 0.5) == pytest.approx(0.75)


def test_epochs_rise_whatever_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    first = epoch_now()
    monkeypatch.setattr(membership.time, "time_ns", lambda: 0)
    assert epoch_now(first) == first + 1
    assert first < 2**53


# Directory: the pure parts


def record(worker_id: str, role: Role = "decode", epoch: int = 1, queued_tokens: int = 0) -> WorkerRecord:
    return WorkerRecord(
        address=WorkerAddress(
            worker_id=WorkerId(worker_id), epoch=Epoch(epoch), grpc_address="h:1", host_id="host"
        ),
        role=role,
        model="m",
        protocol_version=PROTOCOL_VERSION,
        layout_fingerprint="layout",
        block_size_tokens=16,
        status=WorkerStatus(queued_tokens=queued_tokens),
    )


def seen(*workers: tuple[WorkerRecord, float | None]) -> Seen:
    return {
        record.address.worker_id: SeenWorker(record=record, vanished_at_s=vanished_at_s)
        for record, vanished_at_s in workers
    }


D1, D2, P1 = record("d1"), record("d2"), record("p1", "prefill")


@pytest.mark.parametrize(
    ("previous", "fresh", "now_s", "expected"),
    [
        (seen(), [D1], 10, seen((D1, None))),
        (seen((D1, None)), [D1], 10, seen((D1, None))),
        (seen((D1, None)), [record("d1", epoch=2)], 10, seen((record("d1", epoch=2), None))),
        (seen((D1, None)), [], 10, seen((D1, 10))),
        (seen((D1, 7)), [], 10, seen((D1, 7))),
        (seen((D1, 4)), [], 10, seen()),
        (seen((D1, 4)), [D1], 10, seen((D1, None))),
        (seen((D1, None), (D2, None)), [D2], 10, seen((D2, None), (D1, 10))),
    ],
)
def test_merge_seen(previous: Seen, fresh: list[WorkerRecord], now_s: float, expected: Seen) -> None:
    assert merge_seen(previous, fresh, now_s, grace_s=5.0) == expected


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (seen((D2, None), (D1, None), (P1, None)), (D1, D2, P1)),
        # A role with a living worker needs none of those that vanished; one without falls back.
        (seen((D1, 3), (D2, None), (P1, None)), (D2, P1)),
        (seen((D1, 3), (D2, 3), (P1, None)), (D1, D2, P1)),
        (seen((D1, None), (P1, 3)), (D1, P1)),
        (seen(), ()),
    ],
)
def test_usable(known: Seen, expected: tuple[WorkerRecord, ...]) -> None:
    assert usable(known) == expected


@pytest.mark.parametrize(("published", "ours", "expected"), [(0, 5, 5), (5, 3, 5), (5, 5, 5), (5, 8, 8)])
def test_local_load_is_a_lower_bound_of_the_queue(published: int, ours: int, expected: int) -> None:
    (loaded,) = with_local_load([record("w", queued_tokens=published)], {WorkerId("w"): ours})
    assert loaded == record("w", queued_tokens=expected)


# Directory: against Redis


@pytest.fixture
async def directory(store: RedisPlacementStore) -> AsyncIterator[WorkerDirectory]:
    directory = WorkerDirectory(store, refresh_s=0.02, grace_s=0.3)
    yield directory
    await directory.stop()


async def register(store: RedisPlacementStore, worker_id: str, role: Role = "decode") -> WorkerAddress:
    return await store.register(identity(worker_id, role), WorkerStatus(), 60_000, floor=Epoch(0))


def ids(directory: WorkerDirectory, role: Role | None = None) -> list[str]:
    return [record.address.worker_id for record in directory.snapshot(role)]


async def test_the_directory_follows_the_store(
    store: RedisPlacementStore, directory: WorkerDirectory
) -> None:
    assert (directory.snapshot(), directory.is_fresh, directory.age_s) == ((), False, None)
    await register(store, "b")
    await directory.start()
    assert ids(directory) == ["b"]
    assert directory.is_fresh
    await register(store, "a")
    await register(store, "p", "prefill")
    await eventually(lambda: ids(directory) == ["a", "b", "p"])
    assert ids(directory, "prefill") == ["p"]
    assert ids(directory, "decode") == ["a", "b"]
    assert directory.age_s is not None


async def test_a_released_worker_leaves_while_another_stays(
    store: RedisPlacementStore, directory: WorkerDirectory
) -> None:
    gone = await register(store, "gone")
    await register(store, "stays")
    await directory.start()
    await store.release(gone)
    await eventually(lambda: ids(directory) == ["stays"])


async def test_the_last_worker_of_a_role_lingers_for_the_grace_alone(
    store: RedisPlacementStore, directory: WorkerDirectory
) -> None:
    address = await register(store, "only")
    await directory.start()
    await store.release(address)
    await directory.refresh()
    assert ids(directory) == ["only"]
    await eventually(lambda: ids(directory) == [])


async def test_the_last_view_stands_while_the_store_is_away(
    fragile_server: EmbeddedRedis, new_store: StoreFactory
) -> None:
    store = new_store(url=fragile_server.url)
    await register(store, "w")
    directory = WorkerDirectory(store, refresh_s=0.02, grace_s=0.01)
    await directory.start()
    fragile_server.close()
    await eventually(lambda: not directory.is_fresh)
    await asyncio.sleep(0.1)
    assert ids(directory) == ["w"]
    assert directory.age_s is not None
    assert directory.age_s > 0.1
    await directory.stop()


async def test_starting_without_a_store_is_an_empty_view(new_store: StoreFactory) -> None:
    directory = WorkerDirectory(new_store(url=NOWHERE))
    await directory.start()
    assert (directory.snapshot(), directory.is_fresh) == ((), False)
    await directory.stop()
    await directory.stop()


async def test_a_burst_is_seen_before_the_next_refresh_and_taken_back(
    store: RedisPlacementStore, directory: WorkerDirectory
) -> None:
    await register(store, "w")
    await directory.refresh()

    def queued() -> int:
        return directory.snapshot()[0].status.queued_tokens

    directory.local_adjust(WorkerId("w"), 100)
    directory.local_adjust(WorkerId("w"), 50)
    assert queued() == 150
    await directory.refresh()
    assert queued() == 150
    directory.local_adjust(WorkerId("w"), -100)
    assert queued() == 50
    directory.local_adjust(WorkerId("w"), -999)
    assert queued() == 0
    directory.local_adjust(WorkerId("w"), 10)
    assert queued() == 10


async def test_load_of_a_worker_that_left_is_forgotten(
    store: RedisPlacementStore, directory: WorkerDirectory
) -> None:
    directory.local_adjust(WorkerId("never seen"), 100)
    await directory.refresh()
    assert directory._outstanding == {}


@pytest.mark.parametrize("options", [{"refresh_s": 0}, {"grace_s": -1}])
def test_directory_options_out_of_range_are_refused(new_store: StoreFactory, options: dict) -> None:
    with pytest.raises(ValueError, match="refresh_s"):
        WorkerDirectory(new_store(url=NOWHERE), **options)


async def test_snapshots_are_frozen(store: RedisPlacementStore, directory: WorkerDirectory) -> None:
    await register(store, "w")
    await directory.refresh()
    snapshot = directory.snapshot()
    assert directory.snapshot() is snapshot
    directory.local_adjust(WorkerId("w"), 7)
    assert snapshot[0].status.queued_tokens == 0
    assert msgspec.structs.asdict(directory.snapshot()[0].status)["queued_tokens"] == 7
