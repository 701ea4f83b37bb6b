"""Which requests are served: pure checks, shared by HTTP and gRPC, and the bound on those in flight.

Every check raises RequestError that names the field and what it may be.
"""

import contextlib
import hashlib
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar, cast

from cluster.config import RouterConfig
from cluster.ids import SessionId
from cluster.messages import CatalogueRef, Record, SamplingParams, TargetingParams
from cluster.metrics import RouterMetrics
from cluster.model_card import ModelCard
from cluster.placement.choose import HopPolicy
from router.errors import invalid, model_not_found, overloaded
from router.openai_api import MAX_CAMPAIGN_CHARS, MAX_DEADLINE_MS, MAX_PROMPTS, MAX_STOP_CHARS, MAX_STOPS

T = TypeVar("T", int, str)

UINT64_MASK = 2**64 - 1
MAX_SESSION_ID_CHARS = 128
_PRINTABLE = re.compile(r"[\x21-\x7e]{1,128}")
_DECIMAL = re.compile(r"[0-9]{1,10}")
TENANT_BYTES = 8


class Limits(Record, frozen=True, kw_only=True):
    """What bounds every request to this router."""

    model: str
    vocab_size: int
    max_context_tokens: int
    default_max_tokens: int
    max_inflight: int
    request_timeout_s: float


class Caller(Record, frozen=True, kw_only=True):
    """Who asks, and how: what HTTP headers and gRPC metadata both carry."""

    tenant: str = ""
    session_id: str | None = None
    deadline_ms: int | None = None
    campaign: str | None = None
    prefill_hop: HopPolicy | None = None
    """None: as configured."""
    wants_timeline: bool = False


class Ask(Record, frozen=True, kw_only=True):
    """A checked request: `len(prompts) * num_choices` sequences."""

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: tuple[int, ...]
    """By prompt."""
    num_choices: int
    sampling: SamplingParams
    """Of the first choice of the first prompt; `sequence_sampling` derives the others'."""
    deadline_unix_ns: int
    tenant: str
    session_id: SessionId | None
    prefill_hop: HopPolicy | None
    targeting: TargetingParams | None = None
    """Set: items of a catalogue are asked for, not text; one prompt, one choice."""
    campaign: str = ""
    speculate: bool = True
    phrases: CatalogueRef | None = None

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.num_choices


def limits_of(card: ModelCard, config: RouterConfig) -> Limits:
    return Limits(
        model=card.name,
        vocab_size=card.vocab_size,
        max_context_tokens=card.max_context_tokens,
        default_max_tokens=config.default_max_tokens,
        max_inflight=config.max_inflight_requests,
        request_timeout_s=config.request_timeout_s,
    )


def check_model(name: str, limits: Limits) -> None:
    if name != limits.model:
        raise model_not_found(name, limits.model)


def prompts_of(prompt: str | Sequence[int | str | list[int]]) -> list[str] | list[list[int]]:
    """OpenAI's four shapes of `prompt` as a list of texts or a list of token ids."""
    if isinstance(prompt, str):
        prompts: list[str] | list[list[int]] = [prompt]
    elif not prompt:
        prompts = []
    elif all(isinstance(item, int) for item in prompt):
        prompts = [cast(list[int], prompt)]
    elif all(isinstance(item, str) for item in prompt):
        prompts = cast(list[str], prompt)
    elif all(isinstance(item, list) for item in prompt):
        prompts = cast(list[list[int]], prompt)
    else:
        raise invalid("prompt", "`prompt` must be all texts, all token ids, or all arrays of token ids")
    if not prompts or not all(prompts):
        raise invalid(
            "prompt", "`prompt` must not be empty: at least one character or token id", code="empty"
        )
    if len(prompts) > MAX_PROMPTS:
        raise invalid("prompt", f"`prompt` holds {len(prompts)} prompts; 1 to {MAX_PROMPTS} are allowed")
    return prompts


def check_token_ids(token_ids: Sequence[int], limits: Limits, param: str) -> None:
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= limits.vocab_size):
        worst = min(token_ids) if min(token_ids) < 0 else max(token_ids)
        raise invalid(
            param,
            f"`{param}` holds token id {worst}; ids of this model are 0 to {limits.vocab_size - 1}",
            code="invalid_token_id",
        )


def max_tokens_for(num_prompt_tokens: int, asked: int | None, limits: Limits, param: str) -> int:
    """Tokens to generate behind a prompt; the default is whatever of `default_max_tokens` fits."""
    limit = limits.max_context_tokens
    if num_prompt_tokens == 0:
        raise invalid(param, f"`{param}` must not be empty: it has no token", code="empty")
    needed = num_prompt_tokens + (1 if asked is None else asked)
    if needed > limit:
        wanted = "at least 1 generated token" if asked is None else f"max_tokens {asked}"
        raise invalid(
            param if num_prompt_tokens >= limit else "max_tokens",
            f"`{param}` of {num_prompt_tokens} tokens and {wanted} make {needed}; "
            f"the model's limit is {limit}",
            code="context_length_exceeded",
        )
    return min(limits.default_max_tokens, limit - num_prompt_tokens) if asked is None else asked


