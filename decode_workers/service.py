"""`Decode.Generate`: routers' streams on one side, the engine's thread on the other.

All state here belongs to the event loop; commands go to the engine through its inbox, and its events
come back by `deliver`, once a step.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from functools import partial

import grpc

from cluster.ids import HandoffId, RequestId
from cluster.messages import (
    PROTOCOL_VERSION,
    DecodeEvent,
    FailureCode,
    GenerateRequest,
    SequenceFailed,
    SequenceFinished,
    TargetingParams,
)
from cluster.model_card import ModelCard
from cluster.wire import conversions
from cluster.wire import headrace_pb2 as pb
from cluster.wire import headrace_pb2_grpc as pb_grpc
from decode_workers.engine import Drafter
from decode_workers.inbox import Inbox
from decode_workers.roster import Roster
from decode_workers.targeting.item_chooser import ItemChooser, NoItemsError

MAX_OUTBOX_EVENTS = 65_536
"""Events a stream may be behind by before it is cut: its router stopped reading."""
LAST_WRITE_S = 2.0
"""How long a stream that ends may take to write its last message."""

logger = logging.getLogger(__name__)

DecodeContext = grpc.aio.ServicerContext[pb.DecodeCommand, pb.DecodeEvents]


class _StreamFaultError(Exception):
    """Ends a stream with a status that says why."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Stream:
    """One router's stream: what is to be written to it, and the requests it started."""

    def __init__(self) -> None:
        self.request_ids: set[RequestId] = set()
        self.fault: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Raises what ends the stream from this side."""
        self._outbox: list[DecodeEvent] = []
        self._arrived = asyncio.Event()
        self._is_closing = False

    def put(self, event: DecodeEvent) -> None:
        """Keep an event for the next message; a stream that is too far behind keeps no more, and ends."""
        if len(self._outbox) < MAX_OUTBOX_EVENTS:
            self._outbox.append(event)
            self._arrived.set()
        else:
            message = f"{MAX_OUTBOX_EVENTS} events wait to be read"
            self.fail(_StreamFaultError(grpc.StatusCode.RESOURCE_EXHAUSTED, message))

    def fail(self, fault: _StreamFaultError) -> None:
        if not self.fault.done():
            self.fault.set_exception(fault)

    def close(self) -> None:
        """Let the writer end after what is there."""
        self._is_closing = True
        self._arrived.set()

    async def write_to(self, context: DecodeContext) -> None:
        """One message for all that came since the last one, until the stream is closed."""
        while not self._is_closing or self._outbox:
            await self._arrived.wait()
            self._arrived.clear()
            events, self._outbox = self._outbox, []
            if events:
                await context.write(conversions.events_to_proto(events))


class DecodeService(pb_grpc.DecodeServicer):
    def __init__(
        self,
        roster: Roster,
        inbox: Inbox,
        card: ModelCard,
        max_commands_waiting: int,
        chooser: ItemChooser | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        """`roster` is only named in calls that the engine's thread runs. Without `chooser` targeting requests
        are refused."""
        self._roster = roster
        self._inbox = inbox
        self._card = card
        self._max_commands_waiting = max_commands_waiting
        self._chooser = chooser
        self._drafter = drafter
        self._choosing: dict[RequestId, asyncio.Task[None]] = {}
        """Targeting requests whose catalogue is being opened."""
        self._streams: set[_Stream] = set()
        self._owners: dict[RequestId, _Stream] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._crash: str | None = None

    async def wait_idle(self) -> None:
        """Until no request is left whose last event has not been passed on."""
        await self._idle.wait()

    def deliver(self, events: Iterable[DecodeEvent]) -> None:
        """Pass one step's events on to the streams that started the requests."""
        for event in events:
            stream = self._owners.get(event.request_id)
            if stream is None:
                continue  # its stream ended
            if isinstance(event, SequenceFinished | SequenceFailed):
                self._disown(event.request_id)
                stream.request_ids.discard(event.request_id)
            stream.put(event)

    def crash(self, error: Exception) -> None:
        """The engine is gone: fail every request here, so that routers take them elsewhere."""
        self._crash = f"the decode engine crashed: {type(error).__name__}: {error}"
        self.deliver([self._crashed(request_id) for request_id in list(self._owners)])

    def close(self) -> None:
        """End every stream after what is there to write."""
        for stream in self._streams:
            stream.fail(_StreamFaultError(grpc.StatusCode.UNAVAILABLE, "the worker is stopping"))

    async def Generate(self, _commands: AsyncIterator[pb.DecodeCommand], context: DecodeContext) -> None:  # noqa: N802
        stream = _Stream()
        self._streams.add(stream)
        try:
            await self._check_hello(context)
            await self._serve(stream, context)
        except _StreamFaultError as fault:
            await context.abort(fault.code, str(fault))
        finally:
            self._streams.remove(stream)
            self._abandon(stream)

    async def _serve(self, stream: _Stream, context: DecodeContext) -> None:
        """Until the router's end of the stream, or a fault, which it raises."""
        writer = asyncio.create_task(stream.write_to(context))
        reader = asyncio.create_task(self._obey_all(stream, context))
        try:
            ends = (reader, writer, stream.fault)
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            # A status cannot be sent beside a message that is still being written.
            stream.close()
            await asyncio.wait((writer,), timeout=LAST_WRITE_S)
            for end in done:
                end.result()
        finally:
            for end in (reader, writer, stream.fault):
                end.cancel()

    async def _check_hello(self, context: DecodeContext) -> None:
        command = await context.read()
        if not isinstance(command, pb.DecodeCommand) or command.WhichOneof("command") != "hello":
            raise _StreamFaultError(grpc.StatusCode.INVALID_ARGUMENT, "the first command must be Hello")
        hello, card = command.hello, self._card
        sides = (
            ("protocol version", hello.protocol_version, PROTOCOL_VERSION),
            ("model", hello.model, card.name),
            ("model fingerprint", hello.model_fingerprint, card.fingerprint),
        )
        for what, theirs, ours in sides:
            if theirs != ours:
                message = f"{what}: the router has {theirs!r}, this decode worker {ours!r}"
                raise _StreamFaultError(grpc.StatusCode.FAILED_PRECONDITION, message)

    async def _obey_all(self, stream: _Stream, context: DecodeContext) -> None:
        """Returns at the stream's end."""
        while isinstance(command := await context.read(), pb.DecodeCommand):
            self._obey(stream, command)

    def _obey(self, stream: _Stream, command: pb.DecodeCommand) -> None:
        match command.WhichOneof("command"):
            case "generate":
                try:
                    request = conversions.generate_request_from_proto(command.generate)
                except conversions.WireError as error:
                    request_id = RequestId(command.generate.request_id)
                    stream.put(_failed(request_id, FailureCode.INVALID, str(error), is_retryable=False))
                else:
                    self._generate(stream, request)
            case "cancel":
                request_id = RequestId(command.cancel.request_id)
                if request_id in stream.request_ids:
                    self._cancel(request_id)
            case "retry_handoff":
                request_id = RequestId(command.retry_handoff.request_id)
                handoff_id = HandoffId(command.retry_handoff.handoff_id)
                if request_id in stream.request_ids:
                    self._inbox.post(partial(self._roster.retry_handoff, request_id, handoff_id))
            case "prefill_locally":
                request_id = RequestId(command.prefill_locally.request_id)
                if request_id in stream.request_ids:
                    self._inbox.post(partial(self._roster.prefill_locally, request_id))
            case "hello":
                raise _StreamFaultError(grpc.StatusCode.INVALID_ARGUMENT, "a second Hello")
            case _:
                message = "a command that this worker does not know, or none"
                raise _StreamFaultError(grpc.StatusCode.INVALID_ARGUMENT, message)

    def _generate(self, stream: _Stream, request: GenerateRequest) -> None:
        request_id = request.request_id
        if request_id in self._owners:
            message = f"request id {request_id} is in use"
            stream.put(_failed(request_id, FailureCode.INVALID, message, is_retryable=False))
        elif self._crash is not None:
            stream.put(self._crashed(request_id))
        elif len(self._inbox) >= self._max_commands_waiting:
            message = f"{len(self._inbox)} commands wait for the engine"
            stream.put(_failed(request_id, FailureCode.OVERLOADED, message, is_retryable=True))
        else:
            self._owners[request_id] = stream
            self._idle.clear()
            stream.request_ids.add(request_id)
            if request.targeting is None:
                if self._drafter is not None:
                    self._drafter.expect(request)
                self._inbox.post(partial(self._roster.submit, request))
            else:
                choosing = asyncio.create_task(self._choose(request, request.targeting))
                self._choosing[request_id] = choosing
                choosing.add_done_callback(lambda _: self._choosing.pop(request_id, None))

    async def _choose(self, request: GenerateRequest, params: TargetingParams) -> None:
        """Open the catalogue, which may have to be fetched first, then submit the request."""
        request_id = request.request_id
        if self._chooser is None:
            message = "this worker serves no catalogues"
            self.deliver([_failed(request_id, FailureCode.INVALID, message, is_retryable=False)])
            return
        try:
            items = await asyncio.to_thread(self._chooser.choose, params, request.tenant)
        except NoItemsError as error:
            code = FailureCode.UNAVAILABLE if error.is_retryable else FailureCode.INVALID
            self.deliver([_failed(request_id, code, str(error), is_retryable=error.is_retryable)])
        except Exception as error:
            logger.exception("a catalogue could not be opened")
            message = f"catalogue {params.catalogue.name}: {type(error).__name__}: {error}"
            self.deliver([_failed(request_id, FailureCode.INTERNAL, message, is_retryable=True)])
        else:
            if request_id in self._owners:
                self._inbox.post(partial(self._roster.submit, request, items))

    def _cancel(self, request_id: RequestId) -> None:
        choosing = self._choosing.get(request_id)
        if choosing is None:
            self._inbox.post(partial(self._roster.cancel, request_id))
        else:
            # The roster hears of it in the order in which it hears of the request.
            choosing.add_done_callback(lambda _: self._inbox.post(partial(self._roster.cancel, request_id)))

    def _abandon(self, stream: _Stream) -> None:
        """Cancel what a stream started and did not see the end of."""
        for request_id in stream.request_ids:
            self._disown(request_id)
            self._cancel(request_id)
        stream.request_ids.clear()

    def _disown(self, request_id: RequestId) -> None:
        del self._owners[request_id]
        if not self._owners:
            self._idle.set()

    def _crashed(self, request_id: RequestId) -> SequenceFailed:
        return _failed(request_id, FailureCode.UNAVAILABLE, self._crash or "", is_retryable=True)


def _failed(request_id: RequestId, code: FailureCode, message: str, *, is_retryable: bool) -> SequenceFailed:
    return SequenceFailed(request_id=request_id, code=code, message=message, is_retryable=is_retryable)
