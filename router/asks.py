"""A validated body and what its caller's headers say, as an Ask: the same for HTTP and gRPC."""

from collections.abc import Sequence

from cluster.messages import CatalogueRef, Record, SamplingParams
from router.admission import (
    Ask,
    Caller,
    Limits,
    check_sequences,
    concrete_seed,
    deadline_unix_ns,
    max_tokens_for,
    same_or_only,
    stops_of,
    tenant_session,
)


class SamplingAsk(Record, frozen=True, kw_only=True):
    """Sampling as a user may give it: None is the default."""

    max_tokens: int | None = None
    num_choices: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: str | Sequence[str] | None = None
    seed: int | None = None
    ignore_eos: bool | None = None
    num_logprobs: int | None = None
    deadline_ms: int | None = None
    campaign: str | None = None
    speculation: bool | None = None
    phrases: str | None = None
    """A catalogue's name."""


def build_ask(
    prompts: Sequence[Sequence[int]],
    wanted: SamplingAsk,
    caller: Caller,
    limits: Limits,
    *,
    received_unix_ns: int,
    param: str,
    phrases: CatalogueRef | None = None,
) -> Ask:
    """`param` names where the prompts came from; `phrases`: what `wanted` names. Raises RequestError."""
    num_choices = wanted.num_choices or 1
    check_sequences(len(prompts), num_choices, limits)
    max_tokens = tuple(max_tokens_for(len(prompt), wanted.max_tokens, limits, param) for prompt in prompts)
    deadline_ms = same_or_only(
        "deadline_ms", wanted.deadline_ms, "x-headrace-deadline-ms", caller.deadline_ms
    )
    campaign = same_or_only("campaign", wanted.campaign, "x-headrace-campaign", caller.campaign)
    return Ask(
        prompts=tuple(tuple(prompt) for prompt in prompts),
        max_tokens=max_tokens,
        num_choices=num_choices,
        sampling=sampling_of(wanted, max_tokens[0]),
        deadline_unix_ns=deadline_unix_ns(deadline_ms, received_unix_ns, limits),
        tenant=caller.tenant,
        session_id=tenant_session(caller.tenant, caller.session_id),
        prefill_hop=caller.prefill_hop,
        campaign=campaign or "",
        speculate=wanted.speculation is not False,
        phrases=phrases,
    )


def sampling_of(wanted: SamplingAsk, max_tokens: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        seed=concrete_seed(wanted.seed),
        temperature=1.0 if wanted.temperature is None else wanted.temperature,
        top_p=1.0 if wanted.top_p is None else wanted.top_p,
        top_k=max(0, wanted.top_k or 0),
        min_p=wanted.min_p or 0.0,
        stop=stops_of(wanted.stop),
        ignore_eos=bool(wanted.ignore_eos),
        num_logprobs=wanted.num_logprobs,
    )
