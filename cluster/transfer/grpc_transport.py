"""Sends hand-offs: one control flow, the `KvReceiver.Push` stream, and three ways for the payload.

Bytes travel on the stream, or through memory that is offered in the header, and used where the receiver can
reach it (else bytes after all): a shared segment within a host, memory registered with NIXL between hosts.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from cluster.messages import WorkerAddress
from cluster.transfer import MAX_CHUNK_BYTES, HandoffError, HandoffHeader, HandoffReceipt, KvChunk
from cluster.transfer.channels import MAX_CHANNELS, ChannelPool
from cluster.transfer.leases import Leases, PayloadLease
from cluster.transfer.nixl_endpoint import NixlEndpoint
from cluster.transfer.verify import PayloadDigest
from cluster.wire import headrace_pb2 as pb

GRPC = "grpc"
CANCEL_TIMEOUT_S = 1.0
"""What a cancelled `send` gives the receiver to hear of it, before it raises anyway."""

PushCall = grpc.aio.StreamStreamCall[pb.HandoffFrame, pb.HandoffReply]

_SERIALIZE_FRAME: Callable[[pb.HandoffFrame], bytes] = pb.HandoffFrame.SerializeToString


class _RejectedError(HandoffError):
    """The receiver answered."""

    def __init__(self, rejected: pb.HandoffRejected) -> None:
        super().__init__(rejected.code, rejected.message)
        self.may_still_read = rejected.may_still_read


class GrpcKvTransport:
    """`KvTransport` over gRPC. For one event loop; any number of hand-offs at once."""

    def __init__(
        self,
        *,
        own_host_id: str,
        timeout_s: float,
        prefer_shared_memory: bool = True,
        nixl: NixlEndpoint | None = None,
        max_channels: int = MAX_CHANNELS,
    ) -> None:
        """`timeout_s`: longest wait for the receiver's next sign of life. How long `chunks` may take to
        produce the next one is the caller's affair, and the receiver's progress timeout. `nixl` is the
        caller's to close, after this."""
        self._timeout_s = timeout_s
        self._channels = ChannelPool(max_channels)
        self._leases = Leases(own_host_id, prefer_shared_memory, nixl)

    async def send(
        self, target: WorkerAddress, header: HandoffHeader, chunks: AsyncIterator[KvChunk]
    ) -> HandoffReceipt:
        """See `KvTransport.send`. Returns or raises only when the receiver can no longer read our memory."""
        async with self._channels.use(target.grpc_address) as channel:
            try:
                return await self._push(channel, target, header, chunks)
            except _RejectedError as error:
                raise HandoffError(error.code, error.message) from None
            except BaseException as error:
                if not (isinstance(error, HandoffError) and error.code == "unreachable"):
                    await self._cancel_at_receiver(channel, header)
                raise

    async def close(self) -> None:
        self._leases.close()
        await self._channels.close()

    async def _push(
        self,
        channel: grpc.aio.Channel,
        target: WorkerAddress,
        header: HandoffHeader,
        chunks: AsyncIterator[KvChunk],
    ) -> HandoffReceipt:
        call = channel.stream_stream(
            "/headrace.v1.KvReceiver/Push",
            request_serializer=_SERIALIZE_FRAME,
            response_deserializer=pb.HandoffReply.FromString,
        )()
        lease, is_settled = None, False
        try:
            lease = self._leases.take(target, header.total_bytes)
            is_taken_up = await self._open(call, header, lease)
            if lease and not is_taken_up:
                lease.end(is_settled=True)
                lease = None
            await self._carry(call, header, chunks, lease)
            is_settled = True
        except _RejectedError as error:
            is_settled = not error.may_still_read
            if lease:
                lease.failed(error.code)
            raise
        except grpc.aio.AioRpcError as error:
            raise _as_handoff_error(error) from error
        except TimeoutError:
            if lease:
                lease.failed("timeout")
            raise HandoffError("timeout", f"{self._timeout_s:g} s without an answer") from None
        finally:
            call.cancel()  # no-op where it ended
            if lease:
                lease.end(is_settled=is_settled)
        return HandoffReceipt(transport=lease.transport if lease else GRPC, bytes_sent=header.total_bytes)

    async def _open(self, call: PushCall, header: HandoffHeader, lease: PayloadLease | None) -> bool:
        """Send the header; returns whether the receiver reads from the memory offered."""
        message = pb.HandoffHeader(
            handoff_id=header.handoff_id,
            epoch=header.epoch,
            layout_fingerprint=header.layout_fingerprint,
            first_token=header.first_token,
            num_tokens=header.num_tokens,
        )
        if lease:
            lease.add_offer(message)
        async with asyncio.timeout(self._timeout_s):
            # A call that ended already says why when it is read.
            with contextlib.suppress(asyncio.InvalidStateError):
                await call.write(pb.HandoffFrame(header=message))
            reply = _answer(await call.read())
        if reply.WhichOneof("reply") != "accepted":
            raise HandoffError("internal", "the receiver acknowledged a hand-off before its payload")
        accepted = reply.accepted
        is_taken_up = lease is not None and lease.is_taken_up(accepted)
        if accepted.use_shared_memory + accepted.use_nixl > is_taken_up:
            raise HandoffError("internal", "the receiver took memory that was not offered")
        return is_taken_up

    async def _carry(
        self,
        call: PushCall,
        header: HandoffHeader,
        chunks: AsyncIterator[KvChunk],
        lease: PayloadLease | None,
    ) -> None:
        """Send the payload while listening: a rejection may come at any time, and ends it."""
        pump = asyncio.create_task(self._pump(call, header, chunks, lease))
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
        lease: PayloadLease | None,
    ) -> None:
        """Write all chunks and the trailer; returns early where the call ended: its answer says why."""
        digest = PayloadDigest()
        async for chunk in chunks:
            frame = _chunk_frame(chunk, digest, lease)
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


def _chunk_frame(chunk: KvChunk, digest: PayloadDigest, lease: PayloadLease | None) -> pb.HandoffFrame:
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
    if lease is None:
        message.data = bytes(payload)
    else:
        lease.add_payload(message, payload)
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
        raise _RejectedError(reply.rejected)
    return reply


def _as_handoff_error(error: grpc.aio.AioRpcError) -> HandoffError:
    status = error.code()
    if status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return HandoffError("unreachable", f"the receiver is gone: {error.details()}")
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return HandoffError("timeout", error.details() or "deadline exceeded")
    return HandoffError("internal", f"the receiver failed with {status.name}: {error.details()}")
