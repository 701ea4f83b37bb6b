"""PlacementStore on Redis: one Lua script a transition, all keys of a model under one hash tag.

Keys, each `headrace:{model}:` and then:

    lease:<worker id>   hash: epoch, identity, status    expires with the lease
    epoch:<worker id>   the highest epoch given           a day after its last use
    workers             set of worker ids to ask about    a day after the last renewal
    block:<chain hash>  hash: worker id -> epoch          `block_ttl_s` after it was last published
    session:<digest>    SessionRecord                     as `put_session` says
"""

import asyncio
import hashlib
import importlib.resources
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.typing import EncodableT

from cluster.ids import ChainHash, Epoch, SessionId, WorkerId
from cluster.messages import SessionRecord, WorkerAddress, WorkerRecord, WorkerStatus
from cluster.placement.store import (
    IndexHits,
    LeaseLostError,
    PlacementUnavailableError,
    WorkerIdentity,
)

MAX_LOOKUP_BLOCKS = 512
MAX_PUBLISH_BLOCKS = 512
MAX_HOLDERS = 1024
MAX_WORKER_ID_CHARS = 128
MAX_EPOCH = 2**53 - 1
MEMORY_TTL_MS = 24 * 3600 * 1000

T = TypeVar("T")
_log = logging.getLogger(__name__)
_status_decoder = msgspec.msgpack.Decoder(WorkerStatus)
_identity_decoder = msgspec.msgpack.Decoder(WorkerIdentity)
_session_decoder = msgspec.msgpack.Decoder(SessionRecord)


def connect(redis_url: str, *, io_timeout_s: float = 1.0, max_connections: int = 16) -> Redis:
    """A client for `redis://`, `rediss://` or `unix://`; nothing is opened before its first use.

    It never retries by itself: who calls the store decides whether and when. `io_timeout_s` bounds
    connecting and each reply, so a connection that hangs is given up rather than kept. Raises
    ValueError for a URL it cannot use.
    """
    return Redis.from_url(
        redis_url,
        socket_timeout=io_timeout_s,
        socket_connect_timeout=io_timeout_s,
        retry=Retry(NoBackoff(), 0),
        max_connections=max_connections,
        decode_responses=False,
        protocol=2,
        driver_info=None,
    )


