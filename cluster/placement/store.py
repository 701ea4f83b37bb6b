"""The seam between placement and Redis."""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from cluster.ids import ChainHash, Epoch, SessionId, WorkerId
from cluster.messages import Role, SessionRecord, WorkerAddress, WorkerRecord, WorkerStatus


class PlacementUnavailableError(Exception):
    """The store did not answer in time. The router then places by load alone; workers keep trying."""


class LeaseLostError(Exception):
    """Another incarnation holds the lease, or it expired: the worker must register again."""


class WorkerIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker registers, before it has an epoch."""

    worker_id: WorkerId
    role: Role
    model: str
    grpc_address: str
    host_id: str
    protocol_version: int
    layout_fingerprint: str
    block_size_tokens: int


class IndexHits(msgspec.Struct, frozen=True, kw_only=True):
    """What the index knows of one prompt."""

    cached_blocks: dict[WorkerId, int]
    """Leading full blocks of the prompt that a live worker is said to hold."""
    session: SessionRecord | None


class PlacementStore(Protocol):
    """Worker leases, chain hash -> holders, sessions; for one model. Metadata only, everything expires.

    Every call raises PlacementUnavailableError where the store does not answer.
    """

    async def register(
        self, identity: WorkerIdentity, status: WorkerStatus, ttl_ms: int, *, floor: Epoch
    ) -> WorkerAddress:
        """Take the worker's lease under a new epoch: at least `floor`, and higher than any the store
        remembers of this worker id.

        `floor` keeps epochs rising where the store forgot them (`membership.epoch_now`).
        """
        ...

    async def renew(self, address: WorkerAddress, status: WorkerStatus, ttl_ms: int) -> None:
        """Extend the lease and publish status. Raises LeaseLostError."""
        ...

    async def release(self, address: WorkerAddress) -> None:
        """Give the lease back at once; a no-op where another epoch holds it."""
        ...

    async def workers(self) -> list[WorkerRecord]:
        """All workers whose lease is alive."""
        ...

    async def publish_blocks(
        self, worker_id: WorkerId, epoch: Epoch, stored: Sequence[ChainHash], removed: Sequence[ChainHash]
    ) -> None:
        """Record what a worker's prefix cache now holds and what it dropped; a hash in both is dropped.

        Raises LeaseLostError: then nothing counts that this epoch published.
        """
        ...

    async def lookup(self, hashes: Sequence[ChainHash], session_id: SessionId | None) -> IndexHits:
        """Holders of a prompt's chain and the session's record, in one round trip.

        `hashes` are the prompt's full blocks, first to last. Only so many are asked about as one call
        may cost (`redis_store.MAX_LOOKUP_BLOCKS`): a longer chain's holders count as holding that many.
        """
        ...

    async def put_session(self, session_id: SessionId, record: SessionRecord, ttl_ms: int) -> None:
        """Record where a session's KV is; the last writer wins. Ids of different tenants must differ."""
        ...

    async def close(self) -> None: ...
