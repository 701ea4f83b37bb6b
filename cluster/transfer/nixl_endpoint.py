"""What a worker has of NIXL: an agent, built when it is first needed, and what both ends do with it."""

import asyncio
import contextlib
import logging
from collections import OrderedDict, deque
from concurrent.futures import Future

from cluster.config import TransferConfig
from cluster.transfer import HandoffError
from cluster.transfer.nixl import (
    ABANDON_S,
    NixlAgent,
    NixlReadError,
    NixlUnavailableError,
    has_rdma_device,
    installed_package,
)
from cluster.transfer.nixl_offer import OfferError, RemoteMemory, check_offer, offer_of
from cluster.transfer.verify import ChunkPlace
from cluster.wire import headrace_pb2 as pb

MAX_REMOTES = 64
"""Agents whose memory we know how to read; idle ones beyond this are removed, least recently used first."""
READ_TIMEOUT_S = 5.0
SETTLE_S = 1.0
"""How long a hand-off that failed waits for its reads to end before the sender is told that they have not."""
NUM_SLOTS = 2
"""Reads of one hand-off under way at once."""
RETIRED_S = 2 * ABANDON_S
"""Until memory is used again whose reader or writer may not have ended: its reads are cancelled by then."""
LINGER_S = 2.0

logger = logging.getLogger(__name__)


class _Remote:
    """An agent that we read from. Removed from NIXL only while nobody uses it."""

    def __init__(self, metadata: bytes, loaded: Future[None]) -> None:
        self.metadata = metadata
        self.loaded = loaded
        self.num_users = 0
        self.is_lost = False
        """A read from it failed: removed with its last user, so that a later offer connects anew."""


