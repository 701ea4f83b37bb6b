"""Sends hand-offs: one control flow, the `KvReceiver.Push` stream, and two ways for the payload.

Bytes travel on the stream, or through a shared segment where both ends run on one host: offered in the
header, used where the receiver could open it, else bytes after all.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc

from cluster.messages import WorkerAddress
from cluster.transfer import MAX_CHUNK_BYTES, HandoffError, HandoffHeader, HandoffReceipt, KvChunk
from cluster.transfer.channels import MAX_CHANNELS, ChannelPool
from cluster.transfer.shared_memory import SegmentPool, SharedSegment
from cluster.transfer.verify import PayloadDigest
from cluster.wire import headrace_pb2 as pb

GRPC = "grpc"
SHARED_MEMORY = "shared_memory"
CANCEL_TIMEOUT_S = 1.0
"""What a cancelled `send` gives the receiver to hear of it, before it raises anyway."""

PushCall = grpc.aio.StreamStreamCall[pb.HandoffFrame, pb.HandoffReply]

_SERIALIZE_FRAME: Callable[[pb.HandoffFrame], bytes] = pb.HandoffFrame.SerializeToString

logger = logging.getLogger(__name__)


class _RejectedError(HandoffError):
    """The receiver answered, and will not look at our memory again."""


class _SegmentLease:
    """One hand-off's segment; reusable only once the receiver answered for it."""

    def __init__(self, segment: SharedSegment) -> None:
        self.segment = segment
        self.is_settled = False


