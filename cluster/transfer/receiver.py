"""The receiving end of hand-offs: expectations from the decode engine, pushes from prefill workers.

Nothing that arrives is trusted: epoch, layout, place and size of every chunk, coverage and the whole
hand-off's checksum are checked, and one mismatch rejects the whole.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import grpc

from cluster.ids import Epoch, HandoffId
from cluster.kv_layout import KvLayout
from cluster.messages import HandoffCancelState
from cluster.transfer import HandoffError, HandoffSink, KvChunk
from cluster.transfer.frame_parts import nixl_offset_of, payload_of, place_of, trailer_of
from cluster.transfer.frame_stream import FrameStream, PushContext
from cluster.transfer.ledger import Expectation, Handoff, HandoffLedger
from cluster.transfer.nixl_endpoint import NixlEndpoint, NixlReads
from cluster.transfer.shared_memory import MappedSegment, open_offer
from cluster.transfer.verify import ChunkPlace, HandoffVerifier
from cluster.wire import headrace_pb2 as pb
from cluster.wire import headrace_pb2_grpc as pb_grpc

MAX_CONCURRENT_PUSHES = 128
MIN_WATCH_INTERVAL_S = 0.01
LINGER_S = 1.0
"""How long a rejected sender's frames are still taken, and discarded, so that it reads why."""

CancelContext = grpc.aio.ServicerContext[pb.CancelHandoffRequest, pb.CancelHandoffResponse]

logger = logging.getLogger(__name__)