class RedisPlacementStore:
    """One model's placement state in one Redis; belongs to the event loop that first uses it.

    A call that outlasts `op_timeout_s` raises PlacementUnavailableError, but its command is left to finish:
    a connection is neither lost to a slow reply nor stopped half open, so a slow Redis is not also made
    to reconnect. As many commands are under way as the client may open connections; calls beyond wait for
    one of them within their own timeout.
    """

    def __init__(
        self,
        client: Redis,
        model: str,
        *,
        block_ttl_s: float,
        op_timeout_s: float,
    ) -> None:
        if not model:
            raise ValueError("model must not be empty")
        if op_timeout_s <= 0 or block_ttl_s <= 0:
            raise ValueError("op_timeout_s and block_ttl_s must be above 0")
        self._client = client
        self._block_ttl_ms = max(1, round(block_ttl_s * 1_000))
        self._op_timeout_s = op_timeout_s
        # A brace or a percent sign in the name would end the hash tag or clash with this quoting.
        self._prefix = f"headrace:{{{quote(model, safe='/:.-_ ')}}}:".encode()
        self._slots = asyncio.Semaphore(client.connection_pool.max_connections)
        self._under_way: set[asyncio.Future[Any]] = set()
        self._is_closed = False
        self._register = client.register_script(_lua("register"))
        self._renew = client.register_script(_lua("renew"))
        self._release = client.register_script(_lua("release"))
        self._workers = client.register_script(_lua("workers"))
        self._publish_blocks = client.register_script(_lua("publish_blocks"))
        self._lookup = client.register_script(_lua("lookup"))

    async def register(
        self, identity: WorkerIdentity, status: WorkerStatus, ttl_ms: int, *, floor: Epoch
    ) -> WorkerAddress:
        _check_worker_id(identity.worker_id)
        if not 0 <= floor < MAX_EPOCH:
            raise ValueError(f"floor is {floor}, must be in [0, {MAX_EPOCH})")
        keys = [*self._lease_keys(identity.worker_id), self._key("workers")]
        args: list[EncodableT] = [
            identity.worker_id,
            floor,
            msgspec.msgpack.encode(identity),
            msgspec.msgpack.encode(status),
            ttl_ms,
            MEMORY_TTL_MS,
        ]
        reply = await self._answer(lambda: self._register(keys, args))
        return WorkerAddress(
            worker_id=identity.worker_id,
            epoch=Epoch(int(reply)),
            grpc_address=identity.grpc_address,
            host_id=identity.host_id,
        )

    async def renew(self, address: WorkerAddress, status: WorkerStatus, ttl_ms: int) -> None:
        keys = [*self._lease_keys(address.worker_id), self._key("workers")]
        blob = msgspec.msgpack.encode(status)
        args: list[EncodableT] = [address.worker_id, address.epoch, blob, ttl_ms, MEMORY_TTL_MS]
        if not await self._answer(lambda: self._renew(keys, args)):
            raise _lease_lost(address.worker_id, address.epoch)

    async def release(self, address: WorkerAddress) -> None:
        keys = [self._lease_keys(address.worker_id)[0], self._key("workers")]
        await self._answer(lambda: self._release(keys, [address.worker_id, address.epoch]))

    async def workers(self) -> list[WorkerRecord]:
        keys, args = [self._key("workers")], [self._key("lease:")]
        reply = await self._answer(lambda: self._workers(keys, args))
        records = (_worker_record(*reply[i : i + 3]) for i in range(0, len(reply), 3))
        return [record for record in records if record is not None]

    async def publish_blocks(
        self, worker_id: WorkerId, epoch: Epoch, stored: Sequence[ChainHash], removed: Sequence[ChainHash]
    ) -> None:
        """As the protocol; sent in chunks of MAX_PUBLISH_BLOCKS, so a failure can leave some recorded.

        All of `stored` goes before `removed`. Repeating the call is harmless.
        """
        changes = [(chain_hash, True) for chain_hash in stored]
        changes += [(chain_hash, False) for chain_hash in removed]
        for start in range(0, len(changes), MAX_PUBLISH_BLOCKS):
            await self._publish_chunk(worker_id, epoch, changes[start : start + MAX_PUBLISH_BLOCKS])

    async def _publish_chunk(
        self, worker_id: WorkerId, epoch: Epoch, changes: Sequence[tuple[ChainHash, bool]]
    ) -> None:
        keys = [self._lease_keys(worker_id)[0]]
        keys += [self._block_key(chain_hash) for chain_hash, _ in changes]
        num_held = sum(is_held for _, is_held in changes)
        args: list[EncodableT] = [worker_id, epoch, self._block_ttl_ms, num_held]
        if not await self._answer(lambda: self._publish_blocks(keys, args)):
            raise _lease_lost(worker_id, epoch)

    async def lookup(self, hashes: Sequence[ChainHash], session_id: SessionId | None) -> IndexHits:
        keys = [self._block_key(chain_hash) for chain_hash in hashes[:MAX_LOOKUP_BLOCKS]]
        num_blocks = len(keys)
        if session_id is not None:
            keys.append(self._session_key(session_id))
        if not keys:
            return IndexHits(cached_blocks={}, session=None)
        args: list[EncodableT] = [self._key("lease:"), num_blocks, MAX_HOLDERS]
        session, *holders = await self._answer(lambda: self._lookup(keys, args))
        return IndexHits(
            cached_blocks={WorkerId(holders[i].decode()): holders[i + 1] for i in range(0, len(holders), 2)},
            session=_session_record(session),
        )

    async def put_session(self, session_id: SessionId, record: SessionRecord, ttl_ms: int) -> None:
        key, blob = self._session_key(session_id), msgspec.msgpack.encode(record)
        await self._answer(lambda: self._client.set(key, blob, px=ttl_ms))

    async def close(self) -> None:
        """Give up what is under way and close the client; safe to repeat."""
        self._is_closed = True
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        await self._client.aclose()

    async def _answer(self, command: Callable[[], Awaitable[T]]) -> T:
        """The command's reply within the timeout, or PlacementUnavailableError; see the class."""
        if self._is_closed:
            raise PlacementUnavailableError("the store is closed")
        try:
            async with asyncio.timeout(self._op_timeout_s):
                await self._slots.acquire()
                task = asyncio.ensure_future(command())
                self._under_way.add(task)
                task.add_done_callback(self._finished)
                return await _reply_of(task)
        except TimeoutError:
            raise PlacementUnavailableError(f"Redis did not answer in {self._op_timeout_s:g} s") from None
        except (RedisError, OSError) as error:
            raise PlacementUnavailableError(f"Redis: {type(error).__name__}: {error}") from error

    def _finished(self, task: asyncio.Future[Any]) -> None:
        self._slots.release()
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()  # read, so that one nobody waits for any more is not reported as lost

    def _key(self, suffix: str) -> bytes:
        return self._prefix + suffix.encode()

    def _lease_keys(self, worker_id: WorkerId) -> tuple[bytes, bytes]:
        return self._key(f"lease:{worker_id}"), self._key(f"epoch:{worker_id}")

    def _block_key(self, chain_hash: ChainHash) -> bytes:
        return self._prefix + b"block:" + chain_hash

    def _session_key(self, session_id: SessionId) -> bytes:
        # Session ids come from users: a digest bounds the key, whatever they send.
        text = session_id.encode("utf-8", "surrogatepass")
        return self._prefix + b"session:" + hashlib.blake2b(text, digest_size=16).digest()


