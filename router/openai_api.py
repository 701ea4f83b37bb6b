"""OpenAI's request bodies as they are accepted here: strict types, every range written once.

These structs validate, and the served OpenAPI document is generated from them. OpenAI's fields that
nothing here implements are listed as `Unimplemented*`, accepted at the value that asks for nothing.
`null` is always the same as leaving the field out.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from router.catalogue_names import CatalogueName

MAX_CHOICES = 16
MAX_PROMPTS = 16
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_MESSAGES = 4096
MAX_CONTENT_PARTS = 256
MAX_TOP_K = 1_048_576
MAX_TOKENS = 2**31 - 1
MAX_DEADLINE_MS = 3_600_000
MAX_CAMPAIGN_CHARS = 128
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

MaxTokens = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, le=MAX_TOP_K, description="0 and -1: no limit")]
MinP = Annotated[float, Meta(ge=0, le=1)]
NumChoices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
Stop = StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)]
Seed = Annotated[int, Meta(ge=INT64_MIN, le=INT64_MAX)]
DeadlineMs = Annotated[
    int,
    Meta(
        ge=1,
        le=MAX_DEADLINE_MS,
        description="Milliseconds from arrival; then the text so far, with finish_reason `deadline`",
    ),
]
Campaign = Annotated[
    str,
    Meta(
        max_length=MAX_CAMPAIGN_CHARS,
        description="Requests that name the same one are expected to say similar things: drafts are learned "
        "from them",
    ),
]
Speculation = Annotated[
    bool,
    Meta(description="false: no drafts. They change how fast tokens come, never which; the default is true"),
]
Phrases = Annotated[
    CatalogueName,
    Meta(description="A catalogue of phrases that the answer may hold: drafts are made of them"),
]
User = Annotated[str, Meta(max_length=512)]
NumLogprobs = Annotated[int, Meta(ge=0, le=20)]
Role = Literal["system", "developer", "user", "assistant"]
Off = Annotated[float, Meta(ge=0, le=0)]
Nothing = Annotated[list[Any], Meta(max_length=0)]
NoEntries = Annotated[dict[str, Any], Meta(max_length=0)]

# The type system knows one kind of array at a time: `admission.prompts_of` checks for one of OpenAI's
# four shapes, and the OpenAPI document describes them by hand.
Prompt = Annotated[str, Meta(min_length=1)] | Annotated[list[int | str | list[int]], Meta(min_length=1)]


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything a user may send."""


class StreamOptions(Body, frozen=True, kw_only=True):
    include_usage: bool | None = None
    include_obfuscation: Annotated[bool, Meta(extra_json_schema={"enum": [False]})] | None = None


class ResponseFormat(Body, frozen=True, kw_only=True):
    type: Literal["text"]


class CommonFields(Body, frozen=True, kw_only=True):
    """What both completion requests hold."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    max_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    n: NumChoices | None = None
    stop: Stop | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    user: User | None = None
    deadline_ms: DeadlineMs | None = None
    campaign: Campaign | None = None
    speculation: Speculation | None = None
    phrases: Phrases | None = None

    # Accepted at the value that asks for nothing.
    frequency_penalty: Off | None = None
    presence_penalty: Off | None = None
    logit_bias: NoEntries | None = None


class CompletionRequest(CommonFields, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: Prompt
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None

    echo: Annotated[bool, Meta(extra_json_schema={"enum": [False]})] | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES, description="Must equal `n`")] | None = None
    suffix: Annotated[str, Meta(max_length=0)] | None = None


class TextPart(Body, frozen=True, kw_only=True):
    type: Literal["text"]
    text: str


class Message(Body, frozen=True, kw_only=True):
    role: Role
    content: str | Annotated[list[TextPart], Meta(min_length=1, max_length=MAX_CONTENT_PARTS)]

    # What OpenAI's client writes beside an assistant's answer when the answer is sent back.
    name: None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing | None = None
    annotations: Nothing | None = None


class ChatCompletionRequest(CommonFields, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20, description="Needs `logprobs`: true")] | None = None

    audio: None = None
    function_call: Literal["none"] | None = None
    functions: Nothing | None = None
    metadata: NoEntries | None = None
    modalities: Annotated[list[Literal["text"]], Meta(min_length=1, max_length=1)] | None = None
    moderation: None = None
    parallel_tool_calls: bool | None = None
    prediction: None = None
    prompt_cache_key: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None
    reasoning_effort: Literal["none"] | None = None
    response_format: ResponseFormat | None = None
    safety_identifier: User | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Annotated[bool, Meta(extra_json_schema={"enum": [False]})] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    tools: Nothing | None = None
    verbosity: None = None
    web_search_options: None = None


MUST_BE_FALSE = ("echo", "store")
"""Booleans that no struct annotation can pin down."""
