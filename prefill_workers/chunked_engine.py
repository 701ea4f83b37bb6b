"""What every engine of our own shares: blocks, prefix cache, chunks by token budget, exports.

Who may touch a running job's KV blocks:

    tokens                       read by                 written by
    [0, num_cached)              any job that shares it  nobody: published before
    [num_cached, num_computed)   its job                 nobody
    [num_computed, end)          nobody                  its job, in a step

A job holds a reference on each of its blocks from `admit` to `release`. What it computed is published,
and so may be shared, once all of it is there.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from cluster.block_changes import BlockChanges
from cluster.block_hash import chain_salt
from cluster.block_pool import BlockPool
from cluster.ids import ChainHash, RequestId
from cluster.kv_layout import KvLayout
from cluster.transfer import KvChunk
from prefill_workers.engine import ExportChunk, Held, PrefillDone, PrefillJob

SlotArray = npt.NDArray[np.int64]


class Chunk(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Tokens [start, start + len(token_ids)) of one prompt, computed in one step after those before them."""

    token_ids: Sequence[int]
    start: int
    slots: SlotArray
    """[end] KV slot of each position of the prompt up to the chunk's end."""
    block_ids: Sequence[int]
    """The block table that `slots` follow; it covers the chunk."""

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


OnLayer = Callable[[int], None]
"""Called with a layer's number, ascending from 0, when the KV of all of a step's chunks can be read there."""


class KvCompute(Protocol):
    """The seam between the bookkeeping here and what computes: one KV pool, one step at a time."""

    @property
    def layout(self) -> KvLayout: ...

    def compute(self, chunks: Sequence[Chunk], on_layer: OnLayer) -> None:
        """KV of all chunks goes to their slots. `on_layer` may be called in between or at the end."""
        ...

    def read_layer(self, layer: int, slots: SlotArray) -> memoryview:
        """KV of those slots in wire order, in memory of its own."""
        ...


class _Running(msgspec.Struct, eq=False):
    """An admitted job and how far it is. KV of tokens [0, num_computed) is in its blocks."""

    job: PrefillJob
    export: ExportChunk
    salt: ChainHash
    block_ids: list[int]
    slots: SlotArray
    """[tokens] KV slot of each position."""
    num_cached: int
    num_computed: int
    has_exported_cached: bool = False

    @property
    def num_remaining(self) -> int:
        return len(self.job.token_ids) - self.num_computed

    @property
    def is_unfinished(self) -> bool:
        """A job with nothing to compute still has its one step: to export, and to be reported done."""
        return self.num_remaining > 0 or not self.has_exported_cached


