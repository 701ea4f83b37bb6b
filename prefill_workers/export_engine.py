"""`PrefillEngine` over an engine in other processes, whose ranks stage KV in shared memory layer by layer.

What a hand-off holds, and until when:

    its blocks, on every rank      until its request ends: the next step waits for what is read of them
    its region of staging memory   until every rank said Released: a copy may be under way when it is settled

`release` says Settled: behind the decode worker's acknowledgement, a failure or a cancel, however it ended.
Where no word comes, a rank settles an export itself once its lease is over.
"""

import itertools
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from cluster.block_changes import BlockChanges
from cluster.ids import ChainHash, RequestId
from cluster.kv_layout import KvLayout
from cluster.transfer import KvChunk
from prefill_workers.engine import ExportChunk, Held, PrefillDone, PrefillFailed, PrefillJob
from prefill_workers.kv_events import KvEvents
from prefill_workers.piece_copier import piece_offset
from prefill_workers.rank_channel import (
    ChannelError,
    Export,
    ExportFailed,
    ExportSettings,
    FromRank,
    Hello,
    LayersReady,
    Opened,
    RankHub,
    Released,
    Settled,
    Started,
)
from prefill_workers.staging import StagingArena

logger = logging.getLogger(__name__)

_WAIT_S = 0.02
"""Longest that a step waits for something to happen: then requests are looked at."""
_OPEN_TIMEOUT_S = 5.0
_FIRST_NUMBER = 1


class EngineLostError(Exception):
    """A rank is gone. Nothing that is under way will end; handled by the worker, which is replaced."""


class Submission(Protocol):
    """One request in the engine."""

    def poll(self) -> bool:
        """Whether it has ended. Raises the engine's error where it failed."""
        ...

    def abort(self) -> None: ...


class Submitter(Protocol):
    """The engine's front: in this process, while its ranks need not be."""

    def submit(self, token_ids: Sequence[int], number: int, salt: str) -> Submission:
        """`number` reaches the connector with the request; prefixes are shared within `salt` alone."""
        ...

    def poll_events(self) -> Sequence[object]:
        """KV-cache events since the last call, in order (`KvEvents.take`). From any thread; never waits."""
        ...

    def shutdown(self) -> None: ...


StartSubmitter = Callable[[ExportSettings], Submitter]
"""Hands the settings on to the ranks, which connect while it runs."""


class _Job(msgspec.Struct, eq=False):
    job: PrefillJob
    export: ExportChunk
    number: int
    offset: int
    """Of its region in the staging memory."""
    num_bytes: int
    submission: Submission | None = None
    num_bytes_ready: int = 0
    ranks_of: dict[tuple[int, int], set[int]] = {}
    """Of (layer, first token): which ranks have copied theirs."""
    cached_tokens: int = 0
    failure: str | None = None
    is_reported: bool = False


