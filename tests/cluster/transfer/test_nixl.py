"""Hand-offs through NIXL itself, within a process and between two; what fails goes as bytes."""

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.config import TransferConfig
from cluster.transfer import HandoffError, KvChunk, nixl_endpoint
from cluster.transfer.grpc_transport import GrpcKvTransport
from cluster.transfer.host_id import host_id
from cluster.transfer.leases import MAX_PAUSED, PAUSE_S, Pauses
from cluster.transfer.nixl import NixlAgent, NixlUnavailableError
from cluster.transfer.nixl_endpoint import NixlEndpoint, endpoint_of
from cluster.transfer.nixl_memory import RegisteredMemory
from cluster.transfer.nixl_offer import offer_of
from cluster.wire import headrace_pb2 as pb
from tests.cluster.transfer.frames import good_frames, header_frame, push
from tests.cluster.transfer.loopback import (
    LAYOUT,
    ReceiverAtWork,
    chunks_of,
    needs_nixl,
    open_fds,
    receiver_at_work,
    streamed,
)
from tests.cluster.transfer.loopback import nixl_endpoint as started
from tests.cluster.transfer.test_grpc_transport import Gate
from tests.cluster.transfer.test_nixl_offer import metadata_of
from tests.cluster.transfer.test_processes import sender, word_of

FIRST, COUNT = 5, 23


@dataclass
class Pair:
    work: ReceiverAtWork
    transport: GrpcKvTransport
    sending: NixlEndpoint
    receiving: NixlEndpoint

    async def send(self, first: int = FIRST, count: int = COUNT, step: int = 4) -> str:
        header, sink = self.work.expect(first, count)
        receipt = await self.transport.send(
            self.work.target(), header, streamed(chunks_of(first, count, step))
        )
        assert receipt.bytes_sent == count * LAYOUT.bytes_per_token
        sink.assert_holds(first, count)
        return receipt.transport

    def assert_nothing_taken(self) -> None:
        assert [agent_of(end).memory.num_taken for end in (self.sending, self.receiving)] == [0, 0]


def agent_of(endpoint: NixlEndpoint) -> NixlAgent:
    agent = endpoint.agent()
    assert agent is not None
    return agent


def transport_with(nixl: NixlEndpoint) -> GrpcKvTransport:
    return GrpcKvTransport(own_host_id=host_id(), timeout_s=8.0, prefer_shared_memory=False, nixl=nixl)


@asynccontextmanager
async def pair(
    sending_bytes: int = 2**22, receiving_bytes: int = 2**22, read_timeout_s: float = 5.0
) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        sending = await stack.enter_async_context(started(sending_bytes))
        receiving = await stack.enter_async_context(started(receiving_bytes, read_timeout_s=read_timeout_s))
        work = await stack.enter_async_context(receiver_at_work(nixl=receiving))
        transport = transport_with(sending)
        stack.push_async_callback(transport.close)
        yield Pair(work, transport, sending, receiving)


