"""`headrace.v1.Inference`: the same requests, checks and answers as over HTTP, by gRPC."""

import contextlib
import logging
import math
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import grpc.aio

from cluster.ids import RequestId, new_request_id
from cluster.metrics import RouterMetrics
from cluster.timeline import Stage, Timeline
from cluster.wire import headrace_pb2 as pb
from cluster.wire.conversions import token_to_proto, usage_to_proto
from cluster.wire.headrace_pb2_grpc import InferenceServicer
from router.admission import Ask, Limits, check_model, check_token_ids
from router.asks import SamplingAsk, build_ask
from router.catalogues import Catalogues
from router.errors import RequestError, internal, invalid
from router.generation import Generation
from router.grpc_calls import abort, chat_messages, metadata_of, session_metadata
from router.http import caller_of
from router.openai_api import (
    Body,
    Campaign,
    DeadlineMs,
    MaxTokens,
    MinP,
    NumLogprobs,
    Phrases,
    Stop,
    Temperature,
    TopK,
    TopP,
    User,
)
from router.request_body import BodyDecoder
from router.sequence import SequenceEvent, TextEmitted
from router.tokenizer import PromptEncoder

ROUTE = "grpc"
OPTIONAL_NUMBERS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "logprobs", "deadline_ms")
FLOAT32_DIGITS = 7

_log = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[pb.InferenceRequest, pb.InferenceResponse]


class InferenceFields(Body, frozen=True, kw_only=True):
    """The fields of InferenceRequest that HTTP has too, under the same ranges."""

    max_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    logprobs: NumLogprobs | None = None
    deadline_ms: DeadlineMs | None = None
    campaign: Campaign | None = None
    phrases: Phrases | None = None
    stop: Stop | None = None
    user: User | None = None


_fields = BodyDecoder(InferenceFields)


def sampling_fields(request: pb.InferenceRequest) -> SamplingAsk:
    """Raises RequestError."""
    given: dict[str, Any] = {
        name: _plain(getattr(request, name)) for name in OPTIONAL_NUMBERS if request.HasField(name)
    }
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise invalid(name, f"`{name}` must be a finite number, got {value}", code="invalid_value")
    fields = _fields.convert(
        {
            **given,
            "stop": list(request.stop),
            "user": request.user,
            "campaign": request.campaign,
            "phrases": request.phrases or None,
        }
    )
    return SamplingAsk(
        max_tokens=fields.max_tokens,
        temperature=fields.temperature,
        top_p=fields.top_p,
        top_k=fields.top_k,
        min_p=fields.min_p,
        stop=fields.stop,
        seed=request.seed if request.HasField("seed") else None,
        ignore_eos=request.ignore_eos,
        num_logprobs=fields.logprobs,
        deadline_ms=fields.deadline_ms,
        campaign=fields.campaign or None,
        speculation=request.speculation if request.HasField("speculation") else None,
        phrases=fields.phrases,
    )


def _plain(value: int | float) -> int | float:
    """A float32 as the decimal that was meant: 0.8, not 0.800000012, so that both protocols sample alike."""
    return float(f"{value:.{FLOAT32_DIGITS}g}") if isinstance(value, float) else value


class InferenceService(InferenceServicer):
    def __init__(
        self,
        encoder: PromptEncoder,
        generation: Generation,
        catalogues: Catalogues,
        limits: Limits,
        metrics: RouterMetrics,
    ) -> None:
        self._encoder = encoder
        self._generation = generation
        self._catalogues = catalogues
        self._limits = limits
        self._metrics = metrics

    async def Generate(  # noqa: N802 - the name in the proto file
        self, request: pb.InferenceRequest, context: Context
    ) -> AsyncGenerator[pb.InferenceResponse, None]:
        timeline = Timeline()
        timeline.stamp(Stage.RECEIVED)
        request_id = new_request_id()
        outcome = "cancelled"
        try:
            ask = await self._ask(request, metadata_of(context), timeline)
            async with contextlib.aclosing(self._generation.run(request_id, ask, timeline)) as batches:
                async for batch in batches:
                    for event in batch:
                        if not isinstance(event, TextEmitted):
                            outcome = event.reason.value
                        yield _response(request_id, event)
        except RequestError as error:
            outcome = "rejected" if error.status < 500 else "failed"
            await abort(context, error)
        except Exception:  # noqa: BLE001 - a defect of ours is told in the same shape as any error
            outcome = "failed"
            _log.exception("%s failed", request_id)
            await abort(context, internal())
        finally:
            self._metrics.requests.labels(ROUTE, outcome).inc()

    async def _ask(self, request: pb.InferenceRequest, metadata: dict[str, str], timeline: Timeline) -> Ask:
        check_model(request.model, self._limits)
        caller = caller_of({**metadata, **session_metadata(request.session_id)})
        wanted = sampling_fields(request)
        timeline.stamp(Stage.VALIDATED)
        param, prompt = await self._prompt(request)
        phrases = await self._catalogues.phrases(caller.tenant, wanted.phrases)
        timeline.stamp(Stage.TOKENIZED)
        return build_ask(
            [prompt],
            wanted,
            caller,
            self._limits,
            received_unix_ns=timeline.stamps_ns[Stage.RECEIVED],
            param=param,
            phrases=phrases,
        )

    async def _prompt(self, request: pb.InferenceRequest) -> tuple[str, list[int]]:
        """The token ids, and the field they came from."""
        match request.WhichOneof("input"):
            case "prompt":
                if not request.prompt:
                    raise invalid("prompt", "`prompt` must not be empty", code="empty")
                return "prompt", await self._encoder.text(request.prompt)
            case "token_ids":
                token_ids = list(request.token_ids.ids)
                check_token_ids(token_ids, self._limits, "token_ids")
                return "token_ids", token_ids
            case "chat":
                return "chat", await self._encoder.chat(chat_messages(request.chat))
            case _:
                raise invalid(
                    "prompt", "one of `prompt`, `chat` and `token_ids` is required", code="missing_field"
                )


def _response(request_id: RequestId, event: SequenceEvent) -> pb.InferenceResponse:
    if isinstance(event, TextEmitted):
        return pb.InferenceResponse(
            request_id=request_id,
            first_index=event.first_index,
            tokens=[token_to_proto(token) for token in event.tokens],
            text=event.text,
        )
    return pb.InferenceResponse(
        request_id=request_id,
        first_index=event.usage.completion_tokens,
        text=event.text,
        finish_reason=event.reason.value,
        usage=usage_to_proto(event.usage),
    )