class NixlEndpoint:
    """For one event loop."""

    def __init__(
        self, num_bytes: int, *, read_timeout_s: float = READ_TIMEOUT_S, max_remotes: int = MAX_REMOTES
    ) -> None:
        """`num_bytes` of host memory are registered: hand-offs under way share them."""
        self._num_bytes = num_bytes
        self._read_timeout_s = read_timeout_s
        self._max_remotes = max_remotes
        self._agent: NixlAgent | None = None
        self._building: asyncio.Task[NixlAgent | None] | None = None
        self._remotes: OrderedDict[str, _Remote] = OrderedDict()
        self._outlasting: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def start(self) -> None:
        """Build the agent now. Raises NixlUnavailableError."""
        self._agent = await asyncio.to_thread(NixlAgent, self._num_bytes)

    def agent(self) -> NixlAgent | None:
        """None until it is built, which the first call begins, and where it cannot be."""
        if self._agent is None and self._building is None and not self._is_closed:
            self._building = asyncio.create_task(self._build())
        return self._agent

    async def wait_built(self) -> None:
        if self._building is not None:
            await self._building

    async def close(self) -> None:
        self._is_closed = True
        if self._building is not None:
            await asyncio.gather(self._building, return_exceptions=True)
        if self._agent is not None:
            agent, self._agent = self._agent, None
            await asyncio.to_thread(agent.close)
        if self._outlasting:
            await asyncio.gather(*self._outlasting, return_exceptions=True)

    def lease(self, num_bytes: int) -> "NixlLease | None":
        """A sender's: memory for a hand-off's payload; None where there is none now."""
        agent = self.agent()
        start = None if agent is None else agent.memory.take(num_bytes)
        if agent is None or start is None:
            return None
        return NixlLease(agent, start, num_bytes)

    async def open(self, offer: pb.NixlOffer, payload_bytes: int, max_chunk_bytes: int) -> "NixlReads | None":
        """A receiver's: reads of what a sender offers; None (bytes go inline) where it cannot be read."""
        agent = self.agent()
        if agent is None:
            return None
        try:
            memory = check_offer(offer, agent.version, payload_bytes)
            remote = self._remote_of(agent, memory, offer.metadata)
        except OfferError as error:
            logger.info("memory offered through NIXL not used: %s", error)
            return None
        landing = agent.memory.take(NUM_SLOTS * max_chunk_bytes)
        if landing is None:
            return None
        remote.num_users += 1
        try:
            await asyncio.wrap_future(remote.loaded)
        except BaseException as error:
            agent.memory.give_back(landing)
            remote.is_lost = remote.is_lost or isinstance(error, NixlReadError)
            self._end_use(agent, memory.agent)
            if not isinstance(error, NixlReadError):
                raise
            logger.warning("NIXL does not take %s in: %s", memory.agent, error)
            return None
        return NixlReads(self, agent, memory.agent, offer, landing, max_chunk_bytes)

    @property
    def num_remotes(self) -> int:
        return len(self._remotes)

    @property
    def read_timeout_s(self) -> float:
        return self._read_timeout_s

    async def _build(self) -> NixlAgent | None:
        try:
            self._agent = await asyncio.to_thread(NixlAgent, self._num_bytes)
        except NixlUnavailableError as error:
            logger.warning("hand-offs to and from other hosts go without NIXL: %s", error)
        return self._agent

    def _remote_of(self, agent: NixlAgent, memory: RemoteMemory, metadata: bytes) -> _Remote:
        """Raises OfferError."""
        if memory.agent == agent.name:
            raise OfferError("it is this end's own")
        remote = self._remotes.get(memory.agent)
        if remote is None:
            remote = self._remotes[memory.agent] = _Remote(metadata, agent.add_remote(metadata))
        if remote.is_lost:
            raise OfferError(f"reads from {memory.agent} failed")
        if remote.metadata != metadata:
            raise OfferError(f"{memory.agent} said something else of itself before")
        self._remotes.move_to_end(memory.agent)
        return remote

    def _lose(self, name: str) -> None:
        self._remotes[name].is_lost = True

    def _end_use(self, agent: NixlAgent, name: str) -> None:
        self._remotes[name].num_users -= 1
        idle = [name for name, remote in self._remotes.items() if remote.num_users == 0]
        surplus = idle[: max(0, len(self._remotes) - self._max_remotes)]
        for each in idle:
            if each in surplus or self._remotes[each].is_lost:
                del self._remotes[each]
                agent.remove_remote(each)

    def _outlast(self, reads: "NixlReads") -> None:
        task = asyncio.create_task(reads.finish())
        self._outlasting.add(task)
        task.add_done_callback(self._outlasting.discard)


class NixlLease:
    """A sender's region of the registered memory, filled front to back by one hand-off."""

    def __init__(self, agent: NixlAgent, start: int, num_bytes: int) -> None:
        self._agent = agent
        self._start = start
        self._num_bytes = num_bytes
        self._filled = 0
        agent.begin_serving()

    def offer(self) -> pb.NixlOffer:
        agent = self._agent
        return offer_of(agent.version, agent.metadata, agent.memory.address + self._start, self._num_bytes)

    def append(self, payload: memoryview) -> int:
        """Copy payload in; returns its offset. Raises HandoffError where it does not fit."""
        offset, end = self._filled, self._filled + len(payload)
        if end > self._num_bytes:
            raise HandoffError("size_mismatch", "more payload than the hand-off's header announced")
        self._agent.memory.view[self._start + offset : self._start + end] = payload
        self._filled = end
        self._agent.expect_reads()
        return offset

    def end(self, *, is_settled: bool) -> None:
        """`is_settled`: the receiver answered, and reads no more."""
        self._agent.memory.give_back(self._start, 0.0 if is_settled else RETIRED_S)
        self._agent.end_serving(0.0 if is_settled else LINGER_S)


