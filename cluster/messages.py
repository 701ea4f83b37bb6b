"""The records that cross a boundary inside the cluster. `wire.conversions` maps them to protobuf."""

from enum import StrEnum
from typing import Literal

import msgspec

from cluster.ids import ChainHash, Epoch, HandoffId, RequestId, SessionId, WorkerId

PROTOCOL_VERSION = 1

Role = Literal["prefill", "decode"]


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"


class FailureCode(StrEnum):
    """Why a worker could not serve a request; `is_retryable` on the failure says if elsewhere may."""

    INVALID = "invalid"
    OVERLOADED = "overloaded"
    VERSION_SKEW = "version_skew"
    INTERNAL = "internal"
    UNAVAILABLE = "unavailable"


class HandoffCancelState(StrEnum):
    """What a cancel found. Only `not_found`, `already_complete` and `cancelled_before_advertise`
    mean that the sender may free at once; in flight, it frees when the transfer call ends."""

    NOT_FOUND = "not_found"
    ALREADY_COMPLETE = "already_complete"
    CANCELLED_BEFORE_ADVERTISE = "cancelled_before_advertise"
    CANCEL_REQUESTED_IN_FLIGHT = "cancel_requested_in_flight"
    BACKEND_UNHEALTHY = "backend_unhealthy"
    NOT_CANCELLABLE = "not_cancellable"


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all records: frozen, keyword-only, cheap to build."""


class SamplingParams(Record, frozen=True, kw_only=True):
    """Everything, beside the prefix and its position, that decides a sampled token."""

    max_tokens: int
    seed: int
    """uint64. Always concrete: the router draws one where the user gave none."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is no limit."""
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int | None = None
    """None: no logprobs. 0: the chosen token's alone. n: also the n likeliest."""


class CatalogueRef(Record, frozen=True, kw_only=True):
    """One compiled version of a catalogue, and where a worker finds it."""

    name: str
    version: int
    checksum: str
    """Of the compiled file: what local caches are keyed by."""
    num_bytes: int
    path: str
    """On the machine that compiled it; read in place where a worker sees the same file."""
    fetch_address: str = ""
    """`host:port` of whoever serves the file by gRPC to workers that do not."""


class Condition(Record, frozen=True, kw_only=True):
    """What an item's attribute must be; an item that lacks the attribute fails it."""

    attribute: str
    any_of: tuple[str, ...] | None = None
    """As text; None: not asked."""
    at_least: float | None = None
    at_most: float | None = None


class TargetingParams(Record, frozen=True, kw_only=True):
    """Instead of text: the `k` items of a catalogue that are likeliest after the prompt."""

    catalogue: CatalogueRef
    k: int
    beams: int = 20
    scoring: Literal["vocabulary", "catalogue"] = "vocabulary"
    """`vocabulary`: log-probabilities over all tokens. `catalogue`: over those that go on within the
    catalogue, for which the LM head computes nothing else."""
    where: tuple[Condition, ...] = ()
    """Of the items that are asked for; all must hold."""
    diversity: float = 0.0
    """0: none. Else each item's score is lowered by so much a better item that begins with the same token."""
    noise_seed: int | None = None
    """Set: stochastic beams, Gumbel noise of this seed on every score: k items drawn without replacement."""


class ScoredItem(Record, frozen=True, kw_only=True):
    rank: int
    """From 1, the likeliest."""
    item_id: str
    text: str
    logprob: float
    bid: float | None = None


Decoding = Literal["none", "stepwise", "best_first", "parallel"]
"""Of a search: nothing ran, round by round, best nodes first, or all remaining paths at once in the end."""


class TargetingResult(Record, frozen=True, kw_only=True):
    items: tuple[ScoredItem, ...]
    is_complete: bool
    """False: what was found by the deadline; better items may not have been reached."""
    decoding: Decoding
    num_steps: int
    num_rows: int
    num_verified_items: int
    """Items whose whole path was scored."""


