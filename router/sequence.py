"""The records of one sequence on its way through the router."""

from cluster.ids import ChainHash, RequestId, SessionId
from cluster.messages import (
    CatalogueRef,
    EmittedToken,
    FinishReason,
    Record,
    SamplingParams,
    TargetingParams,
    TargetingResult,
    Usage,
)
from cluster.placement.choose import HopPolicy, Placement
from cluster.placement.store import IndexHits


class PromptFacts(Record, frozen=True, kw_only=True):
    """What the index says of one prompt; shared by all choices of it."""

    block_hashes: tuple[ChainHash, ...]
    block_size_tokens: int
    hits: IndexHits


class SequenceAsk(Record, frozen=True, kw_only=True):
    """One sequence to have decoded somewhere."""

    request_id: RequestId
    choice: int
    """Its index in the answer."""
    prompt_token_ids: tuple[int, ...]
    facts: PromptFacts
    sampling: SamplingParams
    tenant: str
    session_id: SessionId | None
    deadline_unix_ns: int
    prefill_hop: HopPolicy | None = None
    """None: as configured."""
    targeting: TargetingParams | None = None
    campaign: str = ""
    speculate: bool = True
    phrases: CatalogueRef | None = None


class TextEmitted(Record, frozen=True):
    """Tokens `first_index`, ... of a choice's completion and the text they release (it may lag)."""

    choice: int
    first_index: int
    tokens: tuple[EmittedToken, ...]
    text: str


class SequenceEnded(Record, frozen=True, kw_only=True):
    """The last event of a sequence."""

    choice: int
    reason: FinishReason
    text: str
    """Text held back until now."""
    usage: Usage
    """`cached_tokens` counts what the prefill worker had cached too."""
    placement: Placement
    """Of the attempt that finished."""
    targeting: TargetingResult | None = None
    """Of a targeting request; None where its deadline passed with nothing found."""


SequenceEvent = TextEmitted | SequenceEnded


class Progress:
    """What the client already has of a sequence: carried from one attempt to the next."""

    __slots__ = ("emitted_token_ids", "num_placements")

    def __init__(self) -> None:
        self.emitted_token_ids: list[int] = []
        self.num_placements = 0
