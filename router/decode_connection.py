"""One long-lived stream to one decode worker, carrying every request between it and this router.

Commands leave in the order they were given, written by one task; events are handed to their request's
sink. When the stream breaks, every request on it gets a retryable failure, and the connection
reopens by itself with backoff; what was on the old stream is never resumed on the new one.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable

import grpc
import grpc.aio

from cluster.ids import RequestId
from cluster.messages import (
    PROTOCOL_VERSION,
    DecodeEvent,
    FailureCode,
    GenerateRequest,
    SequenceFailed,
    WorkerAddress,
)
from cluster.wire import headrace_pb2 as pb
from cluster.wire.conversions import WireError, event_from_proto, generate_request_to_proto
from cluster.wire.headrace_pb2_grpc import DecodeStub

FIRST_BACKOFF_S = 0.05
LAST_BACKOFF_S = 2.0
STABLE_AFTER_S = 5.0
"""A stream that held this long was not part of a series of failures."""

EventSink = Callable[[DecodeEvent], None]

_log = logging.getLogger(__name__)


def backoff_s(num_failures: int, jitter: float) -> float:
    """Doubles from FIRST_BACKOFF_S to LAST_BACKOFF_S; `jitter` in [0, 1) takes off up to half."""
    return min(LAST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(num_failures - 1, 16)) * (1 - jitter / 2)


def hello(model: str, model_fingerprint: str, router_id: str) -> pb.Hello:
    return pb.Hello(
        protocol_version=PROTOCOL_VERSION,
        model=model,
        model_fingerprint=model_fingerprint,
        router_id=router_id,
    )


class Outbox:
    """Commands not yet written, by request in order of arrival.

    Bounded by the requests being served: a request that ends before its first command left leaves nothing.
    """

    def __init__(self) -> None:
        self._commands: dict[RequestId, list[pb.DecodeCommand]] = {}
        self._has_commands = asyncio.Event()

    def add(self, request_id: RequestId, command: pb.DecodeCommand) -> None:
        self._commands.setdefault(request_id, []).append(command)
        self._has_commands.set()

    def cancel(self, request_id: RequestId) -> None:
        unsent = self._commands.pop(request_id, [])
        if not any(command.HasField("generate") for command in unsent):
            self.add(request_id, pb.DecodeCommand(cancel=pb.CancelRequest(request_id=request_id)))

    async def take(self) -> list[pb.DecodeCommand]:
        """The commands of the request that waited longest."""
        while not self._commands:
            self._has_commands.clear()
            await self._has_commands.wait()
        return self._commands.pop(next(iter(self._commands)))

    def clear(self) -> None:
        self._commands.clear()


class DecodeConnection:
    """Belongs to one event loop. `start` it once, `stop` it once."""

    def __init__(self, address: WorkerAddress, channel: grpc.aio.Channel, greeting: pb.Hello) -> None:
        self.address = address
        """Kept current by the pool: a worker may get a new epoch while its stream stands."""
        self._channel = channel
        self._greeting = greeting
        self._sinks: dict[RequestId, EventSink] = {}
        self._outbox = Outbox()
        self._task: asyncio.Task[None] | None = None
        self._is_broken = False
        self._num_failures = 0
        self.refusal: str | None = None
        """Why the worker will not talk to us (version skew), in its own words."""
        self.heard_at_s = time.monotonic()

    @property
    def is_usable(self) -> bool:
        """Whether a request may be placed here. A connection not tried yet is."""
        return not self._is_broken and self.refusal is None

    @property
    def num_requests(self) -> int:
        return len(self._sinks)

    def start(self) -> None:
        assert self._task is None, "started twice"
        self._task = asyncio.create_task(self._keep_open(), name=f"stream to {self.address.worker_id}")

    async def stop(self, reason: str) -> None:
        """Requests still on it fail as retryable. Safe to repeat."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait((task,))
        self._break(reason)

    def open(self, request: GenerateRequest, sink: EventSink) -> None:
        """Send a request; its events go to `sink`, which must not block. Every `open` needs its `close`."""
        assert request.request_id not in self._sinks, "request ids are unique"
        self._sinks[request.request_id] = sink
        if self.is_usable:
            command = pb.DecodeCommand(generate=generate_request_to_proto(request))
            self._outbox.add(request.request_id, command)
        else:
            sink(_broken(request.request_id, f"no stream to {self.address.worker_id}"))

    def retry_handoff(self, request_id: RequestId, handoff_id: str) -> None:
        retry = pb.RetryHandoff(request_id=request_id, handoff_id=handoff_id)
        self._outbox.add(request_id, pb.DecodeCommand(retry_handoff=retry))

    def prefill_locally(self, request_id: RequestId) -> None:
        local = pb.PrefillLocally(request_id=request_id)
        self._outbox.add(request_id, pb.DecodeCommand(prefill_locally=local))

    def close(self, request_id: RequestId, *, is_ended: bool) -> None:
        """Forget a request; one that has not ended is cancelled at the worker."""
        if self._sinks.pop(request_id, None) is not None and not is_ended and self.is_usable:
            self._outbox.cancel(request_id)

    async def _keep_open(self) -> None:
        while self.refusal is None:
            opened_at_s = time.monotonic()
            try:
                await self._exchange()
                reason = "it ended the stream"
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
                if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                    self.refusal = error.details() or "no reason given"
            except Exception as error:  # noqa: BLE001 - the requests on it must hear of it, whatever it was
                _log.exception("stream to %s failed", self.address.worker_id)
                reason = f"{type(error).__name__}: {error}"
            stood_s = time.monotonic() - opened_at_s
            self._num_failures = 1 if stood_s > STABLE_AFTER_S else self._num_failures + 1
            if self._num_failures == 1 or self.refusal:
                _log.warning("stream to %s broke: %s", self.address.worker_id, reason)
            self._break(f"the stream to {self.address.worker_id} broke ({reason})")
            await asyncio.sleep(backoff_s(self._num_failures, random.random()))  # noqa: S311

    async def _exchange(self) -> None:
        """One stream, from its opening to its end. Raises AioRpcError."""
        if self._is_broken:
            await self._channel.channel_ready()
        call = DecodeStub(self._channel).Generate()
        writer = asyncio.create_task(self._write(call))
        self._is_broken = False
        try:
            while (events := await call.read()) is not grpc.aio.EOF:
                self.heard_at_s = time.monotonic()
                for event in events.events:
                    self._deliver(event)
        finally:
            writer.cancel()
            call.cancel()
            await asyncio.wait((writer,))

    async def _write(self, call: "grpc.aio.StreamStreamCall[pb.DecodeCommand, pb.DecodeEvents]") -> None:
        # A broken stream shows in the reader, with its status: here it only ends the writing.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(pb.DecodeCommand(hello=self._greeting))
            while True:
                for command in await self._outbox.take():
                    await call.write(command)

    def _deliver(self, message: pb.DecodeEvent) -> None:
        request_id = RequestId(message.request_id)
        sink = self._sinks.get(request_id)
        if sink is None:
            return  # cancelled meanwhile
        try:
            sink(event_from_proto(message))
        except WireError as error:
            _log.error("%s sent an event that breaks the contract: %s", self.address.worker_id, error)
            sink(_broken(request_id, f"{self.address.worker_id} broke the contract: {error}"))

    def _break(self, reason: str) -> None:
        self._is_broken = True
        self._outbox.clear()
        code = FailureCode.UNAVAILABLE if self.refusal is None else FailureCode.VERSION_SKEW
        for request_id, sink in self._sinks.items():
            sink(_broken(request_id, reason, code))


def _broken(
    request_id: RequestId, reason: str, code: FailureCode = FailureCode.UNAVAILABLE
) -> SequenceFailed:
    return SequenceFailed(request_id=request_id, code=code, message=reason, is_retryable=True)
