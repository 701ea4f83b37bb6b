import asyncio
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.crc import key_slot
from redis.exceptions import RedisError

from cluster.ids import ChainHash, Epoch, SessionId, WorkerId
from cluster.messages import PROTOCOL_VERSION, Role, SessionRecord, StepCost, WorkerAddress, WorkerStatus
from cluster.placement.embedded import EmbeddedRedis, find_redis_server
from cluster.placement.redis_store import (
    MAX_EPOCH,
    MAX_LOOKUP_BLOCKS,
    MAX_PUBLISH_BLOCKS,
    RedisPlacementStore,
    connect,
)
from cluster.placement.store import (
    LeaseLostError,
    PlacementUnavailableError,
    WorkerIdentity,
)

TTL_MS = 60_000
STATUS = WorkerStatus(queued_tokens=7, total_kv_tokens=1024, step_table=(StepCost(rows=1, ms=2.5),))


def identity(worker_id: str, role: Role = "decode") -> WorkerIdentity:
    return WorkerIdentity(
        worker_id=WorkerId(worker_id),
        role=role,
        model="m",
        grpc_address="127.0.0.1:1",
        host_id="host",
        protocol_version=PROTOCOL_VERSION,
        layout_fingerprint="layout",
        block_size_tokens=16,
    )


def chain(length: int, name: str = "a") -> list[ChainHash]:
    return [ChainHash(f"{name}{i:015d}".encode()) for i in range(length)]


def session_record(worker_id: str = "w", epoch: int = 1) -> SessionRecord:
    return SessionRecord(
        worker_id=WorkerId(worker_id), epoch=Epoch(epoch), num_tokens=33, last_hash=chain(1)[0]
    )


@pytest.fixture
async def client(redis_server: EmbeddedRedis) -> AsyncIterator[Redis]:
    client = connect(redis_server.url)
    yield client
    await client.aclose()


def lease_key(store: RedisPlacementStore, worker_id: str) -> bytes:
    return store._lease_keys(WorkerId(worker_id))[0]


async def register(
    store: RedisPlacementStore, worker_id: str, *, floor: int = 0, ttl_ms: int = TTL_MS
) -> WorkerAddress:
    return await store.register(identity(worker_id), STATUS, ttl_ms, floor=Epoch(floor))


# Leases


async def test_a_registered_worker_is_listed_with_all_it_said(store: RedisPlacementStore) -> None:
    address = await register(store, "w")
    (record,) = await store.workers()
    assert record.address == address
    assert (record.role, record.model, record.layout_fingerprint) == ("decode", "m", "layout")
    assert (record.protocol_version, record.block_size_tokens) == (PROTOCOL_VERSION, 16)
    assert record.status == STATUS


async def test_renewal_publishes_status(store: RedisPlacementStore) -> None:
    address = await register(store, "w")
    await store.renew(address, WorkerStatus(is_accepting=False), TTL_MS)
    (record,) = await store.workers()
    assert record.status == WorkerStatus(is_accepting=False)


async def test_each_registration_has_a_higher_epoch(store: RedisPlacementStore) -> None:
    epochs = [(await register(store, "w")).epoch for _ in range(3)]
    assert epochs == sorted(set(epochs))
    assert len(await store.workers()) == 1


async def test_the_epoch_is_at_least_the_floor_and_rises_from_there(store: RedisPlacementStore) -> None:
    assert (await register(store, "w", floor=1_700_000_000_000_001)).epoch == 1_700_000_000_000_001
    assert (await register(store, "w", floor=5)).epoch == 1_700_000_000_000_002


async def test_epochs_are_exact_up_to_the_limit(store: RedisPlacementStore) -> None:
    address = await register(store, "w", floor=MAX_EPOCH - 1)
    assert address.epoch == MAX_EPOCH - 1
    await store.renew(address, STATUS, TTL_MS)


@pytest.mark.parametrize("floor", [-1, MAX_EPOCH])
async def test_a_floor_out_of_range_is_refused(store: RedisPlacementStore, floor: int) -> None:
    with pytest.raises(ValueError, match="floor"):
        await register(store, "w", floor=floor)


