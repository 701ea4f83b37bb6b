"""Hand-offs as raw frames, so that a test can get one thing wrong at a time."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence

import grpc
import xxhash

from cluster.transfer import HandoffHeader, KvChunk
from cluster.wire import headrace_pb2 as pb
from cluster.wire import headrace_pb2_grpc as pb_grpc

Frames = list[pb.HandoffFrame]


def header_frame(
    header: HandoffHeader, offer: pb.SharedMemoryOffer | None = None, nixl: pb.NixlOffer | None = None
) -> pb.HandoffFrame:
    return pb.HandoffFrame(
        header=pb.HandoffHeader(
            handoff_id=header.handoff_id,
            epoch=header.epoch,
            layout_fingerprint=header.layout_fingerprint,
            first_token=header.first_token,
            num_tokens=header.num_tokens,
            shared_memory=offer,
            nixl=nixl,
        )
    )


def good_frames(header: HandoffHeader, chunks: Sequence[KvChunk]) -> Frames:
    payload = b"".join(bytes(chunk.data) for chunk in chunks)
    return [
        header_frame(header),
        *(
            pb.HandoffFrame(
                chunk=pb.KvChunk(
                    sequence_number=i,
                    layer=chunk.layer,
                    first_token=chunk.first_token,
                    num_tokens=chunk.num_tokens,
                    data=bytes(chunk.data),
                )
            )
            for i, chunk in enumerate(chunks)
        ),
        pb.HandoffFrame(
            trailer=pb.HandoffTrailer(
                num_chunks=len(chunks),
                num_bytes=len(payload),
                valid_tokens=header.num_tokens,
                checksum=xxhash.xxh3_64_intdigest(payload),
            )
        ),
    ]


def renumbered(frames: Frames) -> Frames:
    """Chunks numbered in order and the trailer made to match: only what they say of tokens stays wrong."""
    chunks = [frame.chunk for frame in frames if frame.WhichOneof("frame") == "chunk"]
    for i, chunk in enumerate(chunks):
        chunk.sequence_number = i
    trailer = frames[-1].trailer
    trailer.num_chunks = len(chunks)
    trailer.num_bytes = sum(len(chunk.data) for chunk in chunks)
    trailer.checksum = xxhash.xxh3_64_intdigest(b"".join(chunk.data for chunk in chunks))
    return frames


class Pusher:
    """One raw Push stream."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call = pb_grpc.KvReceiverStub(channel).Push()

    async def write(self, *frames: pb.HandoffFrame) -> None:
        # The receiver may have answered and ended the call already; its answer is what counts.
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            for frame in frames:
                await self.call.write(frame)

    async def read(self) -> pb.HandoffReply:
        return await asyncio.wait_for(self.call.read(), 10)

    async def last_word(self) -> pb.HandoffReply:
        reply = await self.read()
        return await self.read() if reply.WhichOneof("reply") == "accepted" else reply


async def push(address: str, frames: Frames) -> pb.HandoffReply:
    """Send everything; the receiver's last word."""
    async with grpc.aio.insecure_channel(address) as channel:
        pusher = Pusher(channel)
        # Read from the start: a write into a call that ended loses what it had to say.
        last_word = asyncio.create_task(pusher.last_word())
        await pusher.write(*frames)
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            await pusher.call.done_writing()
        return await last_word


async def cancel(address: str, handoff_id: str) -> str:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.KvReceiverStub(channel)
        return (await stub.Cancel(pb.CancelHandoffRequest(handoff_id=handoff_id), timeout=10)).state


Spoil = Callable[[Frames], Frames]