class HandoffReceiver(pb_grpc.KvReceiverServicer):
    """Servicer of `KvReceiver`. `expect`, `cancel` and `close` may be called from any thread.

    A sink's `write` and `commit` are called from the server's event loop, `abort` from there or from a
    watchdog thread. Once `abort` was called or `cancel` returned, that sink is never written to again.
    """

    def __init__(
        self,
        layout: KvLayout,
        epoch: Callable[[], Epoch],
        progress_timeout_s: float,
        nixl: NixlEndpoint | None = None,
    ) -> None:
        """`progress_timeout_s`: longest silence before a push and between its frames. `nixl` is the caller's
        to close, after the server."""
        self._layout = layout
        self._fingerprint = layout.fingerprint
        self._epoch = epoch
        self._timeout_s = progress_timeout_s
        self._nixl = nixl
        self._ledger = HandoffLedger()
        self._num_pushes = 0
        self._watchdog_lock = threading.Lock()
        self._watchdog: threading.Thread | None = None
        self._closing = threading.Event()

    def expect(self, handoff_id: HandoffId, first_token: int, num_tokens: int, sink: HandoffSink) -> None:
        """Accept a push of exactly tokens [first_token, first_token + num_tokens) under this id.

        Raises DuplicateHandoffError where the id was used before.
        """
        assert first_token >= 0, first_token
        assert num_tokens >= 1, num_tokens
        expectation = Expectation(handoff_id=handoff_id, first_token=first_token, num_tokens=num_tokens)
        self._ledger.expect(expectation, sink)
        self._ensure_watchdog()
        if self._closing.is_set():
            self._abort_all()

    def cancel(self, handoff_id: HandoffId) -> HandoffCancelState:
        """Stop expecting or receiving; whatever the answer, no write follows. The sink hears nothing.

        ALREADY_COMPLETE: its `commit` was called or is about to be.
        """
        error = HandoffError("cancelled", "the decode worker cancelled it")
        return self._ledger.cancel(handoff_id, error, tells_sink=False)

    def close(self) -> None:
        """Abort everything live, and whatever is expected from here on; end the watchdog."""
        self._closing.set()
        self._abort_all()

    @property
    def num_live(self) -> int:
        """Hand-offs expected or in flight."""
        return self._ledger.num_live

    async def Cancel(  # noqa: N802 - the name of the RPC
        self, request: pb.CancelHandoffRequest, _context: CancelContext
    ) -> pb.CancelHandoffResponse:
        error = HandoffError("cancelled", "its sender cancelled it")
        state = (
            HandoffCancelState.BACKEND_UNHEALTHY
            if self._closing.is_set()
            else self._ledger.cancel(HandoffId(request.handoff_id), error, tells_sink=True)
        )
        return pb.CancelHandoffResponse(state=state.value)

    async def Push(self, _requests: AsyncIterator[pb.HandoffFrame], context: PushContext) -> None:  # noqa: N802
        frames = FrameStream(context)
        opened: list[NixlReads] = []
        try:
            with self._push_slot():
                acknowledged = await self._receive(context, frames, opened)
        except HandoffError as error:
            logger.info("hand-off rejected: %s", error)
            is_settled = all([await reads.settle() for reads in opened])
            rejected = pb.HandoffRejected(
                code=error.code, message=error.message, may_still_read=not is_settled
            )
            await self._answer(context, pb.HandoffReply(rejected=rejected))
            await frames.drain(LINGER_S)
        else:
            await self._answer(context, pb.HandoffReply(acknowledged=acknowledged))
        finally:
            for reads in opened:
                reads.close()
            await frames.close()

    async def _answer(self, context: PushContext, reply: pb.HandoffReply) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                await context.write(reply)

    async def _receive(
        self, context: PushContext, frames: FrameStream, opened: list[NixlReads]
    ) -> pb.HandoffAcknowledged:
        """Reads by NIXL are left in `opened`, for the caller to close: they may outlast the hand-off."""
        header = await self._read_header(frames)
        loop = asyncio.get_running_loop()
        interruption = asyncio.timeout(None)

        def expire_now() -> None:
            with contextlib.suppress(RuntimeError):  # the push left the block it interrupts
                interruption.reschedule(loop.time())

        def interrupt() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the push with it
                loop.call_soon_threadsafe(expire_now)

        handoff = self._ledger.begin(HandoffId(header.handoff_id), interrupt)
        try:
            async with interruption:
                self._check_header(header, handoff.expectation)
                num_bytes = await self._receive_payload(context, frames, header, handoff, opened)
            self._check_epoch(header)
        except TimeoutError:  # interrupted: somebody else ended it
            failure = handoff.ended_error()
            self._ledger.abort(handoff, failure)
            raise failure from None
        except HandoffError as error:
            self._ledger.abort(handoff, error)
            raise
        except asyncio.CancelledError:
            self._ledger.abort(handoff, HandoffError("unreachable", "the sender's stream broke"))
            raise
        except Exception as error:
            logger.exception("receiving hand-off %s", header.handoff_id)
            failure = HandoffError("internal", f"the receiver failed: {error}")
            self._ledger.abort(handoff, failure)
            raise failure from error
        self._ledger.commit(handoff)
        return pb.HandoffAcknowledged(num_bytes=num_bytes)

    async def _receive_payload(
        self,
        context: PushContext,
        frames: FrameStream,
        header: pb.HandoffHeader,
        handoff: Handoff,
        opened: list[NixlReads],
    ) -> int:
        """Answer the header, take chunks until the trailer holds; returns payload bytes."""
        wanted = handoff.expectation
        verifier = HandoffVerifier(self._layout, wanted.first_token, wanted.num_tokens)
        with _opened_segment(header, verifier.total_bytes) as segment:
            reads = await self._open_reads(header, verifier) if segment is None else None
            opened += [reads] if reads else []
            accepted = pb.HandoffAccepted(use_shared_memory=segment is not None, use_nixl=reads is not None)
            await context.write(pb.HandoffReply(accepted=accepted))
            while (frame := await frames.next()).WhichOneof("frame") == "chunk":
                place = place_of(frame.chunk)
                num_bytes = verifier.admit(place)
                if reads is None:
                    self._take(place, payload_of(frame.chunk, num_bytes, segment), verifier, handoff)
                    continue
                reads.start(place, nixl_offset_of(frame.chunk), num_bytes)
                if reads.is_full:
                    self._take(*await reads.next(), verifier, handoff)
            while reads is not None and reads.num_waiting:
                self._take(*await reads.next(), verifier, handoff)
        if frame.WhichOneof("frame") != "trailer":
            raise HandoffError("out_of_order", "a second header, or a frame without content")
        verifier.check_trailer(trailer_of(frame.trailer))
        return verifier.total_bytes

    async def _open_reads(self, header: pb.HandoffHeader, verifier: HandoffVerifier) -> NixlReads | None:
        if self._nixl is None or not header.HasField("nixl"):
            return None
        return await self._nixl.open(header.nixl, verifier.total_bytes, verifier.max_chunk_bytes)

    def _take(
        self, place: ChunkPlace, payload: memoryview, verifier: HandoffVerifier, handoff: Handoff
    ) -> None:
        verifier.add(place, payload)
        self._ledger.write(handoff, KvChunk(place.layer, place.first_token, place.num_tokens, payload))

    async def _read_header(self, frames: FrameStream) -> pb.HandoffHeader:
        try:
            async with asyncio.timeout(self._timeout_s):
                frame = await frames.next()
        except TimeoutError:
            raise HandoffError("timeout", f"no header for {self._timeout_s:g} s") from None
        if frame.WhichOneof("frame") != "header":
            raise HandoffError("out_of_order", "the first frame must be a header")
        return frame.header

    def _check_header(self, header: pb.HandoffHeader, wanted: Expectation) -> None:
        self._check_epoch(header)
        if header.layout_fingerprint != self._fingerprint:
            raise HandoffError(
                "layout_mismatch", f"KV of layout {header.layout_fingerprint}, held here {self._fingerprint}"
            )
        if (header.first_token, header.num_tokens) != (wanted.first_token, wanted.num_tokens):
            raise HandoffError(
                "size_mismatch",
                f"{header.num_tokens} tokens from {header.first_token}; "
                f"reserved {wanted.num_tokens} from {wanted.first_token}",
            )

    def _check_epoch(self, header: pb.HandoffHeader) -> None:
        epoch = self._epoch()
        if header.epoch != epoch:
            raise HandoffError("stale_epoch", f"sent to epoch {header.epoch}, this worker is at {epoch}")

    def _abort_all(self) -> None:
        self._ledger.abort_all(HandoffError("unreachable", "the decode worker is stopping"))

    @contextlib.contextmanager
    def _push_slot(self) -> Iterator[None]:
        if self._closing.is_set():
            raise HandoffError("unreachable", "the decode worker is stopping")
        if self._num_pushes >= MAX_CONCURRENT_PUSHES:
            raise HandoffError("overloaded", f"{MAX_CONCURRENT_PUSHES} hand-offs are being received")
        self._num_pushes += 1
        try:
            yield
        finally:
            self._num_pushes -= 1

    def _ensure_watchdog(self) -> None:
        with self._watchdog_lock:
            if self._watchdog is None and not self._closing.is_set():
                self._watchdog = threading.Thread(target=self._watch, name="handoff-watchdog", daemon=True)
                self._watchdog.start()

    def _watch(self) -> None:
        """Abort what stalls, even where the event loop is what stalls; ends when nothing is live."""
        while True:
            wait_s = self._ledger.expire(self._timeout_s)
            with self._watchdog_lock:
                if self._ledger.num_live == 0 or self._closing.is_set():
                    self._watchdog = None
                    return
            self._closing.wait(max(MIN_WATCH_INTERVAL_S, wait_s or 0.0))


@contextlib.contextmanager
def _opened_segment(header: pb.HandoffHeader, payload_bytes: int) -> Iterator[MappedSegment | None]:
    """The memory the sender offers, where it can be used; closed before any final reply is written."""
    segment = open_offer(header.shared_memory, payload_bytes) if header.HasField("shared_memory") else None
    try:
        yield segment
    finally:
        if segment is not None:
            segment.close()