async def _reply_of(task: asyncio.Future[T]) -> T:
    """Wait for a command without cancelling it when the wait is; closing the store cancels it."""
    await asyncio.wait((task,))
    if task.cancelled():
        raise PlacementUnavailableError("the store was closed")
    return task.result()


def _lua(name: str) -> str:
    return (importlib.resources.files("cluster.placement") / "lua" / f"{name}.lua").read_text("utf-8")


def _check_worker_id(worker_id: WorkerId) -> None:
    if not 1 <= len(worker_id) <= MAX_WORKER_ID_CHARS:
        raise ValueError(f"worker id has {len(worker_id)} characters, must have 1 to {MAX_WORKER_ID_CHARS}")


def _lease_lost(worker_id: WorkerId, epoch: Epoch) -> LeaseLostError:
    return LeaseLostError(f"{worker_id} no longer holds its lease under epoch {epoch}")


def _worker_record(epoch: bytes, identity_blob: bytes, status_blob: bytes) -> WorkerRecord | None:
    """None, and a warning, for what this version cannot read: one such worker must not hide the others."""
    try:
        identity = _identity_decoder.decode(identity_blob)
        status = _status_decoder.decode(status_blob)
    except msgspec.MsgspecError as error:
        _log.warning("ignored a worker whose registration cannot be read: %s", error)
        return None
    return WorkerRecord(
        address=WorkerAddress(
            worker_id=identity.worker_id,
            epoch=Epoch(int(epoch)),
            grpc_address=identity.grpc_address,
            host_id=identity.host_id,
        ),
        role=identity.role,
        model=identity.model,
        protocol_version=identity.protocol_version,
        layout_fingerprint=identity.layout_fingerprint,
        block_size_tokens=identity.block_size_tokens,
        status=status,
    )


def _session_record(blob: bytes | None) -> SessionRecord | None:
    if blob is None:
        return None
    try:
        return _session_decoder.decode(blob)
    except msgspec.MsgspecError as error:
        _log.warning("ignored a session that cannot be read: %s", error)
        return None
