"""Computes prompts' KV in PyTorch: batched, chunked by token budget, exported layer by layer."""

from collections.abc import Iterator

import msgspec
import numpy as np
import torch

from cluster.block_hash import chain_salt
from cluster.block_pool import BlockPool
from cluster.ids import ChainHash, RequestId
from cluster.kv_layout import KvDtype, KvLayout
from cluster.transfer import KvChunk
from megakernel.model.row_batch import IntArray, RowBatch, RowSpan, chain_parents
from megakernel.model.torch_llama import TorchLlama
from megakernel.model.weights import Weights
from prefill_workers.engine import ExportChunk, PrefillDone, PrefillJob


class _Running(msgspec.Struct, eq=False):
    """An admitted job and how far it is. KV of tokens [0, num_computed) is in its blocks."""

    job: PrefillJob
    export: ExportChunk
    salt: ChainHash
    block_ids: list[int]
    slots: IntArray
    """[tokens] KV slot of each position."""
    num_cached: int
    num_computed: int
    has_exported_cached: bool = False

    @property
    def num_remaining(self) -> int:
        return len(self.job.token_ids) - self.num_computed


class _Chunk(msgspec.Struct, frozen=True, eq=False):
    """Tokens [start, end) of one job, computed in this step."""

    running: _Running
    start: int
    end: int


class TorchPrefillEngine:
    """`PrefillEngine` over one TorchLlama without its head.

    Blocks are the pool's: a running job holds a reference on each of its own until `release`; only the
    job that allocated a block writes it, and only before it is published.
    It computes in float32, whatever KV is kept as. `num_threads` sets the process's intra-op threads.
    """

    def __init__(
        self,
        weights: Weights,
        fingerprint: str,
        num_blocks: int,
        block_size_tokens: int,
        max_tokens_per_step: int,
        num_threads: int,
        device: str = "cpu",
        kv_dtype: KvDtype = "float32",
    ) -> None:
        torch.set_num_threads(num_threads)
        shape = weights.shape
        self._model = TorchLlama(weights, device, has_head=False, kv_dtype=kv_dtype)
        self._layout = KvLayout(
            model_fingerprint=fingerprint,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=kv_dtype,
            block_size_tokens=block_size_tokens,
        )
        self._kv = self._model.new_kv(num_blocks * block_size_tokens)
        self._pool = BlockPool(num_blocks, block_size_tokens)
        self._max_tokens_per_step = max_tokens_per_step
        self._running: dict[RequestId, _Running] = {}

    @property
    def layout(self) -> KvLayout:
        return self._layout

    @property
    def free_kv_tokens(self) -> int:
        return self._pool.num_free_blocks * self._layout.block_size_tokens

    def has_work(self) -> bool:
        return any(_is_unfinished(running) for running in self._running.values())

    def can_admit(self, job: PrefillJob) -> bool:
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
        cached = self._match(job)
        size = self._layout.block_size_tokens
        try:
            fresh = self._pool.allocate(self._layout.num_blocks_for(len(job.token_ids)) - len(cached))
        except BaseException:
            self._pool.release(cached)
            raise
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
        worked_on = [running for running in self._running.values() if _is_unfinished(running)]
        for running in worked_on:
            self._export_cached(running)
        chunks = _schedule(worked_on, self._max_tokens_per_step)
        if chunks:
            self._forward(chunks)
        finished = [running for running in worked_on if running.num_remaining == 0]
        for running in finished:
            self._pool.publish(running.job.token_ids, running.block_ids, running.salt)
        # Nothing here announces this cache to the placement index, so the pool need not remember changes.
        self._pool.drain_changes()
        return [
            PrefillDone(request_id=running.job.request_id, cached_tokens=running.num_cached)
            for running in finished
        ]

    def release(self, request_id: RequestId) -> None:
        """Unknown and already released requests are ignored: a cancel may cross the end of its job."""
        running = self._running.pop(request_id, None)
        if running is not None:
            self._pool.release(running.block_ids)

    def _forward(self, chunks: list[_Chunk]) -> None:
        def export(layer: int) -> None:
            for chunk in chunks:
                start = max(chunk.start, chunk.running.job.first_token)
                if start < chunk.end:
                    self._export(chunk.running, layer, start, chunk.end)

        no_rows = np.empty(0, dtype=np.int64)
        self._model.forward(self._kv, _row_batch(chunks), no_rows, on_kv_written=export)
        for chunk in chunks:
            chunk.running.num_computed = chunk.end

    def _export_cached(self, running: _Running) -> None:
        """The asked-for part of the cached prefix, in pieces as large as a step's chunk at most."""
        if running.has_exported_cached:
            return
        running.has_exported_cached = True
        for start, end in _pieces(running.job.first_token, running.num_cached, self._max_tokens_per_step):
            for layer in range(self._layout.num_layers):
                self._export(running, layer, start, end)

    def _export(self, running: _Running, layer: int, start: int, end: int) -> None:
        data = self._kv.read_wire(layer, running.slots[start:end])
        running.export(KvChunk(layer=layer, first_token=start, num_tokens=end - start, data=data))

    def _match(self, job: PrefillJob) -> list[int]:
        """Cached full blocks of the job, with a reference each; a partly matching tail is let go."""
        match = self._pool.match_prefix(job.token_ids, self._salt(job), len(job.token_ids))
        if match.tail_block is not None:
            self._pool.release([match.tail_block])
        return list(match.block_ids)

    def _salt(self, job: PrefillJob) -> ChainHash:
        return chain_salt(self._layout.fingerprint, job.tenant)


def _is_unfinished(running: _Running) -> bool:
    """A job with nothing to compute still has its one step: to export, and to be reported done."""
    return running.num_remaining > 0 or not running.has_exported_cached


def _schedule(oldest_first: list[_Running], max_tokens: int) -> list[_Chunk]:
    """Chunks that fill the token budget in order; at most the last job is cut short."""
    chunks = []
    for running in oldest_first:
        num_tokens = min(running.num_remaining, max_tokens)
        if num_tokens:
            chunks.append(_Chunk(running, running.num_computed, running.num_computed + num_tokens))
            max_tokens -= num_tokens
    return chunks


def _pieces(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    for piece in range(start, end, size):
        yield piece, min(piece + size, end)


def _row_batch(chunks: list[_Chunk]) -> RowBatch:
    spans, parents, num_rows = [], [], 0
    for chunk in chunks:
        count = chunk.end - chunk.start
        spans.append(RowSpan(num_rows, num_rows + count, chunk.running.slots[: chunk.start]))
        parents.append(chain_parents(num_rows, count))
        num_rows += count
    return RowBatch(
        token_ids=np.concatenate(
            [np.array(c.running.job.token_ids[c.start : c.end], dtype=np.int64) for c in chunks]
        ),
        positions=np.concatenate([np.arange(c.start, c.end, dtype=np.int64) for c in chunks]),
        slots=np.concatenate([c.running.slots[c.start : c.end] for c in chunks]),
        parents=np.concatenate(parents),
        spans=tuple(spans),
    )
