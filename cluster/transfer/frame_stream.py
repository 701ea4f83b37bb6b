"""The frames of one Push, readable on after an interrupted wait."""

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import Any

import grpc

from cluster.transfer import HandoffError
from cluster.wire import headrace_pb2 as pb

PushContext = grpc.aio.ServicerContext[pb.HandoffFrame, pb.HandoffReply]


class FrameStream:
    """Reads frames; a `next` that is cancelled or times out loses none.

    gRPC allows one read at a time, and a cancelled one goes on inside it: so the read is a task of its
    own, which the next wait takes up again.
    """

    def __init__(self, context: PushContext) -> None:
        self._context = context
        self._reading: asyncio.Future[Any] | None = None

    async def next(self) -> pb.HandoffFrame:
        """Raises HandoffError where the sender's side of the stream ended."""
        frame = await self._read()
        if frame is grpc.aio.EOF:
            raise HandoffError("unreachable", "the sender's stream ended before its trailer")
        assert isinstance(frame, pb.HandoffFrame)
        return frame

    async def drain(self, timeout_s: float) -> None:
        """Discard what still comes, for a while: a sender whose write fails may not read its answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while await self._read() is not grpc.aio.EOF:
                    continue

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> Any:
        if self._reading is None:
            read: Awaitable[Any] = self._context.read()
            self._reading = asyncio.ensure_future(read)
        frame = await asyncio.shield(self._reading)
        self._reading = None
        return frame