class ChunkedPrefillEngine:
    """`PrefillEngine` over something that computes chunks."""

    def __init__(self, kv: KvCompute, num_blocks: int, max_tokens_per_step: int) -> None:
        self._kv = kv
        self._layout = kv.layout
        self._pool = BlockPool(num_blocks, kv.layout.block_size_tokens)
        self._max_tokens_per_step = max_tokens_per_step
        self._pool_lock = threading.Lock()
        """Others ask what is cached."""
        self._running: dict[RequestId, _Running] = {}

    @property
    def layout(self) -> KvLayout:
        return self._layout

    @property
    def free_kv_tokens(self) -> int:
        return self._pool.num_free_blocks * self._layout.block_size_tokens

    @property
    def held(self) -> Held:
        return Held(num_jobs=len(self._running))

    @property
    def total_staging_bytes(self) -> int:
        return 0

    @property
    def index_block_tokens(self) -> int:
        return self._layout.block_size_tokens

    def drain_changes(self) -> BlockChanges:
        with self._pool_lock:
            return self._pool.drain_changes()

    def all_hashes(self) -> list[ChainHash]:
        with self._pool_lock:
            return self._pool.all_hashes()

    def has_work(self) -> bool:
        return any(running.is_unfinished for running in self._running.values())

    def can_admit(self, job: PrefillJob) -> bool:
        with self._pool_lock:
            cached = self._match(job)
            missing = self._layout.num_blocks_for(len(job.token_ids)) - len(cached)
            can_hold = missing <= self._pool.num_free_blocks
            self._pool.release(cached)
        return can_hold

    def admit(self, job: PrefillJob, export: ExportChunk) -> None:
        """Raises ValueError for a request already admitted, OutOfBlocksError where `can_admit` is false."""
        if job.request_id in self._running:
            raise ValueError(f"request {job.request_id} is admitted already")
        if not 0 <= job.first_token <= len(job.token_ids):
            raise ValueError(f"first_token {job.first_token} is outside [0, {len(job.token_ids)}]")
        cached, fresh = self._hold(job)
        size = self._layout.block_size_tokens
        block_ids = cached + fresh
        slots = (np.array(block_ids, dtype=np.int64)[:, None] * size + np.arange(size)).reshape(-1)
        self._running[job.request_id] = _Running(
            job=job,
            export=export,
            salt=self._salt(job),
            block_ids=block_ids,
            slots=slots[: len(job.token_ids)],
            num_cached=len(cached) * size,
            num_computed=len(cached) * size,
        )

    def step(self) -> list[PrefillDone]:
        worked_on = [running for running in self._running.values() if running.is_unfinished]
        for running in worked_on:
            self._export_cached(running)
        scheduled = list(_schedule(worked_on, self._max_tokens_per_step))
        if scheduled:
            self._compute(scheduled)
        finished = [running for running in worked_on if running.num_remaining == 0]
        with self._pool_lock:
            for running in finished:
                self._pool.publish(running.job.token_ids, running.block_ids, running.salt)
        return [
            PrefillDone(request_id=running.job.request_id, cached_tokens=running.num_cached)
            for running in finished
        ]

    def release(self, request_id: RequestId) -> None:
        """Unknown and already released requests are ignored: a cancel may cross the end of its job."""
        running = self._running.pop(request_id, None)
        if running is not None:
            with self._pool_lock:
                self._pool.release(running.block_ids)

    def close(self) -> None:
        """There is nothing beside it."""

    def _compute(self, scheduled: list[tuple[_Running, Chunk]]) -> None:
        def export(layer: int) -> None:
            for running, chunk in scheduled:
                start = max(chunk.start, running.job.first_token)
                if start < chunk.end:
                    self._export(running, layer, start, chunk.end)

        self._kv.compute([chunk for _, chunk in scheduled], export)
        for running, chunk in scheduled:
            running.num_computed = chunk.end

    def _export_cached(self, running: _Running) -> None:
        """The asked-for part of the cached prefix, in pieces as large as a step's chunk at most."""
        if running.has_exported_cached:
            return
        running.has_exported_cached = True
        for start, end in _pieces(running.job.first_token, running.num_cached, self._max_tokens_per_step):
            for layer in range(self._layout.num_layers):
                self._export(running, layer, start, end)

    def _export(self, running: _Running, layer: int, start: int, end: int) -> None:
        data = self._kv.read_layer(layer, running.slots[start:end])
        running.export(KvChunk(layer=layer, first_token=start, num_tokens=end - start, data=data))

    def _hold(self, job: PrefillJob) -> tuple[list[int], list[int]]:
        """Blocks for the whole job, those that are cached and those to compute. Raises OutOfBlocksError."""
        with self._pool_lock:
            cached = self._match(job)
            try:
                fresh = self._pool.allocate(self._layout.num_blocks_for(len(job.token_ids)) - len(cached))
            except BaseException:
                self._pool.release(cached)
                raise
        return cached, fresh

    def _match(self, job: PrefillJob) -> list[int]:
        """Cached full blocks of the job, with a reference each, under the lock; a partly matching tail is let
        go."""
        match = self._pool.match_prefix(job.token_ids, self._salt(job), len(job.token_ids))
        if match.tail_block is not None:
            self._pool.release([match.tail_block])
        return list(match.block_ids)

    def _salt(self, job: PrefillJob) -> ChainHash:
        return chain_salt(self._layout.fingerprint, job.tenant)


def _schedule(oldest_first: list[_Running], max_tokens: int) -> Iterator[tuple[_Running, Chunk]]:
    """Chunks that fill the token budget in order; at most the last job is cut short."""
    for running in oldest_first:
        start = running.num_computed
        end = start + min(running.num_remaining, max_tokens)
        if start < end:
            max_tokens -= end - start
            yield (
                running,
                Chunk(
                    token_ids=running.job.token_ids[start:end],
                    start=start,
                    slots=running.slots[:end],
                    block_ids=running.block_ids,
                ),
            )


def _pieces(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    for piece in range(start, end, size):
        yield piece, min(piece + size, end)