@pytest.mark.parametrize("worker_id", ["", "w" * 129])
async def test_a_worker_id_out_of_bounds_is_refused(store: RedisPlacementStore, worker_id: str) -> None:
    with pytest.raises(ValueError, match="worker id"):
        await register(store, worker_id)


async def test_an_old_epoch_can_do_nothing(store: RedisPlacementStore) -> None:
    old = await register(store, "w")
    new = await register(store, "w")
    with pytest.raises(LeaseLostError, match="w no longer holds"):
        await store.renew(old, STATUS, TTL_MS)
    with pytest.raises(LeaseLostError):
        await store.publish_blocks(old.worker_id, old.epoch, chain(1), [])
    await store.release(old)
    assert [record.address for record in await store.workers()] == [new]
    assert (await store.lookup(chain(1), None)).cached_blocks == {}


async def test_a_lease_expires_unless_renewed(store: RedisPlacementStore, client: Redis) -> None:
    await register(store, "gone")
    kept = await register(store, "kept", ttl_ms=30)
    await store.renew(kept, STATUS, TTL_MS)
    await client.pexpire(lease_key(store, "gone"), 1)
    await asyncio.sleep(0.05)
    assert [record.address for record in await store.workers()] == [kept]


async def test_a_released_worker_is_gone_and_comes_back_higher(store: RedisPlacementStore) -> None:
    address = await register(store, "w")
    await store.release(address)
    assert await store.workers() == []
    with pytest.raises(LeaseLostError):
        await store.renew(address, STATUS, TTL_MS)
    assert (await register(store, "w")).epoch > address.epoch


async def test_dead_ids_are_forgotten_when_workers_are_listed(
    store: RedisPlacementStore, client: Redis
) -> None:
    await register(store, "dead")
    await register(store, "alive")
    await client.delete(lease_key(store, "dead"))
    await store.workers()
    assert await client.smembers(store._key("workers")) == {b"alive"}


async def test_an_unreadable_worker_does_not_hide_the_others(
    store: RedisPlacementStore, client: Redis
) -> None:
    await register(store, "good")
    await register(store, "bad")
    await client.hset(lease_key(store, "bad"), "status", b"\xff")
    assert [record.address.worker_id for record in await store.workers()] == ["good"]


async def test_models_do_not_see_each_other(new_store: Callable[..., RedisPlacementStore]) -> None:
    first, second = new_store(model="a}b"), new_store(model="a")
    await register(first, "w")
    await first.put_session(SessionId("s"), session_record(), TTL_MS)
    assert await second.workers() == []
    assert (await second.lookup([], SessionId("s"))).session is None


# Blocks


async def test_lookup_gives_each_holder_its_leading_blocks(store: RedisPlacementStore) -> None:
    hashes = chain(5)
    for worker_id, held in {"all": [0, 1, 2, 3, 4], "two": [0, 1], "gap": [0, 2, 3], "none": [1, 2]}.items():
        address = await register(store, worker_id)
        await store.publish_blocks(address.worker_id, address.epoch, [hashes[i] for i in held], [])
    hits = await store.lookup(hashes, None)
    assert hits.cached_blocks == {"all": 5, "two": 2, "gap": 1}


async def test_removed_blocks_no_longer_count(store: RedisPlacementStore) -> None:
    address = await register(store, "w")
    hashes = chain(3)
    await store.publish_blocks(address.worker_id, address.epoch, hashes, [])
    await store.publish_blocks(address.worker_id, address.epoch, [], [hashes[1]])
    assert (await store.lookup(hashes, None)).cached_blocks == {"w": 1}


async def test_a_hash_both_stored_and_removed_is_removed(store: RedisPlacementStore) -> None:
    address = await register(store, "w")
    await store.publish_blocks(address.worker_id, address.epoch, chain(1), chain(1))
    assert (await store.lookup(chain(1), None)).cached_blocks == {}


async def test_blocks_of_the_dead_are_ignored_though_nothing_deleted_them(
    store: RedisPlacementStore, client: Redis
) -> None:
    hashes = chain(2)
    for worker_id in ("dead", "alive"):
        address = await register(store, worker_id)
        await store.publish_blocks(address.worker_id, address.epoch, hashes, [])
    await client.delete(lease_key(store, "dead"))
    assert await client.hexists(store._block_key(hashes[0]), "dead")
    assert (await store.lookup(hashes, None)).cached_blocks == {"alive": 2}


