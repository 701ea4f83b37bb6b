"""Who is in the cluster, both ends of it (hence the length): `LeaseKeeper`, `WorkerDirectory`.

A worker keeps its lease with the first, a router sees all workers through the second. Neither needs the
store to be there: a worker serves under a provisional epoch until it is, a router goes on with what it
last saw.
"""

import asyncio
import contextlib
import itertools
import logging
import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence

import msgspec

from cluster.block_changes import BlockChanges
from cluster.ids import ChainHash, Epoch, WorkerId
from cluster.messages import Record, Role, WorkerAddress, WorkerRecord, WorkerStatus
from cluster.placement.store import (
    LeaseLostError,
    PlacementStore,
    PlacementUnavailableError,
    WorkerIdentity,
)

TICK_S = 0.05
PUBLISH_BATCH_BLOCKS = 512
FIRST_RETRY_S = 0.1
LAST_RETRY_S = 1.0

_log = logging.getLogger(__name__)


def epoch_now(previous: int = 0) -> Epoch:
    """A floor for the next epoch: microseconds since the Unix epoch, but above `previous` in any case.

    Microseconds, because the store compares epochs as doubles, which are exact to 2^53.
    """
    return Epoch(max(time.time_ns() // 1_000, previous + 1))


def retry_delay_s(num_failures: int, jitter: float) -> float:
    """Doubles from FIRST_RETRY_S to LAST_RETRY_S; `jitter` in [0, 1) takes off up to half."""
    delay = min(LAST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(num_failures - 1, 16))
    return delay * (1 - jitter / 2)


class LeaseKeeper:
    """Keeps one worker registered, its status current and its cached blocks indexed.

    Callbacks run on the event loop and must not block. `status` and `drain_blocks` are called at every
    tick; `all_blocks` after each registration and every `block_refresh_s`, before the index forgets.
    `on_epoch` tells each new address, the first included: hand-offs under an older epoch are stale then.
    """

    def __init__(
        self,
        store: PlacementStore,
        identity: WorkerIdentity,
        status: Callable[[], WorkerStatus],
        *,
        ttl_s: float = 3.0,
        status_interval_s: float = 0.2,
        block_refresh_s: float = 300.0,
        on_epoch: Callable[[WorkerAddress], None] | None = None,
        drain_blocks: Callable[[], BlockChanges] | None = None,
        all_blocks: Callable[[], Sequence[ChainHash]] | None = None,
    ) -> None:
        """A changed status is published after `status_interval_s`, an unchanged one every third of `ttl_s`.

        `block_refresh_s` must be well below the store's block TTL.
        """
        if ttl_s <= 0 or status_interval_s <= 0 or block_refresh_s <= 0:
            raise ValueError("ttl_s, status_interval_s and block_refresh_s must be above 0")
        self._store = store
        self._identity = identity
        self._status = status
        self._ttl_ms = max(1, round(ttl_s * 1_000))
        self._renew_interval_s = ttl_s / 3
        self._status_interval_s = min(status_interval_s, self._renew_interval_s)
        self._block_refresh_s = block_refresh_s
        self._on_epoch = on_epoch or (lambda _: None)
        self._drain_blocks = drain_blocks or BlockChanges
        self._all_blocks = all_blocks or (lambda: ())
        self._task: asyncio.Task[None] | None = None
        self._is_registered = False
        self._num_failures = 0
        self._retry_at = 0.0
        self._renewed_at = 0.0
        self._published_status: WorkerStatus | None = None
        self._blocks_refreshed_at = 0.0
        self._pending: dict[ChainHash, bool] = {}
        """Changes not yet published: hash -> whether it is held. The last change of a hash wins."""
        self._address = _address(identity, epoch_now())

    @property
    def address(self) -> WorkerAddress:
        """Under the epoch in force: the store's, or a provisional one until it has answered."""
        return self._address

    @property
    def is_registered(self) -> bool:
        """Whether the store, when last heard, agreed that the lease is ours."""
        return self._is_registered

    async def start(self) -> WorkerAddress:
        """Try to register once, then keep at it in the background: returns also while the store is away."""
        assert self._task is None, "started twice"
        self._on_epoch(self._address)
        await self._attempt()
        self._task = _background(self._keep(), f"lease of {self._identity.worker_id}")
        return self._address

    async def stop(self) -> None:
        """Stop renewing and give the lease back, if the store is there to take it. Safe to repeat."""
        task, self._task = self._task, None
        if task is None:
            return
        await _cancelled(task)
        self._is_registered = False
        if self._published_status is None:
            return
        with contextlib.suppress(PlacementUnavailableError):
            await self._store.release(self._address)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._take_changes()
            if time.monotonic() >= self._retry_at:
                await self._attempt()

    async def _attempt(self) -> None:
        """Whatever is due now; a failure is counted and waited out, never raised."""
        try:
            if not self._is_registered:
                await self._register_worker()
            await self._renew_if_due()
            await self._publish_pending()
        except LeaseLostError as error:
            _log.warning("lease lost, registering again: %s", error)
            self._is_registered = False
        except PlacementUnavailableError as error:
            if time.monotonic() - self._renewed_at > self._ttl_ms / 1_000:
                self._is_registered = False  # it has expired by now
            self._num_failures += 1
            self._retry_at = time.monotonic() + retry_delay_s(self._num_failures, random.random())  # noqa: S311
            if self._num_failures == 1:
                _log.warning("placement store unavailable, serving without it: %s", error)
        else:
            if self._num_failures:
                _log.info("placement store is back")
            self._num_failures = 0

    async def _register_worker(self) -> None:
        # The first registration may keep the provisional epoch; a later one is a new incarnation.
        is_first = self._published_status is None
        floor = self._address.epoch if is_first else epoch_now(self._address.epoch)
        status = self._status()
        address = await self._store.register(self._identity, status, self._ttl_ms, floor=floor)
        self._renewed_at, self._published_status = time.monotonic(), status
        self._is_registered = True
        if address != self._address:
            self._address = address
            self._on_epoch(address)
        self._pending.clear()
        self._refresh_blocks()

    async def _renew_if_due(self) -> None:
        since_s = time.monotonic() - self._renewed_at
        if since_s < self._status_interval_s:
            return
        status = self._status()
        if status != self._published_status or since_s >= self._renew_interval_s:
            renewed_at = time.monotonic()
            await self._store.renew(self._address, status, self._ttl_ms)
            self._renewed_at, self._published_status = renewed_at, status

    async def _publish_pending(self) -> None:
        """Send changes in batches, until none is left or the lease must be renewed first."""
        if time.monotonic() - self._blocks_refreshed_at >= self._block_refresh_s:
            self._refresh_blocks()
        while self._pending and time.monotonic() - self._renewed_at < self._renew_interval_s:
            batch = list(itertools.islice(self._pending.items(), PUBLISH_BATCH_BLOCKS))
            stored = [chain_hash for chain_hash, is_held in batch if is_held]
            removed = [chain_hash for chain_hash, is_held in batch if not is_held]
            await self._store.publish_blocks(self._identity.worker_id, self._address.epoch, stored, removed)
            for chain_hash, _ in batch:
                del self._pending[chain_hash]

    def _refresh_blocks(self) -> None:
        self._blocks_refreshed_at = time.monotonic()
        for chain_hash in self._all_blocks():
            self._pending.setdefault(chain_hash, True)

    def _take_changes(self) -> None:
        """Drained at every tick, so that nothing piles up at the source while the store is away."""
        changes = self._drain_blocks()
        if not self._is_registered:
            return  # the next registration publishes all blocks
        for chain_hash in changes.stored:
            self._pending[chain_hash] = True
        for chain_hash in changes.removed:
            self._pending[chain_hash] = False


class SeenWorker(Record, frozen=True, kw_only=True):
    record: WorkerRecord
    vanished_at_s: float | None = None
    """When a refresh first missed it; None while its lease is alive."""


Seen = dict[WorkerId, SeenWorker]


def merge_seen(previous: Seen, fresh: Sequence[WorkerRecord], now_s: float, grace_s: float) -> Seen:
    """What is known after a refresh: the fresh records, and those that vanished up to `grace_s` ago."""
    seen = {record.address.worker_id: SeenWorker(record=record) for record in fresh}
    for worker_id, worker in previous.items():
        vanished_at_s = now_s if worker.vanished_at_s is None else worker.vanished_at_s
        if worker_id not in seen and now_s - vanished_at_s < grace_s:
            seen[worker_id] = SeenWorker(record=worker.record, vanished_at_s=vanished_at_s)
    return seen


def usable(seen: Seen) -> tuple[WorkerRecord, ...]:
    """Workers with a living lease; for a role that has none left, those that vanished lately.

    A store that was flushed, or away for longer than a lease, forgets workers that serve on and register
    again within moments: requests in between should not be refused for that.
    """
    living = {worker.record.role for worker in seen.values() if worker.vanished_at_s is None}
    return tuple(
        worker.record
        for _, worker in sorted(seen.items())
        if worker.vanished_at_s is None or worker.record.role not in living
    )


def with_local_load(
    records: Sequence[WorkerRecord], outstanding: Mapping[WorkerId, int]
) -> tuple[WorkerRecord, ...]:
    """Records whose queued tokens are at least what this process has outstanding there.

    The larger of the two, not the sum: a worker's own figure soon contains ours.
    """
    return tuple(
        _with_queued_tokens(record, outstanding.get(record.address.worker_id, 0)) for record in records
    )


def _with_queued_tokens(record: WorkerRecord, num_tokens: int) -> WorkerRecord:
    if num_tokens <= record.status.queued_tokens:
        return record
    status = msgspec.structs.replace(record.status, queued_tokens=num_tokens)
    return msgspec.structs.replace(record, status=status)


class WorkerDirectory:
    """A router's view of the workers: refreshed in the background, read without waiting.

    While the store is away the last view stands (`is_fresh`, `age_s` tell).
    """

    def __init__(self, store: PlacementStore, *, refresh_s: float = 0.2, grace_s: float = 5.0) -> None:
        """`grace_s`: see `usable`; it should exceed a lease's renewal interval and LAST_RETRY_S together."""
        if refresh_s <= 0 or grace_s < 0:
            raise ValueError("refresh_s must be above 0 and grace_s at least 0")
        self._store = store
        self._refresh_s = refresh_s
        self._grace_s = grace_s
        self._seen: Seen = {}
        self._outstanding: dict[WorkerId, int] = {}
        self._snapshot: tuple[WorkerRecord, ...] | None = ()
        self._refreshed_at: float | None = None
        self._is_fresh = False
        self._task: asyncio.Task[None] | None = None

    @property
    def is_fresh(self) -> bool:
        """Whether the last refresh was answered."""
        return self._is_fresh

    @property
    def age_s(self) -> float | None:
        """Since the last refresh that was answered; None where none ever was."""
        return None if self._refreshed_at is None else time.monotonic() - self._refreshed_at

    async def start(self) -> None:
        """Refresh once, answered or not, and from then on in the background."""
        assert self._task is None, "started twice"
        await self.refresh()
        self._task = _background(self._keep_refreshing(), "worker directory")

    async def stop(self) -> None:
        """Safe to repeat."""
        task, self._task = self._task, None
        if task is not None:
            await _cancelled(task)

    def snapshot(self, role: Role | None = None) -> tuple[WorkerRecord, ...]:
        """The usable workers, of one role or all, ordered by id; cheap, and never waits."""
        if self._snapshot is None:
            self._snapshot = with_local_load(usable(self._seen), self._outstanding)
        if role is None:
            return self._snapshot
        return tuple(record for record in self._snapshot if record.role == role)

    def local_adjust(self, worker_id: WorkerId, num_tokens: int) -> None:
        """Count prompt tokens just sent to a worker (above 0), or computed by it or given up (below 0).

        So a burst between two refreshes is spread. Each addition must be taken back exactly once.
        """
        total = self._outstanding.get(worker_id, 0) + num_tokens
        if total > 0:
            self._outstanding[worker_id] = total
        else:
            self._outstanding.pop(worker_id, None)
        self._snapshot = None

    async def refresh(self) -> None:
        """Ask the store once; the background does this every `refresh_s`."""
        try:
            fresh = await self._store.workers()
        except PlacementUnavailableError as error:
            if self._is_fresh:
                _log.warning("placement store unavailable, using the last view: %s", error)
            self._is_fresh = False
            return
        self._seen = merge_seen(self._seen, fresh, time.monotonic(), self._grace_s)
        self._outstanding = {w: n for w, n in self._outstanding.items() if w in self._seen}
        self._snapshot = None
        self._refreshed_at = time.monotonic()
        self._is_fresh = True

    async def _keep_refreshing(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_s)
            await self.refresh()


def _address(identity: WorkerIdentity, epoch: Epoch) -> WorkerAddress:
    return WorkerAddress(
        worker_id=identity.worker_id,
        epoch=epoch,
        grpc_address=identity.grpc_address,
        host_id=identity.host_id,
    )


def _background(work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
    """A task that ends only when cancelled; should it fail after all, that is logged at once."""

    def report(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            _log.critical("%s stopped", name, exc_info=task.exception())

    task = asyncio.create_task(work, name=name)
    task.add_done_callback(report)
    return task


async def _cancelled(task: asyncio.Task[None]) -> None:
    """Cancel and wait for the end; a failure was logged when it happened."""
    task.cancel()
    await asyncio.wait((task,))
