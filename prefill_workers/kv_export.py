"""Carries KV from the engine's thread to the hand-off's event loop, while the forward pass runs.

Nothing is copied but what must be split, and the engine's thread never waits: what is queued here are
views of blocks that the job holds in any case, and never more than the job's own KV.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator

from cluster.kv_layout import KvLayout
from cluster.transfer import KvChunk


class ExportError(Exception):
    """The engine exported other than the KV it was asked for. Handled by the worker: the job fails."""


def split_chunk(chunk: KvChunk, bytes_per_token_layer: int, max_bytes: int) -> Iterator[KvChunk]:
    """The chunk in runs of tokens of at most `max_bytes`, or of one token where that is larger.

    A split copies: K and V of a run of tokens lie apart in the whole chunk.
    """
    step = max(1, max_bytes // bytes_per_token_layer)
    if chunk.num_tokens <= step:
        yield chunk
        return
    half = chunk.num_tokens * bytes_per_token_layer // 2
    keys, values = chunk.data[:half], chunk.data[half:]
    half_token = bytes_per_token_layer // 2
    for start in range(0, chunk.num_tokens, step):
        num_tokens = min(step, chunk.num_tokens - start)
        part = slice(start * half_token, (start + num_tokens) * half_token)
        data = memoryview(b"".join((keys[part], values[part])))
        yield KvChunk(chunk.layer, chunk.first_token + start, num_tokens, data)


class KvExport:
    """One job's KV on its way out: tokens [first_token, end_token) of every layer.

    Made on the event loop that reads `chunks`; `put` and `forward_ended` come from the engine's thread,
    `fail` from any. What is wrong with an export is raised by `chunks` alone: the forward pass that
    exports it serves other jobs too.
    """

    def __init__(self, layout: KvLayout, first_token: int, end_token: int, max_chunk_bytes: int) -> None:
        self.total_bytes = (end_token - first_token) * layout.bytes_per_token
        self._layout = layout
        self._max_chunk_bytes = max_chunk_bytes
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._queued: deque[KvChunk] = deque()
        self._arrived = asyncio.Event()
        self._failure: BaseException | None = None
        self._bytes_exported = 0
        self._bytes_sent = 0
        self._bytes_sent_before_forward_end: int | None = None

    @property
    def bytes_sent_before_forward_end(self) -> int:
        """Of the bytes taken by the transport so far, those it took while the forward pass ran."""
        before = self._bytes_sent_before_forward_end
        return self._bytes_sent if before is None else before

    @property
    def num_tokens_missing(self) -> int:
        """Tokens of the hand-off not exported yet; a token counts when all its layers are out."""
        return -(-(self.total_bytes - self._bytes_exported) // self._layout.bytes_per_token)

    def put(self, chunk: KvChunk) -> None:
        """The engine's `ExportChunk`."""
        data = chunk.data.cast("B")
        expected = chunk.num_tokens * self._layout.bytes_per_token_layer
        if len(data) != expected:
            self.fail(ExportError(f"the engine exported {len(data)} bytes where {expected} belong"))
            return
        if self._bytes_exported + len(data) > self.total_bytes:
            self.fail(ExportError(f"the engine exported more than the {self.total_bytes} bytes asked for"))
            return
        with self._lock:
            self._bytes_exported += len(data)
            was_empty = not self._queued
            self._queued.append(KvChunk(chunk.layer, chunk.first_token, chunk.num_tokens, data))
        if was_empty:
            self._wake()

    def forward_ended(self) -> None:
        """All of the job's KV was exported; anything missing fails the export, as nothing will come."""
        self._bytes_sent_before_forward_end = self._bytes_sent
        if self._bytes_exported != self.total_bytes:
            self.fail(
                ExportError(
                    f"the engine exported {self._bytes_exported} of {self.total_bytes} bytes asked for"
                )
            )

    def fail(self, error: BaseException) -> None:
        """Make `chunks` raise, now; the first failure is the one raised."""
        with self._lock:
            self._failure = self._failure or error
            self._queued.clear()
        self._wake()

    async def chunks(self) -> AsyncIterator[KvChunk]:
        """In order of computation, each at most `max_chunk_bytes`; ends with the last byte asked for."""
        while self._bytes_sent < self.total_bytes:
            for part in split_chunk(
                await self._next(), self._layout.bytes_per_token_layer, self._max_chunk_bytes
            ):
                yield part
                self._bytes_sent += len(part.data)

    async def _next(self) -> KvChunk:
        while True:
            with self._lock:
                if self._failure is not None:
                    raise self._failure
                if self._queued:
                    return self._queued.popleft()
                self._arrived.clear()
            await self._arrived.wait()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody reads
            self._loop.call_soon_threadsafe(self._arrived.set)
