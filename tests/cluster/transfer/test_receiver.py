"""The receiver against senders that get one thing wrong, and against everything that may cross."""

import asyncio
import os
import threading

import grpc
import pytest

from cluster.ids import Epoch, HandoffId
from cluster.messages import HandoffCancelState as State
from cluster.transfer import MAX_CHUNK_BYTES, KvChunk
from cluster.transfer.ledger import DuplicateHandoffError
from cluster.transfer.receiver import HandoffReceiver
from cluster.transfer.shared_memory import SharedSegment
from cluster.wire import headrace_pb2 as pb
from tests.cluster.transfer.frames import (
    Frames,
    Pusher,
    Spoil,
    cancel,
    good_frames,
    header_frame,
    push,
    renumbered,
)
from tests.cluster.transfer.loopback import (
    EPOCH,
    LAYOUT,
    KeepingSink,
    chunks_of,
    header_of,
    receiver_at_work,
)

FIRST, COUNT = 3, 10


async def test_good_frames_are_committed_and_acknowledged() -> None:
    async with receiver_at_work() as work:
        header, sink = work.expect(FIRST, COUNT)
        reply = await push(work.address, good_frames(header, chunks_of(FIRST, COUNT)))
        assert reply.acknowledged.num_bytes == header.total_bytes
        sink.assert_holds(FIRST, COUNT)
        assert work.receiver.num_live == 0


def set_header(**facts: object) -> Spoil:
    def spoil(frames: Frames) -> Frames:
        for name, value in facts.items():
            setattr(frames[0].header, name, value)
        return frames

    return spoil


def set_chunk(index: int, **facts: object) -> Spoil:
    def spoil(frames: Frames) -> Frames:
        for name, value in facts.items():
            setattr(frames[1 + index].chunk, name, value)
        return frames

    return spoil


def set_trailer(**facts: object) -> Spoil:
    def spoil(frames: Frames) -> Frames:
        for name, value in facts.items():
            setattr(frames[-1].trailer, name, value)
        return frames

    return spoil


def flip_a_payload_byte(frames: Frames) -> Frames:
    data = bytearray(frames[4].chunk.data)
    data[17] ^= 0x40
    frames[4].chunk.data = bytes(data)
    return frames


def swap_two_chunks(frames: Frames) -> Frames:
    frames[2], frames[3] = frames[3], frames[2]
    return frames


def swap_payloads(frames: Frames) -> Frames:
    a, b = frames[1].chunk, frames[2].chunk
    a.data, b.data = b.data, a.data
    return frames


def truncate_a_payload(frames: Frames) -> Frames:
    frames[2].chunk.data = frames[2].chunk.data[:-4]
    return frames


def oversize_chunk(frames: Frames) -> Frames:
    frames[1].chunk.data = bytes(MAX_CHUNK_BYTES + 4)
    return frames


def offset_without_offer(frames: Frames) -> Frames:
    frames[1].chunk.shared_memory_offset = 64
    return frames


