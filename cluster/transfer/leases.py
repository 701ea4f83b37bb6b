"""Memory that one hand-off's payload goes through instead of the stream: the sender's two kinds of it."""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from cluster.messages import WorkerAddress
from cluster.transfer.nixl_endpoint import NixlEndpoint, NixlLease
from cluster.transfer.shared_memory import SegmentPool, SharedSegment
from cluster.wire import headrace_pb2 as pb

SHARED_MEMORY = "shared_memory"
NIXL = "nixl"
PAUSE_S = 60.0
"""How long a target is not offered NIXL after a hand-off by it failed."""
MAX_PAUSED = 256
FAULTS = frozenset({"read_failed", "checksum_mismatch", "timeout"})
"""Codes of failures that another transport may not have."""

logger = logging.getLogger(__name__)


class PayloadLease(Protocol):
    """One hand-off's memory: offered with the header, filled chunk by chunk, ended once."""

    transport: str

    def add_offer(self, header: pb.HandoffHeader) -> None: ...

    def is_taken_up(self, accepted: pb.HandoffAccepted) -> bool: ...

    def add_payload(self, message: pb.KvChunk, payload: memoryview) -> None:
        """Copy payload in, and say in the message where. Raises HandoffError where it does not fit."""
        ...

    def end(self, *, is_settled: bool) -> None:
        """`is_settled`: the receiver answered, and will not look at the memory again."""
        ...

    def failed(self, code: str) -> None:
        """The hand-off went this way, and failed."""
        ...


class SharedLease:
    transport = SHARED_MEMORY

    def __init__(self, pool: SegmentPool, segment: SharedSegment) -> None:
        self._pool = pool
        self._segment = segment

    def add_offer(self, header: pb.HandoffHeader) -> None:
        header.shared_memory.CopyFrom(self._segment.offer())

    def is_taken_up(self, accepted: pb.HandoffAccepted) -> bool:
        return accepted.use_shared_memory

    def add_payload(self, message: pb.KvChunk, payload: memoryview) -> None:
        message.shared_memory_offset = self._segment.append(payload)

    def end(self, *, is_settled: bool) -> None:
        if is_settled:
            self._pool.give_back(self._segment)
        else:
            self._segment.close()

    def failed(self, code: str) -> None:
        pass


class RegisteredLease:
    """Memory registered with NIXL."""

    transport = NIXL

    def __init__(self, lease: NixlLease, pauses: "Pauses", address: str) -> None:
        self._lease = lease
        self._pauses = pauses
        self._address = address

    def add_offer(self, header: pb.HandoffHeader) -> None:
        header.nixl.CopyFrom(self._lease.offer())

    def is_taken_up(self, accepted: pb.HandoffAccepted) -> bool:
        return accepted.use_nixl

    def add_payload(self, message: pb.KvChunk, payload: memoryview) -> None:
        message.nixl_offset = self._lease.append(payload)

    def end(self, *, is_settled: bool) -> None:
        self._lease.end(is_settled=is_settled)

    def failed(self, code: str) -> None:
        if code in FAULTS:
            logger.warning(
                "a hand-off by NIXL failed (%s): none to %s by it for a while", code, self._address
            )
            self._pauses.add(self._address)


class Pauses:
    """Targets that are not offered NIXL for now; a bounded memory of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until_s: OrderedDict[str, float] = OrderedDict()

    def add(self, address: str) -> None:
        self._until_s[address] = self._clock() + PAUSE_S
        self._until_s.move_to_end(address)
        while len(self._until_s) > MAX_PAUSED:
            self._until_s.popitem(last=False)

    def has(self, address: str) -> bool:
        return self._until_s.get(address, 0.0) > self._clock()


class Leases:
    """Chooses: shared memory within a host where that is preferred, else NIXL. For one event loop."""

    def __init__(self, own_host_id: str, prefers_shared_memory: bool, nixl: NixlEndpoint | None) -> None:
        self._own_host_id = own_host_id
        self._prefers_shared_memory = prefers_shared_memory
        self._nixl = nixl
        self._segments = SegmentPool()
        self._pauses = Pauses()

    def take(self, target: WorkerAddress, payload_bytes: int) -> PayloadLease | None:
        """None: bytes go inline."""
        if self._prefers_shared_memory and target.host_id == self._own_host_id:
            try:
                return SharedLease(self._segments, self._segments.take(payload_bytes))
            except OSError as error:
                logger.warning("no shared memory for %d bytes, sending them: %s", payload_bytes, error)
                return None
        if self._nixl is None or self._pauses.has(target.grpc_address):
            return None
        lease = self._nixl.lease(payload_bytes)
        return None if lease is None else RegisteredLease(lease, self._pauses, target.grpc_address)

    def close(self) -> None:
        """The shared memory's; the NIXL endpoint is its owner's to close."""
        self._segments.close()
