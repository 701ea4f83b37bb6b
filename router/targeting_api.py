"""The targeting API's bodies: what may be asked of a catalogue, and what is answered.

Strict like `openai_api`: these structs validate, and the served OpenAPI document is generated from them.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from cluster.messages import Decoding
from cluster.targeting_limits import (
    MAX_ATTRIBUTE_CHARS,
    MAX_BEAMS,
    MAX_CONDITION_VALUES,
    MAX_CONDITIONS,
    MAX_DIVERSITY,
)
from router.catalogue_names import CatalogueName
from router.openai_answers import Answer, ErrorFacts, UsageBody, WithFacts
from router.openai_api import MAX_MESSAGES, Body, DeadlineMs, Message, Seed, User

DEFAULT_K = 20
DEFAULT_BEAMS = 20

K = Annotated[int, Meta(ge=1, le=MAX_BEAMS, description=f"Items wanted; default {DEFAULT_K}")]
Beams = Annotated[
    int,
    Meta(ge=1, le=MAX_BEAMS, description=f"At least `k`; default the greater of `k` and {DEFAULT_BEAMS}"),
]
Scoring = Annotated[
    Literal["vocabulary", "catalogue"],
    Meta(
        description="`vocabulary`, the default: log-probabilities over all tokens. `catalogue`: over those "
        "that go on within the catalogue"
    ),
]
Diversity = Annotated[
    float,
    Meta(
        ge=0,
        le=MAX_DIVERSITY,
        description="An item's score is lowered by this for each better one that begins with the same token",
    ),
]
NoiseSeed = Annotated[
    Seed, Meta(description="Draws items without replacement by their probability instead of the likeliest")
]
AttributeText = Annotated[str, Meta(max_length=MAX_ATTRIBUTE_CHARS)]


class AttributeRange(Body, frozen=True, kw_only=True):
    """Both ends count."""

    min: float | None = None
    max: float | None = None


AttributeFilter = (
    AttributeText
    | bool
    | int
    | float
    | Annotated[list[AttributeText | bool | int | float], Meta(max_length=MAX_CONDITION_VALUES)]
    | AttributeRange
)
Filter = Annotated[
    dict[str, AttributeFilter],
    Meta(
        max_length=MAX_CONDITIONS,
        description="By attribute: a value, a list of values, or a range; an item must pass all",
    ),
]


class TargetingRequest(Body, frozen=True, kw_only=True):
    """POST /v1/targeting."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    catalogue: CatalogueName
    context: Annotated[str, Meta(min_length=1, description="Text; or else give `messages`")] | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    k: K | None = None
    beams: Beams | None = None
    scoring: Scoring | None = None
    filter: Filter | None = None
    deadline_ms: DeadlineMs | None = None
    diversity: Diversity | None = None
    seed: NoiseSeed | None = None
    user: User | None = None


class CatalogueVersionBody(Answer, kw_only=True):
    name: str
    version: int


class TargetedItem(Answer, kw_only=True):
    rank: int
    id: str
    text: str
    logprob: float
    bid: float | None


class TargetingBody(WithFacts, kw_only=True):
    id: str
    object: Literal["targeting.result"]
    created: int
    model: str
    catalogue: CatalogueVersionBody
    items: list[TargetedItem]
    finish_reason: Literal["stop", "deadline"]
    """`deadline`: what was found by then; better items may not have been reached."""
    decoding: Decoding
    steps: int
    rows: int
    verified_items: int
    usage: UsageBody
    timings_ms: dict[str, float]
    warning: str | msgspec.UnsetType = msgspec.UNSET


class UploadFault(Answer, kw_only=True):
    line: int
    message: str


class UploadProgress(Answer, kw_only=True):
    """Of an upload that is under way, while the version before it serves."""

    phase: str
    done: int
    total: int
    """0 where it is not known."""


class CatalogueBody(Answer, kw_only=True):
    name: str
    object: Literal["catalogue"]
    state: Literal["ready", "compiling"]
    version: int | None
    """None: the first version is still being compiled."""
    items: int
    nodes: int
    bytes: int
    attributes: list[str]
    checksum: str | None
    created: int | None
    progress: UploadProgress | None


class CatalogueListBody(Answer, kw_only=True):
    object: Literal["list"]
    data: list[CatalogueBody]


class CatalogueUploadBody(Answer, kw_only=True):
    name: str
    object: Literal["catalogue.upload"]
    version: int
    items: int
    tokens: int
    nodes: int
    bytes: int
    num_faults: int
    """Lines left out, of which `faults` shows the first."""
    faults: list[UploadFault]
    timings_ms: dict[str, float]


class CatalogueUploadErrorBody(Answer, kw_only=True):
    """Why an upload was refused: an error as of all endpoints, and the lines at fault."""

    error: ErrorFacts
    num_faults: int | msgspec.UnsetType = msgspec.UNSET
    faults: list[UploadFault] | msgspec.UnsetType = msgspec.UNSET


class CatalogueDeletedBody(Answer, kw_only=True):
    name: str
    object: Literal["catalogue"]
    deleted: bool
