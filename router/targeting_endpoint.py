"""POST /v1/targeting: a body in, the items of a catalogue out."""

import asyncio
import time

import msgspec
from starlette.types import Receive, Scope, Send

from cluster.ids import RequestId, new_request_id
from cluster.metrics import RouterMetrics
from cluster.timeline import Stage, Timeline
from router.admission import Caller, Limits, check_model, remaining_s
from router.answers import chat_message
from router.errors import RequestError
from router.http import (
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
from router.openai_answers import facts_of, usage_body
from router.request_body import BodyDecoder
from router.targeting import Selection, Targeting, TargetingFields, conditions_of
from router.targeting_api import CatalogueVersionBody, TargetedItem, TargetingBody, TargetingRequest

ROUTE = "targeting"
ID_PREFIX = "tgt-"
SELECT_GRACE_S = 30.0
"""Past its deadline a request is given up: the dispatcher answers long before."""
STAGES: dict[str, tuple[Stage, Stage]] = {
    "tokenize": (Stage.VALIDATED, Stage.TOKENIZED),
    "place": (Stage.TOKENIZED, Stage.PLACED),
    "prefill": (Stage.PREFILL_STARTED, Stage.PREFILL_FINISHED),
    "queue": (Stage.DISPATCHED, Stage.FIRST_STEP_STARTED),
    "search": (Stage.FIRST_STEP_STARTED, Stage.FINISHED),
    "total": (Stage.RECEIVED, Stage.FINISHED),
}

_decoder = BodyDecoder(TargetingRequest)


class TargetingEndpoint:
    """An ASGI application."""

    def __init__(
        self, targeting: Targeting, limits: Limits, metrics: RouterMetrics, *, max_body_bytes: int
    ) -> None:
        self._targeting = targeting
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
        self._metrics.requests.labels(ROUTE, outcome).inc()

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
        request = _decoder.decode(body)
        check_model(request.model, self._limits)
        caller = caller_of(headers)
        fields = fields_of(request)
        timeline.stamp(Stage.VALIDATED)
        request_id = new_request_id()
        async with ClientWatch(receive) as client:
            catalogue, ask = await self._targeting.ask(fields, caller, timeline.stamps_ns[Stage.RECEIVED])
            timeline.stamp(Stage.TOKENIZED)
            patience_s = max(0.0, remaining_s(ask.deadline_unix_ns)) + SELECT_GRACE_S
            async with asyncio.timeout(patience_s):
                selection = await self._targeting.select(request_id, catalogue, ask, timeline)
            answer = answer_body(request.model, request_id, selection, timeline, caller)
            client.answered()
        await respond(send, 200, msgspec.json.encode(answer), response_headers)
        return selection.ended.reason.value


def fields_of(request: TargetingRequest) -> TargetingFields:
    """Raises RequestError."""
    messages = request.messages
    return TargetingFields(
        catalogue=request.catalogue,
        context=request.context,
        messages=None if messages is None else tuple(chat_message(message) for message in messages),
        k=request.k,
        beams=request.beams,
        scoring=request.scoring,
        where=conditions_of(request.filter),
        diversity=request.diversity,
        seed=request.seed,
        deadline_ms=request.deadline_ms,
    )


def answer_body(
    model: str, request_id: RequestId, selection: Selection, timeline: Timeline, caller: Caller
) -> TargetingBody:
    result, ended = selection.result, selection.ended
    return TargetingBody(
        id=ID_PREFIX + request_id.removeprefix("req-"),
        object="targeting.result",
        created=int(time.time()),
        model=model,
        catalogue=CatalogueVersionBody(
            name=selection.catalogue.ref.name, version=selection.catalogue.ref.version
        ),
        items=[
            TargetedItem(rank=item.rank, id=item.item_id, text=item.text, logprob=item.logprob, bid=item.bid)
            for item in result.items
        ],
        finish_reason="deadline" if selection.is_cut_off else "stop",
        decoding=result.decoding,
        steps=result.num_steps,
        rows=result.num_rows,
        verified_items=result.num_verified_items,
        usage=usage_body(ended.usage),
        timings_ms=stage_ms(timeline),
        warning=selection.warning or msgspec.UNSET,
        headrace=facts_of(timeline.stamps_ns, ended.placement) if caller.wants_timeline else msgspec.UNSET,
    )


def stage_ms(timeline: Timeline) -> dict[str, float]:
    """Of the stages that the request went through."""
    spans = {name: timeline.between_us(start, end) for name, (start, end) in STAGES.items()}
    return {name: round(span_us / 1e3, 3) for name, span_us in spans.items() if span_us is not None}