def same_or_only(first_name: str, first: T | None, second_name: str, second: T | None) -> T | None:
    """The value of a setting that may be given in two places."""
    if first is not None and second is not None and first != second:
        raise invalid(
            first_name,
            f"`{first_name}` is {first} and `{second_name}` is {second}: give one, or the same value twice",
        )
    return second if first is None else first


def stops_of(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS or not all(1 <= len(text) <= MAX_STOP_CHARS for text in stops):
        raise invalid(
            "stop", f"`stop` must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters"
        )
    return stops


def concrete_seed(seed: int | None) -> int:
    """uint64: a negative seed wraps, none is drawn."""
    return secrets.randbits(64) if seed is None else seed & UINT64_MASK


def choice_seed(seed: int, choice: int) -> int:
    """The seed of choice `choice` of a request: a function of both; the first choice keeps the request's."""
    if choice == 0:
        return seed
    digest = hashlib.blake2b(choice.to_bytes(8, "little"), key=seed.to_bytes(8, "little"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def check_sequences(num_prompts: int, num_choices: int, limits: Limits) -> None:
    if num_prompts * num_choices > limits.max_inflight:
        raise invalid(
            "n",
            f"{num_prompts} prompts with `n` {num_choices} are {num_prompts * num_choices} sequences; "
            f"at most {limits.max_inflight} are served at once",
        )


def deadline_unix_ns(deadline_ms: int | None, received_unix_ns: int, limits: Limits) -> int:
    timeout_ms = limits.request_timeout_s * 1_000
    return received_unix_ns + round(min(timeout_ms, deadline_ms or timeout_ms) * 1_000_000)


def deadline_header(text: str | None, name: str) -> int | None:
    if text is None:
        return None
    if not _DECIMAL.fullmatch(text) or not 1 <= int(text) <= MAX_DEADLINE_MS:
        raise invalid(name, f"`{name}` must be an integer from 1 to {MAX_DEADLINE_MS} (milliseconds)")
    return int(text)


def session_of(text: str | None, name: str) -> str | None:
    if text is not None and not _PRINTABLE.fullmatch(text):
        raise invalid(
            name, f"`{name}` must be 1 to {MAX_SESSION_ID_CHARS} printable ASCII characters, no spaces"
        )
    return text


def campaign_of(text: str | None, name: str) -> str | None:
    if text is not None and not _PRINTABLE.fullmatch(text):
        raise invalid(
            name, f"`{name}` must be 1 to {MAX_CAMPAIGN_CHARS} printable ASCII characters, no spaces"
        )
    return text


def prefill_hop_of(text: str | None, name: str) -> HopPolicy | None:
    if text is None:
        return None
    try:
        return HopPolicy(text)
    except ValueError:
        raise invalid(name, f"`{name}` must be one of {', '.join(HopPolicy)}") from None


def tenant_of(authorization: str | None) -> str:
    """A tenant is the hash of its API key: never the key itself, which must not reach logs or Redis."""
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        return ""
    return hashlib.blake2b(key.strip().encode(errors="replace"), digest_size=TENANT_BYTES).hexdigest()


def tenant_session(tenant: str, session_id: str | None) -> SessionId | None:
    """The cluster-wide id: two tenants' sessions never meet."""
    return None if session_id is None else SessionId(f"{tenant}:{session_id}")


class InflightLimit:
    """Counts sequences being served; a request that would exceed the bound is refused at once."""

    def __init__(self, limit: int, metrics: RouterMetrics) -> None:
        self._limit = limit
        self._num_inflight = 0
        self._gauge = metrics.inflight

    @property
    def num_inflight(self) -> int:
        return self._num_inflight

    @contextlib.contextmanager
    def admit(self, num_sequences: int) -> Iterator[None]:
        if self._num_inflight + num_sequences > self._limit:
            raise overloaded(f"{self._num_inflight} sequences are being served, the limit is {self._limit}")
        self._count(num_sequences)
        try:
            yield
        finally:
            self._count(-num_sequences)

    def _count(self, change: int) -> None:
        self._num_inflight += change
        self._gauge.set(self._num_inflight)


def remaining_s(deadline: int) -> float:
    """Seconds until a deadline in Unix nanoseconds; below 0 once it has passed."""
    return (deadline - time.time_ns()) / 1e9
