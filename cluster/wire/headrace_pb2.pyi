from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class ChatMessages(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class InferenceRequest(_message.Message):
    __slots__ = ("model", "prompt", "chat", "token_ids", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "ignore_eos", "logprobs", "session_id", "user", "deadline_ms", "campaign", "speculation", "phrases")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    CAMPAIGN_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    PHRASES_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt: str
    chat: ChatMessages
    token_ids: TokenIds
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    ignore_eos: bool
    logprobs: int
    session_id: str
    user: str
    deadline_ms: int
    campaign: str
    speculation: bool
    phrases: str
    def __init__(self, model: _Optional[str] = ..., prompt: _Optional[str] = ..., chat: _Optional[_Union[ChatMessages, _Mapping]] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., ignore_eos: _Optional[bool] = ..., logprobs: _Optional[int] = ..., session_id: _Optional[str] = ..., user: _Optional[str] = ..., deadline_ms: _Optional[int] = ..., campaign: _Optional[str] = ..., speculation: _Optional[bool] = ..., phrases: _Optional[str] = ...) -> None: ...

class InferenceResponse(_message.Message):
    __slots__ = ("request_id", "first_index", "tokens", "text", "finish_reason", "usage")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    first_index: int
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    text: str
    finish_reason: str
    usage: Usage
    def __init__(self, request_id: _Optional[str] = ..., first_index: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ..., text: _Optional[str] = ..., finish_reason: _Optional[str] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ...) -> None: ...

class TargetingRequest(_message.Message):
    __slots__ = ("model", "context", "chat", "catalogue", "k", "beams", "scoring", "filter", "diversity", "seed", "deadline_ms", "session_id")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    CATALOGUE_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    BEAMS_FIELD_NUMBER: _ClassVar[int]
    SCORING_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    DIVERSITY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    model: str
    context: str
    chat: ChatMessages
    catalogue: str
    k: int
    beams: int
    scoring: str
    filter: _containers.RepeatedCompositeFieldContainer[TargetingCondition]
    diversity: float
    seed: int
    deadline_ms: int
    session_id: str
    def __init__(self, model: _Optional[str] = ..., context: _Optional[str] = ..., chat: _Optional[_Union[ChatMessages, _Mapping]] = ..., catalogue: _Optional[str] = ..., k: _Optional[int] = ..., beams: _Optional[int] = ..., scoring: _Optional[str] = ..., filter: _Optional[_Iterable[_Union[TargetingCondition, _Mapping]]] = ..., diversity: _Optional[float] = ..., seed: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., session_id: _Optional[str] = ...) -> None: ...

class TargetingResponse(_message.Message):
    __slots__ = ("request_id", "catalogue", "catalogue_version", "finish_reason", "result", "usage", "warning")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CATALOGUE_FIELD_NUMBER: _ClassVar[int]
    CATALOGUE_VERSION_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    WARNING_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    catalogue: str
    catalogue_version: int
    finish_reason: str
    result: TargetingResult
    usage: Usage
    warning: str
    def __init__(self, request_id: _Optional[str] = ..., catalogue: _Optional[str] = ..., catalogue_version: _Optional[int] = ..., finish_reason: _Optional[str] = ..., result: _Optional[_Union[TargetingResult, _Mapping]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., warning: _Optional[str] = ...) -> None: ...

class FetchCatalogueRequest(_message.Message):
    __slots__ = ("name", "version", "checksum")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    checksum: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., checksum: _Optional[str] = ...) -> None: ...

class CatalogueChunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "seed", "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "ignore_eos", "num_logprobs")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    seed: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    num_logprobs: int
    def __init__(self, max_tokens: _Optional[int] = ..., seed: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., num_logprobs: _Optional[int] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "cached_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("token_id", "logprob", "top_logprobs")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    top_logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top_logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class WorkerAddress(_message.Message):
    __slots__ = ("worker_id", "epoch", "grpc_address", "host_id")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    grpc_address: str
    host_id: str
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., grpc_address: _Optional[str] = ..., host_id: _Optional[str] = ...) -> None: ...

class DecodeCommand(_message.Message):
    __slots__ = ("hello", "generate", "cancel", "retry_handoff", "prefill_locally")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RETRY_HANDOFF_FIELD_NUMBER: _ClassVar[int]
    PREFILL_LOCALLY_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    generate: GenerateRequest
    cancel: CancelRequest
    retry_handoff: RetryHandoff
    prefill_locally: PrefillLocally
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., generate: _Optional[_Union[GenerateRequest, _Mapping]] = ..., cancel: _Optional[_Union[CancelRequest, _Mapping]] = ..., retry_handoff: _Optional[_Union[RetryHandoff, _Mapping]] = ..., prefill_locally: _Optional[_Union[PrefillLocally, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version", "model", "model_fingerprint", "router_id")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    model: str
    model_fingerprint: str
    router_id: str
    def __init__(self, protocol_version: _Optional[int] = ..., model: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., router_id: _Optional[str] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "prompt_token_ids", "sampling", "tenant", "session_id", "deadline_unix_ns", "handoff_id", "emitted_token_ids", "campaign", "speculate", "phrases", "targeting")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    EMITTED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CAMPAIGN_FIELD_NUMBER: _ClassVar[int]
    SPECULATE_FIELD_NUMBER: _ClassVar[int]
    PHRASES_FIELD_NUMBER: _ClassVar[int]
    TARGETING_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: Sampling
    tenant: str
    session_id: str
    deadline_unix_ns: int
    handoff_id: str
    emitted_token_ids: _containers.RepeatedScalarFieldContainer[int]
    campaign: str
    speculate: bool
    phrases: CatalogueRef
    targeting: TargetingParams
    def __init__(self, request_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., tenant: _Optional[str] = ..., session_id: _Optional[str] = ..., deadline_unix_ns: _Optional[int] = ..., handoff_id: _Optional[str] = ..., emitted_token_ids: _Optional[_Iterable[int]] = ..., campaign: _Optional[str] = ..., speculate: _Optional[bool] = ..., phrases: _Optional[_Union[CatalogueRef, _Mapping]] = ..., targeting: _Optional[_Union[TargetingParams, _Mapping]] = ...) -> None: ...

class CatalogueRef(_message.Message):
    __slots__ = ("name", "version", "checksum", "num_bytes", "path", "fetch_address")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    FETCH_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    checksum: str
    num_bytes: int
    path: str
    fetch_address: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., checksum: _Optional[str] = ..., num_bytes: _Optional[int] = ..., path: _Optional[str] = ..., fetch_address: _Optional[str] = ...) -> None: ...

class TextValues(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, values: _Optional[_Iterable[str]] = ...) -> None: ...

class TargetingCondition(_message.Message):
    __slots__ = ("attribute", "any_of", "at_least", "at_most")
    ATTRIBUTE_FIELD_NUMBER: _ClassVar[int]
    ANY_OF_FIELD_NUMBER: _ClassVar[int]
    AT_LEAST_FIELD_NUMBER: _ClassVar[int]
    AT_MOST_FIELD_NUMBER: _ClassVar[int]
    attribute: str
    any_of: TextValues
    at_least: float
    at_most: float
    def __init__(self, attribute: _Optional[str] = ..., any_of: _Optional[_Union[TextValues, _Mapping]] = ..., at_least: _Optional[float] = ..., at_most: _Optional[float] = ...) -> None: ...

class TargetingParams(_message.Message):
    __slots__ = ("catalogue", "k", "beams", "scoring", "where", "diversity", "noise_seed")
    CATALOGUE_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    BEAMS_FIELD_NUMBER: _ClassVar[int]
    SCORING_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    DIVERSITY_FIELD_NUMBER: _ClassVar[int]
    NOISE_SEED_FIELD_NUMBER: _ClassVar[int]
    catalogue: CatalogueRef
    k: int
    beams: int
    scoring: str
    where: _containers.RepeatedCompositeFieldContainer[TargetingCondition]
    diversity: float
    noise_seed: int
    def __init__(self, catalogue: _Optional[_Union[CatalogueRef, _Mapping]] = ..., k: _Optional[int] = ..., beams: _Optional[int] = ..., scoring: _Optional[str] = ..., where: _Optional[_Iterable[_Union[TargetingCondition, _Mapping]]] = ..., diversity: _Optional[float] = ..., noise_seed: _Optional[int] = ...) -> None: ...

class ScoredItem(_message.Message):
    __slots__ = ("rank", "item_id", "text", "logprob", "bid")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    BID_FIELD_NUMBER: _ClassVar[int]
    rank: int
    item_id: str
    text: str
    logprob: float
    bid: float
    def __init__(self, rank: _Optional[int] = ..., item_id: _Optional[str] = ..., text: _Optional[str] = ..., logprob: _Optional[float] = ..., bid: _Optional[float] = ...) -> None: ...

class TargetingResult(_message.Message):
    __slots__ = ("items", "is_complete", "decoding", "num_steps", "num_rows", "num_verified_items")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    IS_COMPLETE_FIELD_NUMBER: _ClassVar[int]
    DECODING_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_VERIFIED_ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[ScoredItem]
    is_complete: bool
    decoding: str
    num_steps: int
    num_rows: int
    num_verified_items: int
    def __init__(self, items: _Optional[_Iterable[_Union[ScoredItem, _Mapping]]] = ..., is_complete: _Optional[bool] = ..., decoding: _Optional[str] = ..., num_steps: _Optional[int] = ..., num_rows: _Optional[int] = ..., num_verified_items: _Optional[int] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class RetryHandoff(_message.Message):
    __slots__ = ("request_id", "handoff_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    handoff_id: str
    def __init__(self, request_id: _Optional[str] = ..., handoff_id: _Optional[str] = ...) -> None: ...

class PrefillLocally(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class DecodeEvents(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[DecodeEvent]
    def __init__(self, events: _Optional[_Iterable[_Union[DecodeEvent, _Mapping]]] = ...) -> None: ...

class DecodeEvent(_message.Message):
    __slots__ = ("request_id", "reserved", "tokens", "finished", "failed", "handoff_failed")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FAILED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    reserved: Reserved
    tokens: TokensEmitted
    finished: SequenceFinished
    failed: SequenceFailed
    handoff_failed: HandoffFailed
    def __init__(self, request_id: _Optional[str] = ..., reserved: _Optional[_Union[Reserved, _Mapping]] = ..., tokens: _Optional[_Union[TokensEmitted, _Mapping]] = ..., finished: _Optional[_Union[SequenceFinished, _Mapping]] = ..., failed: _Optional[_Union[SequenceFailed, _Mapping]] = ..., handoff_failed: _Optional[_Union[HandoffFailed, _Mapping]] = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("handoff_id", "first_token")
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    handoff_id: str
    first_token: int
    def __init__(self, handoff_id: _Optional[str] = ..., first_token: _Optional[int] = ...) -> None: ...

class TokensEmitted(_message.Message):
    __slots__ = ("first_index", "text", "token_ids", "tokens")
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    first_index: int
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    def __init__(self, first_index: _Optional[int] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ...) -> None: ...

class SequenceFinished(_message.Message):
    __slots__ = ("reason", "usage", "stamps_ns", "text", "stop_match", "targeting")
    class StampsNsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    STAMPS_NS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    STOP_MATCH_FIELD_NUMBER: _ClassVar[int]
    TARGETING_FIELD_NUMBER: _ClassVar[int]
    reason: str
    usage: Usage
    stamps_ns: _containers.ScalarMap[str, int]
    text: str
    stop_match: str
    targeting: TargetingResult
    def __init__(self, reason: _Optional[str] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., stamps_ns: _Optional[_Mapping[str, int]] = ..., text: _Optional[str] = ..., stop_match: _Optional[str] = ..., targeting: _Optional[_Union[TargetingResult, _Mapping]] = ...) -> None: ...

class SequenceFailed(_message.Message):
    __slots__ = ("code", "message", "is_retryable")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    IS_RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    is_retryable: bool
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., is_retryable: _Optional[bool] = ...) -> None: ...

class HandoffFailed(_message.Message):
    __slots__ = ("handoff_id", "message")
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    handoff_id: str
    message: str
    def __init__(self, handoff_id: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("request_id", "handoff_id", "prompt_token_ids", "first_token", "target", "layout_fingerprint", "tenant", "deadline_unix_ns")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    handoff_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    first_token: int
    target: WorkerAddress
    layout_fingerprint: str
    tenant: str
    deadline_unix_ns: int
    def __init__(self, request_id: _Optional[str] = ..., handoff_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., first_token: _Optional[int] = ..., target: _Optional[_Union[WorkerAddress, _Mapping]] = ..., layout_fingerprint: _Optional[str] = ..., tenant: _Optional[str] = ..., deadline_unix_ns: _Optional[int] = ...) -> None: ...

class PrefillResult(_message.Message):
    __slots__ = ("cached_tokens", "bytes_sent", "bytes_sent_before_forward_end", "transport", "stamps_ns")
    class StampsNsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_BEFORE_FORWARD_END_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    STAMPS_NS_FIELD_NUMBER: _ClassVar[int]
    cached_tokens: int
    bytes_sent: int
    bytes_sent_before_forward_end: int
    transport: str
    stamps_ns: _containers.ScalarMap[str, int]
    def __init__(self, cached_tokens: _Optional[int] = ..., bytes_sent: _Optional[int] = ..., bytes_sent_before_forward_end: _Optional[int] = ..., transport: _Optional[str] = ..., stamps_ns: _Optional[_Mapping[str, int]] = ...) -> None: ...

class CancelHandoffRequest(_message.Message):
    __slots__ = ("handoff_id",)
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    handoff_id: str
    def __init__(self, handoff_id: _Optional[str] = ...) -> None: ...

class CancelHandoffResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: str
    def __init__(self, state: _Optional[str] = ...) -> None: ...

class HandoffFrame(_message.Message):
    __slots__ = ("header", "chunk", "trailer")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    TRAILER_FIELD_NUMBER: _ClassVar[int]
    header: HandoffHeader
    chunk: KvChunk
    trailer: HandoffTrailer
    def __init__(self, header: _Optional[_Union[HandoffHeader, _Mapping]] = ..., chunk: _Optional[_Union[KvChunk, _Mapping]] = ..., trailer: _Optional[_Union[HandoffTrailer, _Mapping]] = ...) -> None: ...

class HandoffHeader(_message.Message):
    __slots__ = ("handoff_id", "epoch", "layout_fingerprint", "first_token", "num_tokens", "shared_memory", "nixl")
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    NIXL_FIELD_NUMBER: _ClassVar[int]
    handoff_id: str
    epoch: int
    layout_fingerprint: str
    first_token: int
    num_tokens: int
    shared_memory: SharedMemoryOffer
    nixl: NixlOffer
    def __init__(self, handoff_id: _Optional[str] = ..., epoch: _Optional[int] = ..., layout_fingerprint: _Optional[str] = ..., first_token: _Optional[int] = ..., num_tokens: _Optional[int] = ..., shared_memory: _Optional[_Union[SharedMemoryOffer, _Mapping]] = ..., nixl: _Optional[_Union[NixlOffer, _Mapping]] = ...) -> None: ...

class SharedMemoryOffer(_message.Message):
    __slots__ = ("pid", "fd", "num_bytes", "nonce")
    PID_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    pid: int
    fd: int
    num_bytes: int
    nonce: bytes
    def __init__(self, pid: _Optional[int] = ..., fd: _Optional[int] = ..., num_bytes: _Optional[int] = ..., nonce: _Optional[bytes] = ...) -> None: ...

class NixlOffer(_message.Message):
    __slots__ = ("version", "metadata", "metadata_checksum", "address", "num_bytes")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    METADATA_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    version: str
    metadata: bytes
    metadata_checksum: int
    address: int
    num_bytes: int
    def __init__(self, version: _Optional[str] = ..., metadata: _Optional[bytes] = ..., metadata_checksum: _Optional[int] = ..., address: _Optional[int] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class KvChunk(_message.Message):
    __slots__ = ("sequence_number", "layer", "first_token", "num_tokens", "data", "shared_memory_offset", "nixl_offset")
    SEQUENCE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_OFFSET_FIELD_NUMBER: _ClassVar[int]
    NIXL_OFFSET_FIELD_NUMBER: _ClassVar[int]
    sequence_number: int
    layer: int
    first_token: int
    num_tokens: int
    data: bytes
    shared_memory_offset: int
    nixl_offset: int
    def __init__(self, sequence_number: _Optional[int] = ..., layer: _Optional[int] = ..., first_token: _Optional[int] = ..., num_tokens: _Optional[int] = ..., data: _Optional[bytes] = ..., shared_memory_offset: _Optional[int] = ..., nixl_offset: _Optional[int] = ...) -> None: ...

class HandoffTrailer(_message.Message):
    __slots__ = ("num_chunks", "num_bytes", "valid_tokens", "checksum")
    NUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    VALID_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    num_chunks: int
    num_bytes: int
    valid_tokens: int
    checksum: int
    def __init__(self, num_chunks: _Optional[int] = ..., num_bytes: _Optional[int] = ..., valid_tokens: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class HandoffReply(_message.Message):
    __slots__ = ("accepted", "acknowledged", "rejected")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    accepted: HandoffAccepted
    acknowledged: HandoffAcknowledged
    rejected: HandoffRejected
    def __init__(self, accepted: _Optional[_Union[HandoffAccepted, _Mapping]] = ..., acknowledged: _Optional[_Union[HandoffAcknowledged, _Mapping]] = ..., rejected: _Optional[_Union[HandoffRejected, _Mapping]] = ...) -> None: ...

class HandoffAccepted(_message.Message):
    __slots__ = ("use_shared_memory", "use_nixl")
    USE_SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    USE_NIXL_FIELD_NUMBER: _ClassVar[int]
    use_shared_memory: bool
    use_nixl: bool
    def __init__(self, use_shared_memory: _Optional[bool] = ..., use_nixl: _Optional[bool] = ...) -> None: ...

class HandoffAcknowledged(_message.Message):
    __slots__ = ("num_bytes",)
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    def __init__(self, num_bytes: _Optional[int] = ...) -> None: ...

class HandoffRejected(_message.Message):
    __slots__ = ("code", "message", "may_still_read")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    MAY_STILL_READ_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    may_still_read: bool
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., may_still_read: _Optional[bool] = ...) -> None: ...

class MetricsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MetricsResponse(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...
