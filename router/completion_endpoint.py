"""The endpoint behind both OpenAI completion routes: body in, one answer or a stream of events out."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from cluster.ids import RequestId, new_request_id
from cluster.messages import Record
from cluster.metrics import RouterMetrics
from cluster.timeline import Stage, Timeline
from router.admission import Ask, Caller, Limits, check_model, remaining_s
from router.answers import Api, CollectedChoice, wants_usage
from router.asks import build_ask
from router.catalogues import Catalogues
from router.chunks import DONE, ChunkWriter, error_event
from router.errors import RequestError, internal
from router.generation import EventBatches, Generation, total_usage
from router.http import (
    SSE_TYPE,
    ClientGoneError,
    ClientWatch,
    caller_of,
    check_json,
    error_headers,
    headers_of,
    read_body,
    request_id_of,
    respond,
)
from router.openai_answers import HeadraceFacts, facts_of, usage_body
from router.openai_api import CommonFields
from router.sequence import SequenceEnded, SequenceEvent, TextEmitted

R = TypeVar("R", bound=CommonFields)

SEND_GRACE_S = 30.0
"""Past its deadline a request holds its place this long for a client that reads slowly."""

_log = logging.getLogger(__name__)


class Job(Record, frozen=True, kw_only=True, gc=False):
    """A request under way."""

    request_id: RequestId
    answer_id: str
    created: int
    ask: Ask
    caller: Caller
    timeline: Timeline
    headers: list[tuple[bytes, bytes]]
    """Of every response to it."""


class CompletionEndpoint(Generic[R]):
    """An ASGI application for one route."""

    def __init__(
        self,
        api: Api[R],
        generation: Generation,
        catalogues: Catalogues,
        limits: Limits,
        metrics: RouterMetrics,
        *,
        max_body_bytes: int,
    ) -> None:
        self._api = api
        self._catalogues = catalogues
        self._generation = generation
        self._limits = limits
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = headers_of(scope)
        response_headers = [(b"x-request-id", request_id_of(headers).encode("latin-1"))]
        try:
            outcome = await self._serve(headers, response_headers, receive, send)
        except RequestError as error:
            outcome = "rejected" if error.status < 500 else "failed"
            await respond(send, error.status, error.body(), [*response_headers, *error_headers(error)])
        except ClientGoneError:
            outcome = "cancelled"
        self._metrics.requests.labels(self._api.route, outcome).inc()

    async def _serve(
        self,
        headers: dict[str, str],
        response_headers: list[tuple[bytes, bytes]],
        receive: Receive,
        send: Send,
    ) -> str:
        """Returns how the request ended. Raises RequestError while nothing is sent; ClientGoneError."""
        check_json(headers)
        body = await read_body(headers, receive, self._max_body_bytes)
        timeline = Timeline()
        timeline.stamp(Stage.RECEIVED)
        request = self._api.decoder.decode(body)
        check_model(request.model, self._limits)
        caller = caller_of(headers)
        wanted = self._api.wanted(request)
        timeline.stamp(Stage.VALIDATED)
        async with ClientWatch(receive) as client:
            prompts = await self._api.prompts(request)
            phrases = await self._catalogues.phrases(caller.tenant, wanted.phrases)
            ask = build_ask(
                prompts,
                wanted,
                caller,
                self._limits,
                received_unix_ns=timeline.stamps_ns[Stage.RECEIVED],
                param=self._api.param,
                phrases=phrases,
            )
            timeline.stamp(Stage.TOKENIZED)
            request_id = new_request_id()
            job = Job(
                request_id=request_id,
                answer_id=self._api.id_prefix + request_id.removeprefix("req-"),
                created=int(time.time()),
                ask=ask,
                caller=caller,
                timeline=timeline,
                headers=response_headers,
            )
            batches = self._generation.run(request_id, ask, timeline)
            answer = self._stream if request.stream else self._whole
            try:
                async with contextlib.aclosing(batches), asyncio.timeout(_patience_s(ask)):
                    return await answer(request, job, batches, send, client)
            except TimeoutError:
                # Returning now leaves the response unfinished: the server closes the connection.
                _log.info("%s: the client did not read its answer", request_id)
                return "stalled"

    async def _whole(
        self, request: R, job: Job, batches: EventBatches, send: Send, client: ClientWatch
    ) -> str:
        choices = [CollectedChoice() for _ in range(job.ask.num_sequences)]
        async for batch in batches:
            for event in batch:
                choices[event.choice].add(event)
        ended = [choice.ended for choice in choices if choice.ended is not None]
        body = self._api.body(
            request,
            job.answer_id,
            job.created,
            choices,
            usage_body(total_usage(ended, job.ask.num_choices)),
            _facts(job, ended),
        )
        client.answered()
        await respond(send, 200, msgspec.json.encode(body), job.headers)
        return ended[0].reason.value

    async def _stream(
        self, request: R, job: Job, batches: EventBatches, send: Send, client: ClientWatch
    ) -> str:
        # The response begins with the first tokens: what fails before them gets a status of its own.
        batch = await anext(batches)
        await send({"type": "http.response.start", "status": 200, "headers": _stream_headers(job)})
        chunks = self._api.chunks(request, job.answer_id, job.created, job.ask.num_sequences)
        ended: list[SequenceEnded] = []
        try:
            data = self._events(request, job, chunks, batch, ended)
            while len(ended) < job.ask.num_sequences:
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                data = self._events(request, job, chunks, await anext(batches), ended)
        except RequestError as error:
            client.answered()
            return await _break_off(error, send)
        except Exception:  # noqa: BLE001 - whatever it was, the stream must not just stop
            _log.exception("%s: stream failed", job.request_id)
            client.answered()
            return await _break_off(internal(), send)
        client.answered()
        await send({"type": "http.response.body", "body": data + DONE})
        return ended[0].reason.value

    def _events(
        self,
        request: R,
        job: Job,
        chunks: ChunkWriter,
        batch: Sequence[SequenceEvent],
        ended: list[SequenceEnded],
    ) -> bytes:
        """The chunks of one wake-up; `ended` collects what ends. Behind the last comes usage if asked for."""
        include_usage = wants_usage(request)
        events: list[bytes] = []
        for event in batch:
            if isinstance(event, TextEmitted):
                events.append(chunks.text(event))
                continue
            ended.append(event)
            is_last = len(ended) == job.ask.num_sequences
            events.append(chunks.ended(event, _facts(job, ended) if is_last and not include_usage else None))
            if is_last and include_usage:
                usage = usage_body(total_usage(ended, job.ask.num_choices))
                events.append(chunks.usage(usage, _facts(job, ended)))
        return b"".join(events)


def _patience_s(ask: Ask) -> float:
    return max(0.0, remaining_s(ask.deadline_unix_ns)) + SEND_GRACE_S


async def _break_off(error: RequestError, send: Send) -> str:
    """The status is long sent: the error is the stream's last event, and no [DONE] follows."""
    await send({"type": "http.response.body", "body": error_event(error.body())})
    return "failed"


def _stream_headers(job: Job) -> list[tuple[bytes, bytes]]:
    return [
        (b"content-type", SSE_TYPE),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
        *job.headers,
    ]


def _facts(job: Job, ended: Sequence[SequenceEnded]) -> HeadraceFacts | None:
    """The first choice's timeline and placement, for a caller that asked."""
    if not job.caller.wants_timeline:
        return None
    first = min(ended, key=lambda end: end.choice)
    return facts_of(job.timeline.stamps_ns, first.placement)