class GrpcKvTransport:
    """`KvTransport` over gRPC. For one event loop; any number of hand-offs at once."""

    def __init__(
        self,
        *,
        own_host_id: str,
        timeout_s: float,
        prefer_shared_memory: bool = True,
        max_channels: int = MAX_CHANNELS,
    ) -> None:
        """`timeout_s`: longest wait for the receiver's next sign of life. How long `chunks` may take to
        produce the next one is the caller's affair, and the receiver's progress timeout."""
        self._own_host_id = own_host_id
        self._timeout_s = timeout_s
        self._prefers_shared_memory = prefer_shared_memory
        self._channels = ChannelPool(max_channels)
        self._segments = SegmentPool()

    async def send(
        self, target: WorkerAddress, header: HandoffHeader, chunks: AsyncIterator[KvChunk]
    ) -> HandoffReceipt:
        """See `KvTransport.send`. Returns or raises only when the receiver can no longer read our memory."""
        async with self._channels.use(target.grpc_address) as channel:
            try:
                with self._segment_for(target, header) as lease:
                    return await self._push(channel, header, chunks, lease)
            except _RejectedError as error:
                raise HandoffError(error.code, error.message) from None
            except BaseException as error:
                if not (isinstance(error, HandoffError) and error.code == "unreachable"):
                    await self._cancel_at_receiver(channel, header)
                raise

    async def close(self) -> None:
        self._segments.close()
        await self._channels.close()

    @contextlib.contextmanager
    def _segment_for(self, target: WorkerAddress, header: HandoffHeader) -> Iterator[_SegmentLease | None]:
        if not self._prefers_shared_memory or target.host_id != self._own_host_id:
            yield None
            return
        try:
            lease = _SegmentLease(self._segments.take(header.total_bytes))
        except OSError as error:
            logger.warning("no shared memory for %d bytes, sending them: %s", header.total_bytes, error)
            yield None
            return
        try:
            yield lease
        finally:
            if lease.is_settled:
                self._segments.give_back(lease.segment)
            else:
                lease.segment.close()

    async def _push(
        self,
        channel: grpc.aio.Channel,
        header: HandoffHeader,
        chunks: AsyncIterator[KvChunk],
        lease: _SegmentLease | None,
    ) -> HandoffReceipt:
        call = channel.stream_stream(
            "/headrace.v1.KvReceiver/Push",
            request_serializer=_SERIALIZE_FRAME,
            response_deserializer=pb.HandoffReply.FromString,
        )()
        try:
            is_shared = await self._open(call, header, lease)
            segment = lease.segment if lease and is_shared else None
            await self._carry(call, header, chunks, segment)
        except _RejectedError:
            if lease:
                lease.is_settled = True
            raise
        except grpc.aio.AioRpcError as error:
            raise _as_handoff_error(error) from error
        except TimeoutError:
            raise HandoffError("timeout", f"{self._timeout_s:g} s without an answer") from None
        finally:
            call.cancel()  # no-op where it ended
        if lease:
            lease.is_settled = True
        return HandoffReceipt(transport=SHARED_MEMORY if is_shared else GRPC, bytes_sent=header.total_bytes)

    async def _open(self, call: PushCall, header: HandoffHeader, lease: _SegmentLease | None) -> bool:
        """Send the header; returns whether the receiver reads from the segment offered."""
        message = pb.HandoffHeader(
            handoff_id=header.handoff_id,
            epoch=header.epoch,
            layout_fingerprint=header.layout_fingerprint,
            first_token=header.first_token,
            num_tokens=header.num_tokens,
            shared_memory=lease.segment.offer() if lease else None,
        )
        async with asyncio.timeout(self._timeout_s):
            # A call that ended already says why when it is read.
            with contextlib.suppress(asyncio.InvalidStateError):
                await call.write(pb.HandoffFrame(header=message))
            reply = _answer(await call.read())
        if reply.WhichOneof("reply") != "accepted":
            raise HandoffError("internal", "the receiver acknowledged a hand-off before its payload")
        if reply.accepted.use_shared_memory and lease is None:
            raise HandoffError("internal", "the receiver took shared memory that was not offered")
        return reply.accepted.use_shared_memory

    async def _carry(
        self,
        call: PushCall,
        header: HandoffHeader,
        chunks: AsyncIterator[KvChunk],
        segment: SharedSegment | None,
    ) -> None:
        """Send the payload while listening: a rejection may come at any time, and ends it."""
        pump = asyncio.create_task(self._pump(call, header, chunks, segment))
        verdict = asyncio.create_task(_read_verdict(call))
        try:
            await asyncio.wait((pump, verdict), return_when=asyncio.FIRST_COMPLETED)
            if not verdict.done() or verdict.cancelled():
                pump.result()
                async with asyncio.timeout(self._timeout_s):
                    await verdict
            acknowledged = verdict.result()
        finally:
            # Until both ended, the pump may still read a chunk's memory.
            pump.cancel()
            verdict.cancel()
            await asyncio.gather(pump, verdict, return_exceptions=True)
        if acknowledged.num_bytes != header.total_bytes:
            raise HandoffError(
                "internal", f"{acknowledged.num_bytes} bytes acknowledged of {header.total_bytes}"
            )

    async def _pump(
        self,
        call: PushCall,
        header: HandoffHeader,
        chunks: AsyncIterator[KvChunk],
        segment: SharedSegment | None,
    ) -> None:
        """Write all chunks and the trailer; returns early where the call ended: its answer says why."""
        digest = PayloadDigest()
        async for chunk in chunks:
            frame = _chunk_frame(chunk, digest, segment)
            if not await self._write(call, frame):
                return
        trailer = digest.trailer(header.num_tokens)
        message = pb.HandoffTrailer(
            num_chunks=trailer.num_chunks,
            num_bytes=trailer.num_bytes,
            valid_tokens=trailer.valid_tokens,
            checksum=trailer.checksum,
        )
        if await self._write(call, pb.HandoffFrame(trailer=message)):
            await call.done_writing()

    async def _write(self, call: PushCall, frame: pb.HandoffFrame) -> bool:
        """False where the call has ended."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await call.write(frame)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return False
        return True

    async def _cancel_at_receiver(self, channel: grpc.aio.Channel, header: HandoffHeader) -> None:
        """Best effort, bounded: a receiver that does not hear it times out by itself."""
        cancel = channel.unary_unary(
            "/headrace.v1.KvReceiver/Cancel",
            request_serializer=pb.CancelHandoffRequest.SerializeToString,
            response_deserializer=pb.CancelHandoffResponse.FromString,
        )
        with contextlib.suppress(grpc.aio.AioRpcError):
            await cancel(pb.CancelHandoffRequest(handoff_id=header.handoff_id), timeout=CANCEL_TIMEOUT_S)


def _chunk_frame(chunk: KvChunk, digest: PayloadDigest, segment: SharedSegment | None) -> pb.HandoffFrame:
    payload = chunk.data.cast("B")
    if len(payload) > MAX_CHUNK_BYTES:
        raise HandoffError("size_mismatch", f"a chunk of {len(payload)} bytes; at most {MAX_CHUNK_BYTES}")
    # Filled in place: a message built from parts copies the payload once more.
    frame = pb.HandoffFrame()
    message = frame.chunk
    message.sequence_number = digest.num_chunks
    message.layer = chunk.layer
    message.first_token = chunk.first_token
    message.num_tokens = chunk.num_tokens
    if segment is None:
        message.data = bytes(payload)
    else:
        message.shared_memory_offset = segment.append(payload)
    digest.add(payload)
    return frame


async def _read_verdict(call: PushCall) -> pb.HandoffAcknowledged:
    reply = _answer(await call.read())
    if reply.WhichOneof("reply") != "acknowledged":
        raise HandoffError("internal", "the receiver accepted a hand-off twice")
    return reply.acknowledged


def _answer(reply: Any) -> pb.HandoffReply:
    """The receiver's next reply. Raises HandoffError where it is a rejection, or the stream's end."""
    if reply is grpc.aio.EOF:
        raise HandoffError("unreachable", "the receiver closed the stream without an answer")
    assert isinstance(reply, pb.HandoffReply)
    if reply.WhichOneof("reply") == "rejected":
        raise _RejectedError(reply.rejected.code, reply.rejected.message)
    return reply


def _as_handoff_error(error: grpc.aio.AioRpcError) -> HandoffError:
    status = error.code()
    if status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return HandoffError("unreachable", f"the receiver is gone: {error.details()}")
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return HandoffError("timeout", error.details() or "deadline exceeded")
    return HandoffError("internal", f"the receiver failed with {status.name}: {error.details()}")
