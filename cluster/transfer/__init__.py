"""Hands KV from a prefill worker to a decode worker: the protocol and what both ends share.

`KvTransport` is the sender's seam (gRPC bytes, memory shared within a host, or NIXL between hosts);
`HandoffSink` is the receiver's: where accepted bytes go. Nothing is freed on the sending side
before `send` returns or raises, and nothing is readable on the receiving side before the
whole hand-off's checksum held.
"""

from collections.abc import AsyncIterator
from typing import Final, Protocol

import msgspec

from cluster.ids import Epoch, HandoffId
from cluster.messages import WorkerAddress

HANDOFF_CODE_KEY: Final = "handoff-code"
"""Trailing metadata of a failed `Prefill.Run`: the HandoffError's code."""

MAX_CHUNK_BYTES: Final = 3 * 1024 * 1024 + 512 * 1024
"""A chunk and its framing fit in gRPC's default 4 MiB message."""

_FINAL_CODES: Final = frozenset({"layout_mismatch", "already_complete", "cancelled"})


class HandoffHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a hand-off is, before its first byte: KV of tokens [first_token, first_token + num_tokens)."""

    handoff_id: HandoffId
    epoch: Epoch
    """Of the decode worker incarnation that reserved the blocks."""
    layout_fingerprint: str
    first_token: int
    num_tokens: int
    total_bytes: int
    """Payload bytes all chunks will add up to: num_tokens * layout.bytes_per_token."""


class KvChunk(msgspec.Struct, frozen=True):
    """One layer of tokens [first_token, first_token + num_tokens): K then V, token-major, C order."""

    layer: int
    first_token: int
    num_tokens: int
    data: memoryview


class HandoffReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """The receiver's acknowledgement: KV is committed there, the sender may free."""

    transport: str
    """`grpc`, `shared_memory` or `nixl`: which one carried it."""
    bytes_sent: int


class HandoffError(Exception):
    """A hand-off did not complete. The receiver holds none of it; the sender may free.

    Handled by the prefill worker, which reports it to the router, which retries.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        """One of: layout_mismatch, stale_epoch, not_found, already_complete, checksum_mismatch, out_of_order,
        size_mismatch, read_failed, timeout, cancelled, overloaded, unreachable, internal."""
        self.message = message

    @property
    def is_retryable(self) -> bool:
        """Whether a new hand-off of the same KV may succeed."""
        return is_retryable_code(self.code)


def is_retryable_code(code: str) -> bool:
    """The same, of a code that came over the wire (HANDOFF_CODE_KEY)."""
    return code not in _FINAL_CODES


class KvTransport(Protocol):
    """Sends hand-offs. One instance a prefill worker, used by many hand-offs at once."""

    async def send(
        self, target: WorkerAddress, header: HandoffHeader, chunks: AsyncIterator[KvChunk]
    ) -> HandoffReceipt:
        """Send all chunks and wait for the acknowledgement.

        `chunks` may be produced while the forward pass runs: at most MAX_CHUNK_BYTES each, every
        layer's tokens ascending without a gap, layers in any order. A chunk's memory must stay valid
        until the next one is asked for. Raises HandoffError, or what `chunks` raised; cancelling the
        task cancels the hand-off at the receiver too.
        """
        ...

    async def close(self) -> None: ...


class HandoffSink(Protocol):
    """Where a receiver puts one hand-off's KV: blocks that nobody else reads until `commit`."""

    def write(self, chunk: KvChunk) -> None:
        """Copy a chunk into the reserved blocks. Called in order, from one thread at a time; its memory
        is the receiver's again on return."""
        ...

    def commit(self, valid_tokens: int) -> None:
        """The whole hand-off arrived and its checksum held."""
        ...

    def abort(self, error: HandoffError) -> None:
        """It did not; nothing written may be read. Called at most once, from any thread, and never after
        `commit`; no write follows, so the blocks may be reused."""
        ...