class GenerateRequest(Record, frozen=True, kw_only=True):
    """One sequence to decode, as the router hands it to a decode worker."""

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    tenant: str = ""
    session_id: SessionId | None = None
    deadline_unix_ns: int | None = None
    handoff_id: HandoffId | None = None
    """Set: reserve blocks and wait for this hand-off. None: run the prompt as a chain of rows."""
    emitted_token_ids: tuple[int, ...] = ()
    """Tokens a client already has, from before a failover: forced, never emitted again."""
    targeting: TargetingParams | None = None
    """Set: nothing is emitted; the answer comes with SequenceFinished."""
    campaign: str = ""
    """Requests of a tenant that name the same one are expected to say similar things."""
    speculate: bool = True
    """False: no drafts for it, and none learned from it."""
    phrases: CatalogueRef | None = None
    """What it may say: drafts are made of its items, too, once a worker has it. Nobody waits for it."""


class TokenLogprob(Record, frozen=True, kw_only=True):
    token_id: int
    logprob: float


class EmittedToken(Record, frozen=True, kw_only=True):
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


class Usage(Record, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV the decode worker already held."""


class Reserved(Record, frozen=True, kw_only=True):
    """The decode worker holds blocks for the whole prompt and waits for `handoff_id`."""

    request_id: RequestId
    handoff_id: HandoffId
    first_token: int
    """Prompt tokens [0, first_token) are cached here; the hand-off brings [first_token, prompt - 1)."""


class TokensEmitted(Record, frozen=True, kw_only=True):
    """Tokens `first_index`, `first_index + 1`, ... of the completion, and the text they release.

    Text may lag tokens (a partial character, a possible start of a stop string), never lead them.
    """

    request_id: RequestId
    first_index: int
    tokens: tuple[EmittedToken, ...]
    text: str


class SequenceFinished(Record, frozen=True, kw_only=True):
    request_id: RequestId
    reason: FinishReason
    usage: Usage
    stamps_ns: dict[str, int]
    text: str = ""
    """Text held back until now."""
    stop_match: str | None = None
    targeting: TargetingResult | None = None


class SequenceFailed(Record, frozen=True, kw_only=True):
    request_id: RequestId
    code: FailureCode
    message: str
    is_retryable: bool


class HandoffFailed(Record, frozen=True, kw_only=True):
    """The hand-off was rejected or timed out; the reservation stands and waits for a retry."""

    request_id: RequestId
    handoff_id: HandoffId
    message: str


DecodeEvent = Reserved | TokensEmitted | SequenceFinished | SequenceFailed | HandoffFailed


class WorkerAddress(Record, frozen=True, kw_only=True):
    """Where a worker listens, and what tells whether it shares our host's memory."""

    worker_id: WorkerId
    epoch: Epoch
    grpc_address: str
    """`host:port`."""
    host_id: str
    """Equal on two workers when they run under one kernel (`transfer.host_id`)."""


class PrefillRequest(Record, frozen=True, kw_only=True):
    """Compute KV of prompt tokens [0, num_tokens) and hand [first_token, num_tokens) to `target`."""

    request_id: RequestId
    handoff_id: HandoffId
    prompt_token_ids: tuple[int, ...]
    """The tokens whose KV is wanted: the prompt without its last token."""
    first_token: int
    target: WorkerAddress
    layout_fingerprint: str
    tenant: str = ""
    deadline_unix_ns: int | None = None


class PrefillResult(Record, frozen=True, kw_only=True):
    cached_tokens: int
    """Of the tokens asked for, those the prefill worker found in its own prefix cache."""
    bytes_sent: int
    bytes_sent_before_forward_end: int
    transport: str
    stamps_ns: dict[str, int]


class StepCost(Record, frozen=True, kw_only=True):
    rows: int
    ms: float


class WorkerStatus(Record, frozen=True, kw_only=True):
    """What a worker publishes about itself with each lease renewal."""

    queued_requests: int = 0
    running_requests: int = 0
    queued_tokens: int = 0
    """Prompt tokens accepted but not yet computed."""
    free_kv_tokens: int = 0
    total_kv_tokens: int = 0
    step_table: tuple[StepCost, ...] = ()
    """Decode: measured milliseconds a step by row bucket. Prefill: by tokens in a step."""
    is_accepting: bool = True


class WorkerRecord(Record, frozen=True, kw_only=True):
    """A registered worker: identity, what it serves, and its latest status."""

    address: WorkerAddress
    role: Role
    model: str
    protocol_version: int
    layout_fingerprint: str
    block_size_tokens: int
    status: WorkerStatus


class SessionRecord(Record, frozen=True, kw_only=True):
    """Where a session's KV was last, and how much of it."""

    worker_id: WorkerId
    epoch: Epoch
    num_tokens: int
    last_hash: ChainHash | None