class ExportEngine:
    """`PrefillEngine`. Blocks are the other engine's own: here are counted those that its jobs must hold."""

    def __init__(
        self,
        layout: KvLayout,
        start: StartSubmitter,
        *,
        num_ranks: int,
        num_blocks: int,
        staging_bytes: int,
        lease_s: float,
        start_timeout_s: float,
        index_block_tokens: int,
    ) -> None:
        """Starts the engine. `layout.block_size_tokens` is the engine's, `index_block_tokens` placement's.

        Raises ChannelError where its ranks do not come up, OSError where there is no memory to stage KV in.
        """
        self._layout = layout
        self._lease_s = lease_s
        self._num_blocks = num_blocks
        self._index_block_tokens = index_block_tokens
        self._events_lock = threading.Lock()
        self._events = KvEvents(
            layout.fingerprint,
            engine_block_tokens=layout.block_size_tokens,
            index_block_tokens=index_block_tokens,
            # Its pool may be larger than it was asked for.
            max_blocks=2 * num_blocks,
        )
        self._arena = StagingArena(staging_bytes)
        self._heard: queue.SimpleQueue[FromRank | EngineLostError] = queue.SimpleQueue()
        socket_name = f"headrace-ranks-{secrets.token_hex(16)}"
        self._hub = RankHub(
            socket_name,
            self._heard.put,
            lambda who: self._heard.put(EngineLostError(f"{who} has left the engine")),
        )
        self._numbers = itertools.count(_FIRST_NUMBER)
        self._jobs: dict[RequestId, _Job] = {}
        self._by_number: dict[int, _Job] = {}
        """Until every rank has released it: longer than in `_jobs`."""
        self._unreleased: dict[int, set[int]] = {}
        """Of settled ones, the ranks that have not."""
        self._opening, self._num_opened = 0, 0
        """The export that connectors are being told of, and how many know."""
        self._lost: EngineLostError | None = None
        """Set: for good."""
        settings = ExportSettings(
            socket_name=socket_name,
            staging_path=self._arena.path,
            num_ranks=num_ranks,
            num_layers=layout.num_layers,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            tokens_per_block=layout.block_size_tokens,
            wire_dtype=layout.dtype,
        )
        self._submitter: Submitter | None = None
        try:
            self._submitter = start(settings)
            workers = self._hub.wait_for(num_ranks, start_timeout_s)
            self._check_pools(workers)
        except BaseException:
            self.close()
            raise
        self._ranks = frozenset(hello.rank for hello in workers)
        self._exporting = frozenset(hello.rank for hello in workers if hello.is_exporting)
        self._log_copy_costs(workers)

    @property
    def layout(self) -> KvLayout:
        return self._layout

    @property
    def free_kv_tokens(self) -> int:
        held = sum(self._layout.num_blocks_for(len(job.job.token_ids)) for job in self._by_number.values())
        return max(self._num_blocks - held, 0) * self._layout.block_size_tokens

    @property
    def held(self) -> Held:
        return Held(num_jobs=len(self._by_number), staging_bytes=self._arena.num_bytes_taken)

    @property
    def total_staging_bytes(self) -> int:
        return self._arena.num_bytes

    @property
    def index_block_tokens(self) -> int:
        return self._index_block_tokens

    def drain_changes(self) -> BlockChanges:
        with self._events_lock:
            self._take_events()
            return self._events.drain_changes()

    def all_hashes(self) -> list[ChainHash]:
        with self._events_lock:
            self._take_events()
            return self._events.all_hashes()

    def has_work(self) -> bool:
        return any(not job.is_reported for job in self._jobs.values()) or bool(self._unreleased)

    def can_admit(self, job: PrefillJob) -> bool:
        self._hear_all()
        is_there_room = len(job.token_ids) <= self.free_kv_tokens
        return is_there_room and self._arena.can_take(self._num_bytes(job))

    def admit(self, job: PrefillJob, export: ExportChunk) -> None:
        """Raises ValueError, StagingFullError, EngineLostError, or what the engine says to the request."""
        if job.request_id in self._jobs:
            raise ValueError(f"request {job.request_id} is admitted already")
        if not 0 <= job.first_token <= len(job.token_ids):
            raise ValueError(f"first_token {job.first_token} is outside [0, {len(job.token_ids)}]")
        num_bytes = self._num_bytes(job)
        running = _Job(
            job=job,
            export=export,
            number=next(self._numbers),
            offset=self._arena.take(num_bytes),
            num_bytes=num_bytes,
        )
        self._jobs[job.request_id] = self._by_number[running.number] = running
        try:
            self._open(running)
            assert self._submitter is not None
            with self._events_lock:
                self._events.note_prompt(job.token_ids, job.tenant)
            running.submission = self._submitter.submit(job.token_ids, running.number, job.tenant)
        except BaseException:
            self.release(job.request_id)
            raise

    def step(self) -> list[PrefillDone | PrefillFailed]:
        """Wait a little for the ranks, and export what they have copied. Raises EngineLostError."""
        self._hear_all(_WAIT_S)
        ended: list[PrefillDone | PrefillFailed] = []
        for running in self._jobs.values():
            if not running.is_reported and (end := self._end_of(running)) is not None:
                running.is_reported = True
                ended.append(end)
        return ended

    def release(self, request_id: RequestId) -> None:
        running = self._jobs.pop(request_id, None)
        if running is None:
            return
        if running.submission is not None and not running.is_reported:
            running.submission.abort()
        self._unreleased[running.number] = set(self._ranks)
        self._hub.tell(Settled(running.number))

    def close(self) -> None:
        """End the engine, with whatever is under way."""
        if self._submitter is not None:
            self._submitter.shutdown()
        self._hub.close()
        self._arena.close()

    def _take_events(self) -> None:
        assert self._submitter is not None
        self._events.take(self._submitter.poll_events())

    def _check_pools(self, workers: list[Hello]) -> None:
        """An engine takes less than it was asked for where memory is short: a long prompt would never run."""
        smallest = min(workers, key=lambda hello: hello.num_blocks)
        if smallest.num_blocks < self._num_blocks:
            size = self._layout.block_size_tokens
            raise ChannelError(
                f"rank {smallest.rank} has KV blocks for {smallest.num_blocks * size} tokens, and "
                f"{self._num_blocks * size} were asked for: lower prefill.kv_pool_tokens, or free GPU memory"
            )

    def _log_copy_costs(self, workers: list[Hello]) -> None:
        """Each rank chooses for itself."""
        for hello in workers:
            if (costs := hello.copy_costs) is None:
                continue
            tokens = costs.layerwise_tokens(self._layout.num_layers)
            logger.info(
                "rank %d copies KV %s: a copy takes %.1f us to start, a layer %.4f us a token",
                hello.rank,
                "behind the forward pass" if tokens is None else f"layer by layer from {tokens} tokens on",
                costs.start_us,
                costs.token_us,
            )

    def _num_bytes(self, job: PrefillJob) -> int:
        return (len(job.token_ids) - job.first_token) * self._layout.bytes_per_token

    def _open(self, running: _Job) -> None:
        """Every rank, and rank 0's scheduler, must know of the export before the request comes."""
        self._hub.tell(
            Export(
                number=running.number,
                first_token=running.job.first_token,
                end_token=len(running.job.token_ids),
                offset=running.offset,
                lease_s=self._lease_s,
            )
        )
        self._opening, self._num_opened = running.number, 0
        deadline_s = time.monotonic() + _OPEN_TIMEOUT_S
        while self._num_opened <= len(self._ranks):
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0:
                self._lost = EngineLostError(
                    f"{self._num_opened} of {len(self._ranks) + 1} connectors answered in "
                    f"{_OPEN_TIMEOUT_S:g} s"
                )
                raise self._lost
            self._hear_all(min(remaining_s, _WAIT_S))

    def _hear_all(self, wait_s: float = 0.0) -> None:
        """Raises EngineLostError: every time from the first one on."""
        if self._lost is not None:
            raise self._lost
        try:
            message = self._heard.get(timeout=wait_s) if wait_s else self._heard.get_nowait()
            while True:
                self._hear(message)
                message = self._heard.get_nowait()
        except queue.Empty:
            return

    def _hear(self, message: FromRank | EngineLostError) -> None:
        match message:
            case EngineLostError():
                self._lost = message
                raise message
            case LayersReady():
                self._hear_ready(message)
            case Released():
                self._hear_released(message)
            case Opened():
                self._num_opened += message.number == self._opening
            case Started():
                if (running := self._by_number.get(message.number)) is not None:
                    running.cached_tokens = message.cached_tokens
            case ExportFailed():
                if (running := self._by_number.get(message.number)) is not None:
                    running.failure = running.failure or f"rank {message.rank}: {message.message}"

    def _hear_ready(self, ready: LayersReady) -> None:
        """Ranks copy as many layers at a time as suits each: a layer is there once all have said so."""
        running = self._by_number.get(ready.number)
        if running is None or running.job.request_id not in self._jobs:
            return
        num_tokens = ready.end_token - ready.first_token
        for layer in range(ready.first_layer, ready.end_layer):
            place = (layer, ready.first_token)
            ranks = running.ranks_of.setdefault(place, set())
            ranks.add(ready.rank)
            if ranks != self._exporting:
                continue
            del running.ranks_of[place]
            start = running.offset + piece_offset(
                self._layout, running.job.first_token, ready.first_token, num_tokens, layer
            )
            data = self._arena.view(start, num_tokens * self._layout.bytes_per_token_layer)
            running.num_bytes_ready += len(data)
            running.export(KvChunk(layer, ready.first_token, num_tokens, data))

    def _hear_released(self, released: Released) -> None:
        ranks = self._unreleased.get(released.number)
        if ranks is None:
            # Its lease is over: nothing more will come.
            if (running := self._by_number.get(released.number)) is not None:
                running.failure = running.failure or f"rank {released.rank} let go: its lease is over"
            return
        ranks.discard(released.rank)
        if not ranks:
            del self._unreleased[released.number]
            self._arena.give_back(self._by_number.pop(released.number).offset)

    def _end_of(self, running: _Job) -> PrefillDone | PrefillFailed | None:
        request_id = running.job.request_id
        try:
            has_ended = running.submission is not None and running.submission.poll()
        except Exception as error:  # noqa: BLE001 - whatever an engine of another make raises
            running.failure = running.failure or f"the engine failed the request: {error}"
            has_ended = True
        if running.failure is not None:
            return PrefillFailed(request_id=request_id, message=running.failure)
        if has_ended and running.num_bytes_ready == running.num_bytes:
            return PrefillDone(
                request_id=request_id,
                cached_tokens=min(running.cached_tokens, len(running.job.token_ids)),
            )
        return None