SPOILED: list[tuple[str, Spoil, str]] = [
    ("stale epoch", set_header(epoch=EPOCH - 1), "stale_epoch"),
    ("future epoch", set_header(epoch=EPOCH + 1), "stale_epoch"),
    ("another layout", set_header(layout_fingerprint="0" * 16), "layout_mismatch"),
    ("another first token", set_header(first_token=FIRST + 1), "size_mismatch"),
    ("another length", set_header(num_tokens=COUNT + 1), "size_mismatch"),
    ("a flipped byte", flip_a_payload_byte, "checksum_mismatch"),
    ("swapped payloads", swap_payloads, "checksum_mismatch"),
    ("a wrong checksum", set_trailer(checksum=12345), "checksum_mismatch"),
    ("a missing chunk", lambda frames: frames[:2] + frames[3:], "out_of_order"),
    ("a missing chunk, hidden", lambda frames: renumbered(frames[:2] + frames[3:]), "out_of_order"),
    ("the last chunk missing", lambda frames: frames[:-2] + frames[-1:], "size_mismatch"),
    ("the last chunk missing, hidden", lambda f: renumbered(f[:-2] + f[-1:]), "size_mismatch"),
    ("a chunk twice", lambda frames: frames[:3] + frames[2:], "out_of_order"),
    ("a chunk twice, hidden", lambda f: renumbered([*f[:3], _copy(f[2]), *f[3:]]), "out_of_order"),
    ("swapped chunks", swap_two_chunks, "out_of_order"),
    ("a layer too many", set_chunk(2, layer=LAYOUT.num_layers), "size_mismatch"),
    ("tokens before the first", set_chunk(0, first_token=FIRST - 1), "out_of_order"),
    ("tokens past the last", set_chunk(0, num_tokens=COUNT + 1), "size_mismatch"),
    ("tokens past 2**31", set_chunk(0, num_tokens=2**32 - 1), "size_mismatch"),
    ("no tokens", set_chunk(0, num_tokens=0, data=b""), "size_mismatch"),
    ("a short payload", truncate_a_payload, "size_mismatch"),
    ("a payload too large", oversize_chunk, "size_mismatch"),
    ("an offset without an offer", offset_without_offer, "size_mismatch"),
    ("a trailer's chunk count", set_trailer(num_chunks=2), "size_mismatch"),
    ("a trailer's byte count", set_trailer(num_bytes=1), "size_mismatch"),
    ("fewer valid tokens", set_trailer(valid_tokens=COUNT - 1), "size_mismatch"),
    ("no trailer", lambda frames: frames[:-1], "unreachable"),
    ("nothing after the header", lambda frames: frames[:1], "unreachable"),
    ("a second header", lambda frames: frames[:3] + frames[:1], "out_of_order"),
    ("an empty frame", lambda frames: [*frames[:2], pb.HandoffFrame(), *frames[2:]], "out_of_order"),
]


def _copy(frame: pb.HandoffFrame) -> pb.HandoffFrame:
    return pb.HandoffFrame.FromString(frame.SerializeToString())


@pytest.mark.parametrize(("spoil", "code"), [s[1:] for s in SPOILED], ids=[s[0] for s in SPOILED])
async def test_one_thing_wrong_rejects_the_whole(spoil: Spoil, code: str) -> None:
    async with receiver_at_work() as work:
        header, sink = work.expect(FIRST, COUNT)
        reply = await push(work.address, spoil(good_frames(header, chunks_of(FIRST, COUNT))))
        assert reply.rejected.code == code, reply
        await sink.wait_ended()
        assert sink.committed is None
        assert sink.aborted is not None
        assert sink.aborted.code == code
        assert work.receiver.num_live == 0


async def test_a_first_frame_that_is_no_header_is_rejected() -> None:
    async with receiver_at_work() as work:
        header, sink = work.expect(FIRST, COUNT)
        frames = good_frames(header, chunks_of(FIRST, COUNT))
        assert (await push(work.address, frames[1:])).rejected.code == "out_of_order"
        assert (await push(work.address, [])).rejected.code == "unreachable"
        assert not sink.ended.is_set(), "nothing named this hand-off"


async def test_an_epoch_that_ends_during_the_push_rejects_it() -> None:
    async with receiver_at_work() as work, grpc.aio.insecure_channel(work.address) as channel:
        header, sink = work.expect(FIRST, COUNT)
        frames = good_frames(header, chunks_of(FIRST, COUNT))
        pusher = Pusher(channel)
        await pusher.write(*frames[:3])
        assert (await pusher.read()).HasField("accepted")
        work.epoch = Epoch(EPOCH + 1)
        await pusher.write(*frames[3:])
        assert (await pusher.read()).rejected.code == "stale_epoch"
        assert sink.aborted is not None


async def test_unknown_late_and_repeated_pushes_are_told_apart() -> None:
    async with receiver_at_work() as work:
        unknown = header_of(HandoffId("kv-unknown"), FIRST, COUNT)
        assert (await push(work.address, good_frames(unknown, []))).rejected.code == "not_found"

        header, sink = work.expect(FIRST, COUNT)
        frames = good_frames(header, chunks_of(FIRST, COUNT))
        assert (await push(work.address, frames)).HasField("acknowledged")
        writes = sink.num_writes
        assert (await push(work.address, frames)).rejected.code == "already_complete"
        assert sink.num_writes == writes

        header, sink = work.expect(FIRST, COUNT)
        frames = good_frames(header, chunks_of(FIRST, COUNT))
        await push(work.address, flip_a_payload_byte(good_frames(header, chunks_of(FIRST, COUNT))))
        late = await push(work.address, frames)
        assert late.rejected.code == "not_found"
        assert "checksum_mismatch" in late.rejected.message