async def becomes(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - it looks into another thread
            await asyncio.sleep(0.01)


@needs_nixl
async def test_hand_offs_arrive_byte_for_byte() -> None:
    rng = random.Random(0)
    async with pair() as ends:
        for _ in range(25):
            count = rng.randint(1, 80)
            assert await ends.send(rng.randint(0, 40), count, rng.randint(1, count)) == "nixl"
        ends.assert_nothing_taken()
        assert ends.receiving.num_remotes == 1


@needs_nixl
async def test_many_at_once_keep_apart_and_leave_nothing() -> None:
    async with pair() as ends:  # what the libraries open once and keep
        await ends.send()
    before = open_fds()
    async with pair() as ends:
        assert set(await asyncio.gather(*(ends.send(first, COUNT, 3) for first in range(40)))) == {"nixl"}
        assert ends.work.receiver.num_live == 0
        ends.assert_nothing_taken()
    assert open_fds() <= before


@needs_nixl
async def test_another_process_hands_off_byte_for_byte() -> None:
    async with started() as receiving, receiver_at_work(nixl=receiving) as work:
        header, sink = work.expect(0, 64)
        async with sender(work, header, "nixl") as process:
            assert await word_of(process) == "nixl"
            assert await process.wait() == 0
        sink.assert_holds(0, 64)
        assert agent_of(receiving).memory.num_taken == 0


@needs_nixl
async def test_a_sender_killed_mid_way_frees_the_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")  # a dead peer shows at once
    async with started() as receiving, receiver_at_work(nixl=receiving) as work:
        header, sink = work.expect(0, 64)
        async with sender(work, header, "nixl,hang") as process:
            assert await word_of(process) == "half"
            process.kill()
            await sink.wait_ended()
        assert sink.aborted is not None
        assert sink.aborted.code in ("unreachable", "read_failed"), "whichever connection broke first"
        await becomes(lambda: not receiving._outlasting)
        assert work.receiver.num_live == 0


@needs_nixl
async def test_a_read_from_a_sender_that_stands_still_fails_and_its_memory_is_kept_until_the_read_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")  # where a sender must take part in what is read
    async with started(read_timeout_s=0.3) as receiving, receiver_at_work(nixl=receiving) as work:
        header, sink = work.expect(0, 64)
        async with sender(work, header, "nixl,hang") as process:
            sink.before_write = lambda _chunk: process.send_signal(signal.SIGSTOP)
            await sink.wait_ended()
            assert sink.aborted is not None
            assert sink.aborted.code == "read_failed"
            await asyncio.sleep(1.5)
            assert agent_of(receiving).memory.num_taken == 1, "the read may still write there"
            assert receiving.num_remotes == 1
            process.kill()
            await becomes(lambda: receiving.num_remotes == 0)
            assert agent_of(receiving).memory.num_taken == 1, "retired: not used again for a while"


@needs_nixl
async def test_a_receiver_that_dies_leaves_the_senders_memory_retired() -> None:
    async with pair() as ends:
        header, sink = ends.work.expect(FIRST, COUNT)
        gate = Gate(chunks_of(FIRST, COUNT), 2)
        sending = asyncio.create_task(ends.transport.send(ends.work.target(), header, aiter(gate)))
        await gate.reached.wait()
        await ends.work.server.stop(None)
        with pytest.raises(HandoffError) as caught:
            await sending
        assert caught.value.code == "unreachable"
        await sink.wait_ended()
        assert agent_of(ends.sending).memory.num_taken == 1
        await becomes(lambda: agent_of(ends.receiving).memory.num_taken == 0)


@needs_nixl
async def test_cancelled_at_either_end() -> None:
    async with pair() as ends:
        for cancels_sender in (False, True):
            header, sink = ends.work.expect(FIRST, COUNT)
            gate = Gate(chunks_of(FIRST, COUNT), 2)
            sending = asyncio.create_task(ends.transport.send(ends.work.target(), header, aiter(gate)))
            await gate.reached.wait()
            if cancels_sender:
                sending.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await sending
                await sink.wait_ended()
            else:
                ends.work.receiver.cancel(header.handoff_id)
                with pytest.raises(HandoffError) as caught:
                    await sending
                assert caught.value.code == "cancelled"
            assert agent_of(ends.sending).memory.num_taken == cancels_sender, "retired where nobody answered"
            await becomes(lambda: agent_of(ends.receiving).memory.num_taken == 0)
        assert await ends.send() == "nixl"


@needs_nixl
async def test_after_a_failed_read_the_retry_goes_as_bytes_and_later_ones_by_nixl_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_handle: object) -> str:
        raise RuntimeError("the link is down")

    async with pair() as ends:
        assert await ends.send() == "nixl"
        with monkeypatch.context() as patch:
            patch.setattr(agent_of(ends.receiving)._agent, "check_xfer_state", fail)
            with pytest.raises(HandoffError, match="the link is down") as caught:
                await ends.send()
        assert (caught.value.code, caught.value.is_retryable) == ("read_failed", True)
        assert await ends.send() == "grpc"
        assert ends.receiving.num_remotes == 0
        later = transport_with(ends.sending)
        header, sink = ends.work.expect(FIRST, COUNT)
        receipt = await later.send(ends.work.target(), header, streamed(chunks_of(FIRST, COUNT)))
        assert receipt.transport == "nixl"
        sink.assert_holds(FIRST, COUNT)
        assert agent_of(ends.sending).memory.num_taken == 0