class NixlReads:
    """One hand-off's reads, in order, at most NUM_SLOTS at once, each into a slot of its own.

    `close` after the hand-off, whatever became of it.
    """

    def __init__(
        self,
        endpoint: NixlEndpoint,
        agent: NixlAgent,
        remote: str,
        offer: pb.NixlOffer,
        landing: int,
        slot_bytes: int,
    ) -> None:
        self._endpoint = endpoint
        self._agent = agent
        self._remote = remote
        self._address = offer.address
        self._num_bytes = offer.num_bytes
        self._landing = landing
        self._slot_bytes = slot_bytes
        self._num_started = 0
        self._waiting: deque[tuple[ChunkPlace, int, int, Future[None]]] = deque()
        """place, its slot's start, bytes, the read"""

    @property
    def is_full(self) -> bool:
        return self.num_waiting == NUM_SLOTS

    @property
    def num_waiting(self) -> int:
        """Chunks whose read was started and that `next` did not give yet."""
        return len(self._waiting)

    def start(self, place: ChunkPlace, offset: int, num_bytes: int) -> None:
        """Raises HandoffError where the range is not all inside what was offered."""
        assert not self.is_full
        assert num_bytes <= self._slot_bytes
        if offset + num_bytes > self._num_bytes:
            raise HandoffError(
                "size_mismatch",
                f"bytes [{offset}, {offset + num_bytes}) of memory whose payload is [0, {self._num_bytes})",
            )
        start = self._landing + self._num_started % NUM_SLOTS * self._slot_bytes
        self._num_started += 1
        read = self._agent.read(self._remote, self._address + offset, start, num_bytes)
        self._waiting.append((place, start, num_bytes, read))

    async def next(self) -> tuple[ChunkPlace, memoryview]:
        """The oldest chunk, its bytes valid until the next `start`. Raises HandoffError, retryable."""
        place, start, num_bytes, read = self._waiting[0]
        try:
            async with asyncio.timeout(self._endpoint.read_timeout_s):
                await asyncio.wrap_future(read)
        except TimeoutError:
            self._endpoint._lose(self._remote)
            raise HandoffError(
                "read_failed", f"no {num_bytes} bytes by NIXL in {self._endpoint.read_timeout_s:g} s"
            ) from None
        except NixlReadError as error:
            self._endpoint._lose(self._remote)
            raise HandoffError("read_failed", f"reading by NIXL: {error}") from error
        self._waiting.popleft()
        return place, self._agent.memory.view[start : start + num_bytes]

    async def settle(self) -> bool:
        """Wait a moment for reads under way; returns whether none is left: the sender's memory is its own."""
        reads = [asyncio.wrap_future(read) for _, _, _, read in self._waiting]
        if reads:
            await asyncio.wait(reads, timeout=SETTLE_S)
            for each in reads:
                each.add_done_callback(lambda done: done.cancelled() or done.exception())
        return self._are_over()

    def close(self) -> None:
        """Give landing memory and remote agent back, once the last read is over."""
        if self._are_over():
            self._end()
        else:
            self._endpoint._outlast(self)

    async def finish(self) -> None:
        for _, _, _, read in self._waiting:
            with contextlib.suppress(NixlReadError):
                await asyncio.wrap_future(read)
        self._end()

    def _are_over(self) -> bool:
        return all(read.done() for _, _, _, read in self._waiting)

    def _end(self) -> None:
        has_failed = any(read.exception() is not None for _, _, _, read in self._waiting)
        if has_failed:
            self._endpoint._lose(self._remote)
        # A cancelled read's last bytes may still come until its connection is gone.
        self._agent.memory.give_back(self._landing, RETIRED_S if has_failed else 0.0)
        self._endpoint._end_use(self._agent, self._remote)


def endpoint_of(config: TransferConfig) -> NixlEndpoint | None:
    """None: hand-offs go without NIXL. `start` is for `transport = "nixl"`, which must have it."""
    if config.transport == "grpc":
        return None
    if config.transport == "auto" and not (installed_package() and has_rdma_device()):
        logger.debug("no NIXL or no RDMA device: hand-offs to other hosts go as gRPC bytes")
        return None
    return NixlEndpoint(config.nixl_mb * 2**20)