async def test_a_second_push_of_a_hand_off_in_flight_harms_nothing() -> None:
    async with receiver_at_work() as work, grpc.aio.insecure_channel(work.address) as channel:
        header, sink = work.expect(FIRST, COUNT)
        frames = good_frames(header, chunks_of(FIRST, COUNT))
        first = Pusher(channel)
        await first.write(*frames[:3])
        assert (await first.read()).HasField("accepted")
        assert (await push(work.address, frames)).rejected.code == "not_found"
        await first.write(*frames[3:])
        assert (await first.read()).HasField("acknowledged")
        sink.assert_holds(FIRST, COUNT)


async def test_an_id_is_never_expected_twice() -> None:
    async with receiver_at_work() as work:
        header, _ = work.expect(FIRST, COUNT)
        with pytest.raises(DuplicateHandoffError, match=header.handoff_id):
            work.receiver.expect(header.handoff_id, FIRST, COUNT, KeepingSink())
        work.receiver.cancel(header.handoff_id)
        with pytest.raises(DuplicateHandoffError):
            work.receiver.expect(header.handoff_id, FIRST, COUNT, KeepingSink())


async def test_remote_cancel_in_every_state() -> None:
    async with receiver_at_work() as work, grpc.aio.insecure_channel(work.address) as channel:
        assert await cancel(work.address, "kv-unknown") == State.NOT_FOUND

        header, sink = work.expect(FIRST, COUNT)
        assert await cancel(work.address, header.handoff_id) == State.CANCELLED_BEFORE_ADVERTISE
        assert sink.aborted is not None
        assert sink.aborted.code == "cancelled"
        assert await cancel(work.address, header.handoff_id) == State.NOT_FOUND
        late = await push(work.address, good_frames(header, chunks_of(FIRST, COUNT)))
        assert late.rejected.code == "not_found"

        header, sink = work.expect(FIRST, COUNT)
        frames = good_frames(header, chunks_of(FIRST, COUNT))
        pusher = Pusher(channel)
        await pusher.write(*frames[:3])
        assert (await pusher.read()).HasField("accepted")
        assert await cancel(work.address, header.handoff_id) == State.CANCEL_REQUESTED_IN_FLIGHT
        assert (await pusher.read()).rejected.code == "cancelled"
        assert sink.aborted is not None

        header, sink = work.expect(FIRST, COUNT)
        await push(work.address, good_frames(header, chunks_of(FIRST, COUNT)))
        assert await cancel(work.address, header.handoff_id) == State.ALREADY_COMPLETE
        assert sink.committed == COUNT


async def test_local_cancel_from_another_thread_interrupts_the_push_and_stays_silent() -> None:
    async with receiver_at_work() as work, grpc.aio.insecure_channel(work.address) as channel:
        header, sink = work.expect(FIRST, COUNT)
        frames = good_frames(header, chunks_of(FIRST, COUNT))
        pusher = Pusher(channel)
        await pusher.write(*frames[:3])
        assert (await pusher.read()).HasField("accepted")
        state = await asyncio.to_thread(work.receiver.cancel, header.handoff_id)
        writes = sink.num_writes
        assert state == State.CANCEL_REQUESTED_IN_FLIGHT
        assert (await pusher.read()).rejected.code == "cancelled"
        await pusher.write(*frames[3:])
        assert (sink.num_writes, sink.aborted, sink.committed) == (writes, None, None)
        assert work.receiver.cancel(header.handoff_id) == State.NOT_FOUND
        assert work.receiver.cancel(HandoffId("kv-unknown")) == State.NOT_FOUND

        header, sink = work.expect(FIRST, COUNT)
        assert work.receiver.cancel(header.handoff_id) == State.CANCELLED_BEFORE_ADVERTISE
        assert sink.aborted is None