async def test_a_popular_block_sheds_its_dead_holders(store: RedisPlacementStore, client: Redis) -> None:
    for worker_id in ("dead", "alive"):
        address = await register(store, worker_id)
        await store.publish_blocks(address.worker_id, address.epoch, chain(1), [])
    await client.delete(lease_key(store, "dead"))
    await store.lookup(chain(1), None)
    assert await client.hkeys(store._block_key(chain(1)[0])) == [b"alive"]


async def test_blocks_of_an_older_epoch_are_ignored_until_published_again(
    store: RedisPlacementStore,
) -> None:
    old = await register(store, "w")
    await store.publish_blocks(old.worker_id, old.epoch, chain(2), [])
    new = await register(store, "w")
    assert (await store.lookup(chain(2), None)).cached_blocks == {}
    await store.publish_blocks(new.worker_id, new.epoch, chain(1), [])
    # The second block's entry is still there, of the old epoch.
    assert (await store.lookup(chain(2), None)).cached_blocks == {"w": 1}


async def test_a_long_publication_and_a_long_lookup_are_bounded(store: RedisPlacementStore) -> None:
    address = await register(store, "w")
    hashes = chain(MAX_LOOKUP_BLOCKS + MAX_PUBLISH_BLOCKS // 2)
    await store.publish_blocks(address.worker_id, address.epoch, hashes, [])
    assert (await store.lookup(hashes, None)).cached_blocks == {"w": MAX_LOOKUP_BLOCKS}
    assert (await store.lookup(hashes[:MAX_PUBLISH_BLOCKS], None)).cached_blocks == {"w": MAX_PUBLISH_BLOCKS}


async def test_lookup_of_nothing_asks_nothing(new_store: Callable[..., RedisPlacementStore]) -> None:
    unreachable = new_store(url="unix:///nonexistent.sock")
    hits = await unreachable.lookup([], None)
    assert (hits.cached_blocks, hits.session) == ({}, None)


async def test_any_bytes_can_be_a_hash(store: RedisPlacementStore) -> None:
    address = await register(store, "w")
    odd = [ChainHash(bytes([i]) * 16) for i in (0, 10, 123, 125, 255)]
    await store.publish_blocks(address.worker_id, address.epoch, odd, [])
    assert (await store.lookup(odd, None)).cached_blocks == {"w": 5}


# Sessions


@pytest.mark.parametrize("session_id", ["s", "", "x" * 10_000, "\ud800", "{other}:é"])
async def test_a_session_is_found_with_the_lookup(store: RedisPlacementStore, session_id: str) -> None:
    await store.put_session(SessionId(session_id), session_record(), TTL_MS)
    assert (await store.lookup(chain(1), SessionId(session_id))).session == session_record()
    assert (await store.lookup([], SessionId(session_id))).session == session_record()
    assert (await store.lookup(chain(1), SessionId("another"))).session is None


async def test_the_last_session_record_wins_and_expires(store: RedisPlacementStore) -> None:
    await store.put_session(SessionId("s"), session_record(epoch=1), TTL_MS)
    await store.put_session(SessionId("s"), session_record(epoch=2), 20)
    await asyncio.sleep(0.05)
    assert (await store.lookup([], SessionId("s"))).session is None


async def test_an_unreadable_session_is_none(store: RedisPlacementStore, client: Redis) -> None:
    await client.set(store._session_key(SessionId("s")), b"\xff\x00")
    assert (await store.lookup([], SessionId("s"))).session is None


# Keys


async def test_every_key_expires_and_shares_one_cluster_slot(
    store: RedisPlacementStore, client: Redis
) -> None:
    address = await register(store, "w")
    await store.publish_blocks(address.worker_id, address.epoch, chain(2), [])
    await store.put_session(SessionId("s"), session_record(), TTL_MS)
    await store.renew(address, STATUS, TTL_MS)
    keys = [key async for key in client.scan_iter(store._prefix + b"*")]
    assert len(keys) == 6
    assert len({key_slot(key) for key in keys}) == 1
    for key in keys:
        assert await client.pttl(key) > 0, key


@pytest.mark.parametrize("model", ["}", "{", "{}", "a{b}c", "ü", "a b"])
async def test_any_model_name_keeps_its_keys_in_one_slot(
    new_store: Callable[..., RedisPlacementStore], model: str
) -> None:
    store = new_store(model=model)
    keys = [*store._lease_keys(WorkerId("w")), store._key("workers"), store._block_key(chain(1)[0])]
    assert len({key_slot(key) for key in keys}) == 1


async def test_an_empty_model_name_is_refused(new_store: Callable[..., RedisPlacementStore]) -> None:
    with pytest.raises(ValueError, match="model"):
        new_store(model="")


async def test_the_scripts_run_on_a_redis_cluster(
    cluster_url: str, new_store: Callable[..., RedisPlacementStore]
) -> None:
    """A cluster refuses any call whose keys are not all in one slot."""
    store = new_store(url=cluster_url)
    address = await register(store, "w")
    await store.renew(address, STATUS, TTL_MS)
    await store.publish_blocks(address.worker_id, address.epoch, chain(4), chain(1, "b"))
    await store.put_session(SessionId("s"), session_record(), TTL_MS)
    hits = await store.lookup(chain(5), SessionId("s"))
    assert (hits.cached_blocks, hits.session) == ({"w": 4}, session_record())
    assert len(await store.workers()) == 1
    await store.release(address)


@pytest.fixture
async def cluster_url(tmp_path: Path) -> AsyncIterator[str]:
    """A cluster of one node that owns all slots; it needs a TCP port, which `EmbeddedRedis` never opens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        # The cluster bus takes the port 10,000 higher.
        port = 20_000 + probe.getsockname()[1] % 20_000
    options = ("--cluster-enabled", "yes", "--bind", "127.0.0.1", "--save", "")
    node = await asyncio.create_subprocess_exec(
        find_redis_server(), "--port", str(port), *options, cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    client = connect(f"redis://127.0.0.1:{port}")
    try:
        for _ in range(200):
            try:
                if (await client.execute_command("CLUSTER INFO"))["cluster_state"] == "ok":
                    break
                await client.execute_command("CLUSTER ADDSLOTS", *range(16384))
            except RedisError:
                await asyncio.sleep(0.02)
        yield f"redis://127.0.0.1:{port}"
    finally:
        await client.aclose()
        node.kill()
        await node.wait()


# Redis misbehaves. These use a server of their own, which they break.


@pytest.fixture
def fragile_server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


async def test_a_flushed_redis_loses_leases_and_heals(
    fragile_server: EmbeddedRedis, new_store: Callable[..., RedisPlacementStore]
) -> None:
    store = new_store(url=fragile_server.url)
    before = await register(store, "w", floor=100)
    client = connect(fragile_server.url)
    await client.flushall()
    await client.script_flush()
    await client.aclose()
    assert await store.workers() == []
    with pytest.raises(LeaseLostError):
        await store.renew(before, STATUS, TTL_MS)
    after = await register(store, "w", floor=before.epoch + 1)
    assert after.epoch > before.epoch
    assert [record.address for record in await store.workers()] == [after]


async def test_a_renewal_heals_evicted_keys(store: RedisPlacementStore, client: Redis) -> None:
    address = await register(store, "w", floor=50)
    await client.delete(store._key("workers"), store._lease_keys(WorkerId("w"))[1])
    await store.renew(address, STATUS, TTL_MS)
    assert [record.address for record in await store.workers()] == [address]
    assert (await register(store, "w")).epoch == 51


async def test_every_call_says_unavailable_where_nothing_listens(
    new_store: Callable[..., RedisPlacementStore],
) -> None:
    store = new_store(url="unix:///nonexistent.sock")
    address = WorkerAddress(worker_id=WorkerId("w"), epoch=Epoch(1), grpc_address="h:1", host_id="h")
    calls = [
        lambda: register(store, "w"),
        lambda: store.renew(address, STATUS, TTL_MS),
        lambda: store.release(address),
        lambda: store.workers(),
        lambda: store.lookup(chain(1), None),
        lambda: store.put_session(SessionId("s"), session_record(), TTL_MS),
        lambda: store.publish_blocks(WorkerId("w"), Epoch(1), chain(1), []),
    ]
    for call in calls:
        with pytest.raises(PlacementUnavailableError):
            await call()


async def test_a_killed_redis_is_unavailable_and_used_again_when_back(
    fragile_server: EmbeddedRedis, new_store: Callable[..., RedisPlacementStore], tmp_path: Path
) -> None:
    # A link that is pointed at the second server stands for a service address that stays the same.
    link = tmp_path / "redis"
    link.symlink_to(fragile_server.directory)
    password = fragile_server.url.split(":")[2].split("@")[0]
    store = new_store(url=f"unix://:{password}@{link}/redis.sock")
    await register(store, "w")
    fragile_server.close()
    for _ in range(3):
        with pytest.raises(PlacementUnavailableError):
            await store.workers()
    with EmbeddedRedis() as second:
        await _set_password(second, password)
        link.unlink()
        link.symlink_to(second.directory)
        assert await store.workers() == []
        await register(store, "w")
        assert len(await store.workers()) == 1


async def _set_password(server: EmbeddedRedis, password: str) -> None:
    client = connect(server.url)
    await client.config_set("requirepass", password)
    await client.aclose()


async def test_a_wrong_password_is_unavailable_with_the_reason(
    redis_server: EmbeddedRedis, new_store: Callable[..., RedisPlacementStore]
) -> None:
    store = new_store(url=f"unix://:wrong@{redis_server.directory}/redis.sock")
    with pytest.raises(PlacementUnavailableError, match=r"(?i)password"):
        await store.workers()


async def test_a_slow_redis_times_out_and_keeps_its_connections(
    fragile_server: EmbeddedRedis, new_store: Callable[..., RedisPlacementStore]
) -> None:
    store = new_store(url=fragile_server.url, op_timeout_s=0.03, max_connections=2)
    patient = new_store(url=fragile_server.url)
    address = await register(patient, "w")
    await patient.workers()
    control = connect(fragile_server.url)
    sleeping = asyncio.create_task(control.execute_command("DEBUG", "SLEEP", "0.3"))
    await asyncio.sleep(0.02)
    # More calls than connections: those that got none time out as well, none is queued for later.
    results = await asyncio.gather(*(store.workers() for _ in range(8)), return_exceptions=True)
    assert [type(result) for result in results] == [PlacementUnavailableError] * 8
    await sleeping
    for _ in range(50):
        try:
            assert [record.address for record in await store.workers()] == [address]
            break
        except PlacementUnavailableError:
            await asyncio.sleep(0.02)
    else:
        pytest.fail("did not recover")
    # The readiness check's, patient's, control's, and each of the store's two opened once.
    assert (await control.info("stats"))["total_connections_received"] == 1 + 1 + 1 + 2
    await control.aclose()


async def test_a_cancelled_call_leaves_the_store_usable(store: RedisPlacementStore) -> None:
    await register(store, "w")
    for _ in range(20):
        task = asyncio.create_task(store.workers())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert len(await store.workers()) == 1


async def test_a_closed_store_is_unavailable_also_to_who_waits(
    fragile_server: EmbeddedRedis, new_store: Callable[..., RedisPlacementStore]
) -> None:
    store = new_store(url=fragile_server.url)
    await store.workers()
    control = connect(fragile_server.url)
    await control.execute_command("CLIENT", "PAUSE", "2000")
    waiting = asyncio.create_task(store.workers())
    await asyncio.sleep(0.02)
    await store.close()
    with pytest.raises(PlacementUnavailableError, match="closed"):
        await waiting
    with pytest.raises(PlacementUnavailableError, match="closed"):
        await store.workers()
    await store.close()
    await control.aclose()


@pytest.mark.parametrize("url", ["http://localhost", "localhost:6379", "redis://h?socket_timeout=x"])
def test_a_url_that_is_none_of_redis_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"Redis URL|Invalid value"):
        connect(url)