@needs_nixl
async def test_offers_with_anything_wrong_go_as_bytes() -> None:
    async with pair() as ends:
        agent, own = agent_of(ends.sending), agent_of(ends.receiving)
        address, room, metadata = agent.memory.address, agent.memory.num_bytes, agent.metadata
        cut = metadata[: len(metadata) // 2]
        wrong = [
            offer_of(agent.version, metadata, address - 4096, room),
            offer_of(agent.version, metadata, address, room + 1),
            offer_of(agent.version, metadata, address, 1),
            offer_of("0", metadata, address, room),
            offer_of(agent.version, cut, address, room),
            offer_of(agent.version, random.Random(0).randbytes(400), address, room),
            offer_of(agent.version, b"x" * 70_000, address, room),
            offer_of(agent.version, own.metadata, own.memory.address, own.memory.num_bytes),
            # All in order but what UCX makes of it.
            offer_of(agent.version, metadata_of(address=address, num_bytes=room), address, 0),
            pb.NixlOffer(),
        ]
        for offer in wrong:
            header, sink = ends.work.expect(FIRST, COUNT)
            frames = good_frames(header, chunks_of(FIRST, COUNT))
            frames[0] = header_frame(header, nixl=offer)
            assert (await push(ends.work.address, frames)).WhichOneof("reply") == "acknowledged"
            sink.assert_holds(FIRST, COUNT)
        assert ends.receiving.num_remotes == 0
        assert await ends.send() == "nixl"
        ends.assert_nothing_taken()


@needs_nixl
async def test_a_chunk_outside_the_range_offered_or_with_bytes_is_rejected() -> None:
    async with pair() as ends:
        agent = agent_of(ends.sending)
        payload_bytes = COUNT * LAYOUT.bytes_per_token
        for offset in (payload_bytes, 2**64 - 1, None):
            header, sink = ends.work.expect(FIRST, COUNT)
            frames = good_frames(header, chunks_of(FIRST, COUNT))
            offer = offer_of(agent.version, agent.metadata, agent.memory.address, payload_bytes)
            frames[0] = header_frame(header, nixl=offer)
            if offset is not None:
                frames[1].chunk.nixl_offset = offset
            reply = await push(ends.work.address, frames)
            assert reply.rejected.code == "size_mismatch"
            assert not reply.rejected.may_still_read
            assert sink.aborted is not None
        await becomes(lambda: agent_of(ends.receiving).memory.num_taken == 0)


@needs_nixl
async def test_without_room_at_either_end_bytes_go() -> None:
    for sending_bytes, receiving_bytes in ((4096, 2**22), (2**22, 4096)):
        async with pair(sending_bytes, receiving_bytes) as ends:
            assert await ends.send(0, 300, 100) == "grpc"
            assert await ends.send(0, 4, 1) == "nixl"
            ends.assert_nothing_taken()


@needs_nixl
async def test_more_payload_than_announced_is_refused() -> None:
    async with pair() as ends:
        header, sink = ends.work.expect(FIRST, COUNT)
        huge = [KvChunk(0, FIRST, COUNT, memoryview(bytes(2**20)))]
        with pytest.raises(HandoffError, match="more payload"):
            await ends.transport.send(ends.work.target(), header, streamed(huge))
        await sink.wait_ended()


@needs_nixl
async def test_an_end_without_nixl_gets_bytes_and_the_agent_is_built_when_first_needed() -> None:
    sending, receiving = NixlEndpoint(2**22), NixlEndpoint(2**22)
    async with receiver_at_work() as without, receiver_at_work(nixl=receiving) as work:
        transport = transport_with(sending)
        ends = Pair(work, transport, sending, receiving)
        assert await ends.send() == "grpc"
        await sending.wait_built()
        assert await Pair(without, transport, sending, receiving).send() == "grpc"
        assert agent_of(sending).memory.num_taken == 0
        assert await ends.send() == "grpc"
        await receiving.wait_built()
        assert await ends.send() == "nixl"
        await transport.close()
    await sending.close()
    await receiving.close()


@needs_nixl
async def test_remote_agents_are_bounded() -> None:
    async with AsyncExitStack() as stack:
        receiving = NixlEndpoint(2**22, max_remotes=1)
        await receiving.start()
        stack.push_async_callback(receiving.close)
        work = await stack.enter_async_context(receiver_at_work(nixl=receiving))
        senders = [await stack.enter_async_context(started()) for _ in range(2)]
        for sending in [*senders, *senders]:
            assert await Pair(work, transport_with(sending), sending, receiving).send() == "nixl"
            await becomes(lambda: agent_of(receiving).memory.num_taken == 0)
            assert receiving.num_remotes == 1


@needs_nixl
async def test_nobody_polls_while_nothing_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair() as ends:
        assert await ends.send() == "nixl"
        polls = 0
        for end in (ends.sending, ends.receiving):
            nixl = agent_of(end)._agent
            was = nixl.get_new_notifs

            def counted(was: Any = was) -> Any:
                nonlocal polls
                polls += 1
                return was()

            monkeypatch.setattr(nixl, "get_new_notifs", counted)
        await asyncio.sleep(0.05)
        polls = 0
        await asyncio.sleep(0.3)
        assert polls == 0
        assert await ends.send() == "nixl"
        assert polls > 0


@needs_nixl
def test_an_agent_that_is_closed_with_a_read_under_way_says_so() -> None:
    reading, read = NixlAgent(2**20), NixlAgent(2**20)
    reading.add_remote(read.metadata).result(10)
    future = reading.read(read.name, read.memory.address, 0, 4096)
    reading.close()
    assert future.done()
    assert reading.add_remote(read.metadata).exception(10) is not None
    read.close()


@needs_nixl
def test_a_read_without_an_end_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.transfer.nixl.ABANDON_S", 0.05)
    reading, read = NixlAgent(2**20), NixlAgent(2**20)
    reading.add_remote(read.metadata).result(10)
    monkeypatch.setattr(reading._agent, "check_xfer_state", lambda _handle: "PROC")
    assert "had not ended" in str(reading.read(read.name, read.memory.address, 0, 4096).exception(10))
    reading.close()
    read.close()


@needs_nixl
@pytest.mark.parametrize("tls", ["tcp", None])
def test_random_ranges_are_read_as_they_are(tls: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if tls:
        monkeypatch.setenv("UCX_TLS", tls)
    rng, size = random.Random(1), 2**22
    reading, read = NixlAgent(size), NixlAgent(size)
    read.memory.view[:] = rng.randbytes(size)
    reading.add_remote(read.metadata).result(10)
    read.begin_serving()
    for _ in range(30):
        num_bytes = rng.choice((1, 100, 4096, 70_001, 2**20))
        theirs, ours = rng.randint(0, size - num_bytes), rng.randint(0, size - num_bytes)
        before = bytes(reading.memory.view)
        reading.read(read.name, read.memory.address + theirs, ours, num_bytes).result(10)
        assert reading.memory.view[ours : ours + num_bytes] == read.memory.view[theirs : theirs + num_bytes]
        assert reading.memory.view[:ours] == before[:ours]
        assert reading.memory.view[ours + num_bytes :] == before[ours + num_bytes :]
    read.end_serving()
    reading.close()
    read.close()


async def test_without_the_package_auto_goes_without_and_nixl_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.transfer.nixl.PACKAGES", ("a_package_that_is_not_there",))
    assert endpoint_of(TransferConfig()) is None
    assert endpoint_of(TransferConfig(transport="grpc")) is None
    asked_for = endpoint_of(TransferConfig(transport="nixl"))
    assert asked_for is not None
    with pytest.raises(NixlUnavailableError, match=r"pip install 'headrace\[nixl\]'"):
        await asked_for.start()
    lazy = nixl_endpoint.NixlEndpoint(2**20)
    assert lazy.agent() is None
    await lazy.wait_built()
    assert lazy.agent() is None
    assert lazy.lease(100) is None
    await lazy.close()


def test_auto_has_it_where_there_is_an_rdma_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded yet: any package will do."""
    monkeypatch.setattr("cluster.transfer.nixl.PACKAGES", ("msgspec",))
    devices = tmp_path / "infiniband"
    monkeypatch.setattr("cluster.transfer.nixl._RDMA_DEVICES", devices)
    assert endpoint_of(TransferConfig()) is None
    devices.mkdir()
    assert endpoint_of(TransferConfig()) is None
    (devices / "mlx5_0").mkdir()
    assert endpoint_of(TransferConfig()) is not None
    assert endpoint_of(TransferConfig(transport="grpc")) is None


def test_a_retired_region_is_used_again_when_it_is_due() -> None:
    now_s = 0.0
    memory = RegisteredMemory(4096, lambda: now_s)
    memory.give_back(memory.take(1) or 0, delay_s=10)
    assert memory.take(1) is None
    now_s = 10.0
    assert memory.take(1) == 0
    memory.close()


def test_a_target_is_paused_for_a_while_and_the_memory_of_it_is_bounded() -> None:
    now_s = 0.0
    pauses = Pauses(lambda: now_s)
    for i in range(MAX_PAUSED + 1):
        pauses.add(f"host:{i}")
    assert not pauses.has("host:0"), "the oldest was forgotten"
    assert pauses.has("host:1")
    now_s = PAUSE_S
    assert not pauses.has("host:1")