async def test_cancel_waits_for_a_write_in_progress_and_no_write_follows_it() -> None:
    async with receiver_at_work() as work, grpc.aio.insecure_channel(work.address) as channel:
        header, sink = work.expect(FIRST, COUNT)
        is_writing, may_go_on = threading.Event(), threading.Event()
        order: list[str] = []

        def hold(_chunk: KvChunk) -> None:
            is_writing.set()
            may_go_on.wait(10)
            order.append("write")

        sink.before_write = hold

        def cancel_during_the_write() -> State:
            assert is_writing.wait(10)
            threading.Timer(0.05, may_go_on.set).start()
            state = work.receiver.cancel(header.handoff_id)
            order.append("cancel returned")
            return state

        cancelling = asyncio.create_task(asyncio.to_thread(cancel_during_the_write))
        frames = good_frames(header, chunks_of(FIRST, COUNT))
        pusher = Pusher(channel)
        await pusher.write(*frames[:3])
        assert await cancelling == State.CANCEL_REQUESTED_IN_FLIGHT
        await pusher.write(*frames[3:])
        assert (await pusher.last_word()).rejected.code == "cancelled"
        # The second chunk's write may win the lock from the cancel; a third cannot have come by then.
        assert order in (["write", "cancel returned"], ["write", "write", "cancel returned"])


async def test_a_push_that_never_comes_times_out() -> None:
    async with receiver_at_work(progress_timeout_s=0.05) as work:
        header, sink = work.expect(FIRST, COUNT)
        await sink.wait_ended()
        assert sink.aborted is not None
        assert sink.aborted.code == "timeout"
        late = await push(work.address, good_frames(header, chunks_of(FIRST, COUNT)))
        assert late.rejected.code == "not_found"


async def test_a_push_that_stalls_times_out_and_its_sender_is_told() -> None:
    async with receiver_at_work(progress_timeout_s=0.2) as work:
        async with grpc.aio.insecure_channel(work.address) as channel:
            header, sink = work.expect(FIRST, COUNT)
            pusher = Pusher(channel)
            await pusher.write(*good_frames(header, chunks_of(FIRST, COUNT))[:3])
            assert (await pusher.read()).HasField("accepted")
            assert (await pusher.read()).rejected.code == "timeout"
            assert sink.aborted is not None
            assert sink.aborted.code == "timeout"

            silent = Pusher(channel)
            assert (await silent.read()).rejected.code == "timeout"


async def test_the_watchdog_ends_with_the_last_hand_off_and_comes_back() -> None:
    def watchdogs() -> int:
        return sum(thread.name == "handoff-watchdog" for thread in threading.enumerate())

    def join_watchdogs() -> None:
        for thread in threading.enumerate():
            if thread.name == "handoff-watchdog":
                thread.join(5)

    assert watchdogs() == 0 or join_watchdogs() is None
    before = 0
    async with receiver_at_work(progress_timeout_s=0.05) as work:
        for _ in range(2):
            _, sink = work.expect(FIRST, COUNT)
            assert watchdogs() == before + 1
            await sink.wait_ended()
            await asyncio.to_thread(join_watchdogs)
            assert watchdogs() == before


async def test_a_broken_stream_aborts() -> None:
    async with receiver_at_work() as work:
        header, sink = work.expect(FIRST, COUNT)
        async with grpc.aio.insecure_channel(work.address) as channel:
            pusher = Pusher(channel)
            await pusher.write(*good_frames(header, chunks_of(FIRST, COUNT))[:3])
            assert (await pusher.read()).HasField("accepted")
            pusher.call.cancel()
        await sink.wait_ended()
        assert sink.aborted is not None
        assert sink.aborted.code == "unreachable"


async def test_a_sink_that_cannot_write_or_commit_rejects_the_hand_off() -> None:
    class NoCommit(KeepingSink):
        def commit(self, valid_tokens: int) -> None:
            raise RuntimeError("commit is broken")

    def no_room(_chunk: KvChunk) -> None:
        raise RuntimeError("no such slot")

    async with receiver_at_work() as work:
        header, sink = work.expect(FIRST, COUNT)
        sink.before_write = no_room
        reply = await push(work.address, good_frames(header, chunks_of(FIRST, COUNT)))
        assert (reply.rejected.code, "no such slot" in reply.rejected.message) == ("internal", True)
        assert sink.aborted is not None

        broken = NoCommit()
        header = header_of(HandoffId("kv-no-commit"), FIRST, COUNT)
        work.receiver.expect(header.handoff_id, FIRST, COUNT, broken)
        reply = await push(work.address, good_frames(header, chunks_of(FIRST, COUNT)))
        assert reply.rejected.code == "internal"
        assert broken.aborted is not None


