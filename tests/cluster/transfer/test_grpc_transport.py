"""The sender against a real receiver on loopback: both payload paths, and every way it may not work out."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator

import grpc
import pytest

from cluster.ids import Epoch, HandoffId
from cluster.messages import HandoffCancelState
from cluster.transfer import MAX_CHUNK_BYTES, HandoffError, HandoffHeader, KvChunk, is_retryable_code
from cluster.transfer.channels import ChannelPool
from cluster.transfer.grpc_transport import GrpcKvTransport
from cluster.transfer.host_id import host_id
from cluster.transfer.shared_memory import SharedSegment
from cluster.wire import headrace_pb2 as pb
from cluster.wire import headrace_pb2_grpc as pb_grpc
from tests.cluster.transfer.loopback import (
    LAYOUT,
    chunks_of,
    header_of,
    memfds,
    open_fds,
    receiver_at_work,
    streamed,
    target_at,
)

FIRST, COUNT = 5, 23


def transport_of(*, shared: bool = True, timeout_s: float = 5.0) -> GrpcKvTransport:
    return GrpcKvTransport(own_host_id=host_id(), timeout_s=timeout_s, prefer_shared_memory=shared)


class Gate:
    """Chunks that stop after a few until it is opened; says when it got there."""

    def __init__(self, chunks: list[KvChunk], num_before: int) -> None:
        self.reached, self.opened = asyncio.Event(), asyncio.Event()
        self._chunks, self._num_before = chunks, num_before

    async def __aiter__(self) -> AsyncIterator[KvChunk]:
        for i, each in enumerate(self._chunks):
            if i == self._num_before:
                self.reached.set()
                await self.opened.wait()
            yield each


@pytest.mark.parametrize("shared", [True, False])
async def test_a_hand_off_arrives_byte_for_byte(shared: bool) -> None:
    async with receiver_at_work() as work:
        transport = transport_of(shared=shared)
        for step in (1, 4, COUNT):
            header, sink = work.expect(FIRST, COUNT)
            receipt = await transport.send(work.target(), header, streamed(chunks_of(FIRST, COUNT, step)))
            assert receipt.transport == ("shared_memory" if shared else "grpc")
            assert receipt.bytes_sent == COUNT * LAYOUT.bytes_per_token
            sink.assert_holds(FIRST, COUNT)
        await transport.close()


async def test_another_host_gets_bytes() -> None:
    async with receiver_at_work() as work:
        transport = transport_of()
        header, sink = work.expect(FIRST, COUNT)
        elsewhere = work.target(its_host_id="another host")
        receipt = await transport.send(elsewhere, header, streamed(chunks_of(FIRST, COUNT)))
        assert receipt.transport == "grpc"
        sink.assert_holds(FIRST, COUNT)
        await transport.close()


async def test_a_receiver_that_cannot_open_the_memory_gets_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def offer_of_a_lost_file(self: SharedSegment) -> pb.SharedMemoryOffer:
        return pb.SharedMemoryOffer(pid=os.getpid(), fd=10_000, num_bytes=self.num_bytes, nonce=b"n" * 16)

    monkeypatch.setattr(SharedSegment, "offer", offer_of_a_lost_file)
    async with receiver_at_work() as work:
        transport = transport_of()
        header, sink = work.expect(FIRST, COUNT)
        receipt = await transport.send(work.target(), header, streamed(chunks_of(FIRST, COUNT)))
        assert receipt.transport == "grpc"
        sink.assert_holds(FIRST, COUNT)
        await transport.close()


async def test_a_sender_without_memory_to_share_sends_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> int:
        raise OSError("too many open files")

    monkeypatch.setattr(os, "memfd_create", refuse)
    async with receiver_at_work() as work:
        transport = transport_of()
        header, sink = work.expect(FIRST, COUNT)
        receipt = await transport.send(work.target(), header, streamed(chunks_of(FIRST, COUNT)))
        assert receipt.transport == "grpc"
        sink.assert_holds(FIRST, COUNT)
        await transport.close()


async def test_chunks_leave_while_later_ones_are_not_computed_yet() -> None:
    async with receiver_at_work() as work:
        transport = transport_of()
        header, sink = work.expect(FIRST, COUNT)
        gate = Gate(chunks_of(FIRST, COUNT), 4)
        fourth_came = asyncio.Event()
        sink.before_write = lambda _chunk: fourth_came.set() if sink.num_writes == 3 else None
        sending = asyncio.create_task(transport.send(work.target(), header, aiter(gate)))
        await asyncio.wait_for(fourth_came.wait(), 10)
        assert not sink.ended.is_set()
        gate.opened.set()
        await sending
        sink.assert_holds(FIRST, COUNT)
        await transport.close()


@pytest.mark.parametrize("shared", [True, False])
async def test_many_at_once_keep_apart_and_leave_nothing(shared: bool) -> None:
    async with receiver_at_work() as work:
        transport = transport_of(shared=shared)
        header, _ = work.expect(0, 1)
        await transport.send(work.target(), header, streamed(chunks_of(0, 1)))
        before = open_fds() - len([name for name in memfds() if not name.startswith("/")])
        handoffs = [(first, *work.expect(first, COUNT)) for first in range(40)]
        await asyncio.gather(
            *(
                transport.send(work.target(), header, streamed(chunks_of(first, COUNT, 3)))
                for first, header, _ in handoffs
            )
        )
        for first, _, sink in handoffs:
            sink.assert_holds(first, COUNT)
        assert work.receiver.num_live == 0
        await transport.close()
        assert memfds() == []
        assert open_fds() <= before


@pytest.mark.parametrize("shared", [True, False])
async def test_a_rejection_is_raised_with_its_code(shared: bool) -> None:
    async with receiver_at_work() as work:
        transport = transport_of(shared=shared)
        unknown = header_of(HandoffId("kv-unknown"), FIRST, COUNT)
        with pytest.raises(HandoffError) as caught:
            await transport.send(work.target(), unknown, streamed(chunks_of(FIRST, COUNT)))
        assert caught.value.code == "not_found"

        header, sink = work.expect(FIRST, COUNT)
        work.epoch = Epoch(99)
        with pytest.raises(HandoffError) as caught:
            await transport.send(work.target(), header, streamed(chunks_of(FIRST, COUNT)))
        assert (caught.value.code, caught.value.is_retryable) == ("stale_epoch", True)
        assert sink.aborted is not None
        await transport.close()


@pytest.mark.parametrize("shared", [True, False])
async def test_a_cancel_at_the_receiver_stops_the_sender_while_it_waits_for_chunks(shared: bool) -> None:
    async with receiver_at_work() as work:
        transport = transport_of(shared=shared)
        header, sink = work.expect(FIRST, COUNT)
        gate = Gate(chunks_of(FIRST, COUNT), 2)
        sending = asyncio.create_task(transport.send(work.target(), header, aiter(gate)))
        await gate.reached.wait()
        state = await asyncio.to_thread(work.receiver.cancel, header.handoff_id)
        assert state == HandoffCancelState.CANCEL_REQUESTED_IN_FLIGHT
        with pytest.raises(HandoffError) as caught:
            await sending
        assert caught.value.code == "cancelled"
        assert sink.aborted is None, "who cancels knows"
        await transport.close()


@pytest.mark.parametrize("shared", [True, False])
async def test_cancelling_the_send_cancels_at_the_receiver(shared: bool) -> None:
    async with receiver_at_work() as work:
        transport = transport_of(shared=shared)
        header, sink = work.expect(FIRST, COUNT)
        gate = Gate(chunks_of(FIRST, COUNT), 2)
        sending = asyncio.create_task(transport.send(work.target(), header, aiter(gate)))
        await gate.reached.wait()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert memfds() == [], "a segment whose receiver did not answer is never used again"
        await sink.wait_ended()
        assert sink.committed is None
        assert work.receiver.num_live == 0
        await transport.close()


async def test_what_the_engine_raises_comes_through_and_cancels_at_the_receiver() -> None:
    class EngineBrokeError(Exception):
        pass

    async def broken() -> AsyncIterator[KvChunk]:
        yield chunks_of(FIRST, COUNT)[0]
        raise EngineBrokeError

    async with receiver_at_work() as work:
        transport = transport_of()
        header, sink = work.expect(FIRST, COUNT)
        with pytest.raises(EngineBrokeError):
            await transport.send(work.target(), header, broken())
        await sink.wait_ended()
        assert sink.committed is None
        await transport.close()


@pytest.mark.parametrize("shared", [True, False])
async def test_too_few_or_too_many_chunks_are_rejected(shared: bool) -> None:
    async with receiver_at_work() as work:
        transport = transport_of(shared=shared)
        chunks = chunks_of(FIRST, COUNT)
        for spoiled in (chunks[:-1], [*chunks, chunks[-1]], []):
            header, sink = work.expect(FIRST, COUNT)
            with pytest.raises(HandoffError) as caught:
                await transport.send(work.target(), header, streamed(spoiled))
            assert caught.value.code in ("size_mismatch", "out_of_order")
            await sink.wait_ended()
            assert sink.committed is None
        await transport.close()


async def test_a_chunk_larger_than_a_message_is_refused_before_it_is_sent() -> None:
    async with receiver_at_work() as work:
        transport = transport_of()
        header, sink = work.expect(FIRST, COUNT)
        huge = KvChunk(0, FIRST, COUNT, memoryview(bytes(MAX_CHUNK_BYTES + 1)))
        with pytest.raises(HandoffError, match="at most"):
            await transport.send(work.target(), header, streamed([huge]))
        await sink.wait_ended()
        await transport.close()


async def test_nobody_listening_is_unreachable() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: refused at once
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        transport = transport_of()
        header = header_of(HandoffId("kv-a"), FIRST, COUNT)
        with pytest.raises(HandoffError) as caught:
            await transport.send(target_at(address), header, streamed(chunks_of(FIRST, COUNT)))
        assert (caught.value.code, caught.value.is_retryable) == ("unreachable", True)
        await transport.close()


async def test_a_receiver_that_stops_mid_way_is_unreachable() -> None:
    async with receiver_at_work() as work:
        transport = transport_of()
        header, sink = work.expect(FIRST, COUNT)
        gate = Gate(chunks_of(FIRST, COUNT), 2)
        sending = asyncio.create_task(transport.send(work.target(), header, aiter(gate)))
        await gate.reached.wait()
        await work.server.stop(None)
        with pytest.raises(HandoffError) as caught:
            await sending
        assert caught.value.code == "unreachable"
        await sink.wait_ended()
        await transport.close()


class _MuteReceiver(pb_grpc.KvReceiverServicer):
    """Takes everything, answers as far as it is told to, then says nothing."""

    def __init__(self, replies: list[pb.HandoffReply]) -> None:
        self._replies = replies

    async def Push(self, request_iterator: object, context: grpc.aio.ServicerContext) -> None:
        for reply in self._replies:
            await context.write(reply)
        while await context.read() is not grpc.aio.EOF:
            pass
        await asyncio.Event().wait()


async def _send_to(servicer: pb_grpc.KvReceiverServicer, header: HandoffHeader) -> str:
    server = grpc.aio.server()
    pb_grpc.add_KvReceiverServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    transport = transport_of(timeout_s=0.2)
    try:
        with pytest.raises(HandoffError) as caught:
            await transport.send(target_at(address), header, streamed(chunks_of(FIRST, COUNT)))
        assert memfds() == [], "a segment whose receiver did not answer is never used again"
        return caught.value.code
    finally:
        await transport.close()
        await server.stop(None)


async def test_a_receiver_that_says_nothing_times_out_before_and_after_the_payload() -> None:
    header = header_of(HandoffId("kv-a"), FIRST, COUNT)
    accepted = pb.HandoffReply(accepted=pb.HandoffAccepted(use_shared_memory=True))
    assert await _send_to(_MuteReceiver([]), header) == "timeout"
    assert await _send_to(_MuteReceiver([accepted]), header) == "timeout"


async def test_answers_out_of_turn_are_errors_not_success() -> None:
    header = header_of(HandoffId("kv-a"), FIRST, COUNT)
    accepted = pb.HandoffReply(accepted=pb.HandoffAccepted(use_shared_memory=True))
    early = pb.HandoffReply(acknowledged=pb.HandoffAcknowledged(num_bytes=header.total_bytes))
    short = pb.HandoffReply(acknowledged=pb.HandoffAcknowledged(num_bytes=1))
    assert await _send_to(_MuteReceiver([early]), header) == "internal"
    assert await _send_to(_MuteReceiver([accepted, accepted]), header) == "internal"
    assert await _send_to(_MuteReceiver([accepted, short]), header) == "internal"


async def test_segments_of_answered_hand_offs_are_reused() -> None:
    async with receiver_at_work() as work:
        transport = transport_of()
        for _ in range(3):
            header, _ = work.expect(FIRST, COUNT)
            await transport.send(work.target(), header, streamed(chunks_of(FIRST, COUNT)))
            held = memfds()
            header, _ = work.expect(FIRST, COUNT)
            work.receiver.cancel(header.handoff_id)
            with pytest.raises(HandoffError):
                await transport.send(work.target(), header, streamed(chunks_of(FIRST, COUNT)))
            assert memfds() == held
        await transport.close()


async def test_channels_are_bounded_and_never_closed_in_use() -> None:
    pool = ChannelPool(max_channels=2)
    async with pool.use("127.0.0.1:1") as first:
        for port in range(2, 8):
            async with pool.use(f"127.0.0.1:{port}"):
                pass
        async with pool.use("127.0.0.1:1") as again:
            assert again is first
        assert len(pool._entries) == 2
        assert first.get_state() is not grpc.ChannelConnectivity.SHUTDOWN
    await pool.close()
    assert first.get_state() is grpc.ChannelConnectivity.SHUTDOWN


def test_only_what_no_retry_can_mend_is_final() -> None:
    final = {"layout_mismatch", "already_complete", "cancelled"}
    assert not any(is_retryable_code(code) for code in final)
    assert all(
        is_retryable_code(code)
        for code in ("stale_epoch", "not_found", "checksum_mismatch", "timeout", "unreachable", "overloaded")
    )
