"""OpenAI's response bodies: what whole answers are built of, and what the OpenAPI document shows."""

from typing import Literal

import msgspec

from cluster.messages import Usage
from cluster.placement.choose import Placement

FinishReasonText = Literal["stop", "length", "deadline"]
"""OpenAI's, and `deadline`: the request's time was up, the text is what there was."""


class Answer(msgspec.Struct, kw_only=True):
    """Base of all response bodies."""


class PromptTokensDetails(Answer, kw_only=True):
    cached_tokens: int


class UsageBody(Answer, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PlacementBody(Answer, kw_only=True):
    reason: str
    decode: str
    prefill: str | None


class HeadraceFacts(Answer, kw_only=True):
    """Sent when asked for by `x-headrace-timeline: 1`."""

    timeline: dict[str, int]
    """Nanoseconds since the Unix epoch by stage."""
    placement: PlacementBody


class WithFacts(Answer, kw_only=True):
    headrace: HeadraceFacts | msgspec.UnsetType = msgspec.UNSET


class CompletionLogprobs(Answer, kw_only=True):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(Answer, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReasonText | None


class CompletionBody(WithFacts, kw_only=True):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody | None = None


class ChatTopLogprob(Answer, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(Answer, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(Answer, kw_only=True):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatAnswerMessage(Answer, kw_only=True):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(Answer, kw_only=True):
    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonText


class ChatCompletionBody(WithFacts, kw_only=True):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody


class ChatDelta(Answer, kw_only=True):
    role: Literal["assistant"] | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET


class ChatChunkChoice(Answer, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonText | None


class ChatCompletionChunk(WithFacts, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageBody | msgspec.UnsetType | None = msgspec.UNSET


class ModelBody(Answer, kw_only=True):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelListBody(Answer, kw_only=True):
    object: Literal["list"]
    data: list[ModelBody]


class HealthBody(Answer, kw_only=True):
    status: Literal["ok"]


class ReadyBody(Answer, kw_only=True):
    status: Literal["ready", "not_ready"]
    decode_workers: int
    prefill_workers: int
    reason: str | None = None


class ErrorFacts(Answer, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Answer, kw_only=True):
    error: ErrorFacts


def usage_body(usage: Usage) -> UsageBody:
    return UsageBody(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
    )


def facts_of(stamps_ns: dict[str, int], placement: Placement) -> HeadraceFacts:
    return HeadraceFacts(
        timeline=stamps_ns,
        placement=PlacementBody(
            reason=placement.reason.value,
            decode=placement.decode.worker_id,
            prefill=placement.prefill.worker_id if placement.prefill else None,
        ),
    )