async def test_more_pushes_than_allowed_are_refused_without_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.transfer.receiver.MAX_CONCURRENT_PUSHES", 1)
    async with receiver_at_work() as work, grpc.aio.insecure_channel(work.address) as channel:
        (a, sink_a), (b, sink_b) = work.expect(FIRST, COUNT), work.expect(FIRST, COUNT)
        frames_a, frames_b = (good_frames(h, chunks_of(FIRST, COUNT)) for h in (a, b))
        first = Pusher(channel)
        await first.write(frames_a[0])
        assert (await first.read()).HasField("accepted")
        assert (await push(work.address, frames_b)).rejected.code == "overloaded"
        assert not sink_b.ended.is_set()
        await first.write(*frames_a[1:])
        assert (await first.read()).HasField("acknowledged")
        sink_a.assert_holds(FIRST, COUNT)


async def test_close_aborts_everything_and_answers_unhealthy() -> None:
    async with receiver_at_work() as work:
        _, sink = work.expect(FIRST, COUNT)
        work.receiver.close()
        assert sink.aborted is not None
        assert sink.aborted.code == "unreachable"
        _, late = work.expect(FIRST, COUNT)
        assert late.aborted is not None
        assert await cancel(work.address, "kv-any") == State.BACKEND_UNHEALTHY
        header = header_of(HandoffId("kv-any"), FIRST, COUNT)
        assert (await push(work.address, good_frames(header, []))).rejected.code == "unreachable"


async def test_offsets_outside_the_segment_are_rejected() -> None:
    segment = SharedSegment(COUNT * LAYOUT.bytes_per_token)
    try:
        for offset in (0, segment.num_bytes - 8, segment.num_bytes, 2**63):
            async with receiver_at_work() as work, grpc.aio.insecure_channel(work.address) as channel:
                header, sink = work.expect(FIRST, COUNT)
                pusher = Pusher(channel)
                await pusher.write(header_frame(header, segment.offer()))
                assert (await pusher.read()).accepted.use_shared_memory
                chunk = pb.KvChunk(first_token=FIRST, num_tokens=4, shared_memory_offset=offset)
                await pusher.write(pb.HandoffFrame(chunk=chunk))
                assert (await pusher.read()).rejected.code == "size_mismatch"
                assert sink.num_writes == 0
    finally:
        segment.close()


async def test_bytes_on_the_stream_are_refused_once_memory_was_agreed_on() -> None:
    segment = SharedSegment(COUNT * LAYOUT.bytes_per_token)
    try:
        async with receiver_at_work() as work:
            header, _ = work.expect(FIRST, COUNT)
            frames = good_frames(header, chunks_of(FIRST, COUNT))
            frames[0] = header_frame(header, segment.offer())
            assert (await push(work.address, frames)).rejected.code == "size_mismatch"
    finally:
        segment.close()


async def test_an_offer_that_cannot_be_opened_is_answered_with_bytes_please() -> None:
    offer = pb.SharedMemoryOffer(pid=os.getpid(), fd=0, num_bytes=1 << 20, nonce=b"n" * 16)
    async with receiver_at_work() as work, grpc.aio.insecure_channel(work.address) as channel:
        header, sink = work.expect(FIRST, COUNT)
        frames = good_frames(header, chunks_of(FIRST, COUNT))
        pusher = Pusher(channel)
        await pusher.write(header_frame(header, offer))
        assert not (await pusher.read()).accepted.use_shared_memory
        await pusher.write(*frames[1:])
        assert (await pusher.read()).HasField("acknowledged")
        sink.assert_holds(FIRST, COUNT)


def test_expecting_nothing_is_a_programming_error() -> None:
    receiver = HandoffReceiver(LAYOUT, lambda: EPOCH, 1.0)
    with pytest.raises(AssertionError):
        receiver.expect(HandoffId("kv-none"), 0, 0, KeepingSink())
