"""A targeting request from its fields to its items: the same for HTTP and gRPC.

It is dispatched as a completion is, with its deadline, placement, retries and failover; the worker sends no
token, and the items with the sequence's end.
"""

import contextlib
from collections.abc import Mapping, Sequence

import msgspec

from cluster.ids import RequestId
from cluster.messages import Condition, FinishReason, Record, SamplingParams, TargetingParams, TargetingResult
from cluster.timeline import Timeline
from cluster.wire.targeting_conversions import condition_fault
from router.admission import (
    Ask,
    Caller,
    Limits,
    concrete_seed,
    deadline_unix_ns,
    same_or_only,
    tenant_session,
)
from router.catalogues import CatalogueFacts, Catalogues
from router.chat_template import ChatMessage
from router.errors import invalid
from router.generation import Generation
from router.sequence import SequenceEnded
from router.targeting_api import DEFAULT_BEAMS, DEFAULT_K, AttributeFilter, AttributeRange, Scoring
from router.tokenizer import PromptEncoder

NOTHING_FOUND = TargetingResult(
    items=(), is_complete=False, decoding="none", num_steps=0, num_rows=0, num_verified_items=0
)


class TargetingFields(Record, frozen=True, kw_only=True):
    """What is asked, its types and ranges checked."""

    catalogue: str
    context: str | None
    messages: tuple[ChatMessage, ...] | None
    k: int | None
    beams: int | None
    scoring: Scoring | None
    where: tuple[Condition, ...]
    diversity: float | None
    seed: int | None
    deadline_ms: int | None


class Selection(Record, frozen=True, kw_only=True):
    """The items, and how they came to be."""

    catalogue: CatalogueFacts
    result: TargetingResult
    ended: SequenceEnded
    warning: str | None

    @property
    def is_cut_off(self) -> bool:
        """Whether better items may not have been reached."""
        return self.ended.reason is FinishReason.DEADLINE or not self.result.is_complete


class Targeting:
    def __init__(
        self, encoder: PromptEncoder, catalogues: Catalogues, generation: Generation, limits: Limits
    ) -> None:
        self._encoder = encoder
        self._catalogues = catalogues
        self._generation = generation
        self._limits = limits

    async def ask(
        self, fields: TargetingFields, caller: Caller, received_unix_ns: int
    ) -> tuple[CatalogueFacts, Ask]:
        """Raises RequestError."""
        k, beams = _k_and_beams(fields)
        param = _input_param(fields)
        catalogue = await self._catalogues.find(caller.tenant, fields.catalogue)
        self._catalogues.check_model(catalogue)
        _check_attributes(fields.where, catalogue)
        prompt = await self._prompt(fields)
        _check_length(len(prompt), param, catalogue, self._limits)
        deadline_ms = same_or_only(
            "deadline_ms", fields.deadline_ms, "x-headrace-deadline-ms", caller.deadline_ms
        )
        targeting = TargetingParams(
            catalogue=catalogue.ref,
            k=k,
            beams=beams,
            scoring=fields.scoring or "vocabulary",
            where=fields.where,
            diversity=fields.diversity or 0.0,
            noise_seed=None if fields.seed is None else concrete_seed(fields.seed),
        )
        return catalogue, Ask(
            prompts=(tuple(prompt),),
            max_tokens=(1,),
            num_choices=1,
            sampling=SamplingParams(max_tokens=1, seed=0, temperature=0.0),
            deadline_unix_ns=deadline_unix_ns(deadline_ms, received_unix_ns, self._limits),
            tenant=caller.tenant,
            session_id=tenant_session(caller.tenant, caller.session_id),
            prefill_hop=caller.prefill_hop,
            targeting=targeting,
        )

    async def select(
        self, request_id: RequestId, catalogue: CatalogueFacts, ask: Ask, timeline: Timeline
    ) -> Selection:
        """Raises RequestError."""
        assert ask.targeting is not None
        ended: SequenceEnded | None = None
        async with contextlib.aclosing(self._generation.run(request_id, ask, timeline)) as batches:
            async for batch in batches:
                last = batch[-1]
                ended = last if isinstance(last, SequenceEnded) else ended
        assert ended is not None, "a sequence's last event is its end"
        result = ended.targeting or NOTHING_FOUND
        return Selection(
            catalogue=catalogue,
            result=result,
            ended=ended,
            warning=_warning(result, ask.targeting, ended.reason),
        )

    async def _prompt(self, fields: TargetingFields) -> list[int]:
        if fields.messages is not None:
            return await self._encoder.chat(fields.messages)
        return await self._encoder.text(fields.context or "", param="context")


def _k_and_beams(fields: TargetingFields) -> tuple[int, int]:
    k = DEFAULT_K if fields.k is None else fields.k
    if fields.beams is None:
        return k, max(k, DEFAULT_BEAMS)
    if fields.k is None:
        k = min(k, fields.beams)
    if k > fields.beams:
        raise invalid("k", f"`k` is {k} and `beams` {fields.beams}: at most `beams` items can be found")
    return k, fields.beams


def _input_param(fields: TargetingFields) -> str:
    if (fields.context is None) == (fields.messages is None):
        raise invalid("context", "give either `context`, a text, or `messages`", code="missing_field")
    return "messages" if fields.context is None else "context"


def _check_length(num_tokens: int, param: str, catalogue: CatalogueFacts, limits: Limits) -> None:
    if num_tokens == 0:
        raise invalid(param, f"`{param}` must not be empty: it has no token", code="empty")
    needed = num_tokens + catalogue.max_item_tokens
    if needed > limits.max_context_tokens:
        raise invalid(
            param,
            f"`{param}` of {num_tokens} tokens and the longest item of `{catalogue.ref.name}`, "
            f"{catalogue.max_item_tokens}, make {needed}; the model's limit is {limits.max_context_tokens}",
            code="context_length_exceeded",
        )


def conditions_of(wanted: Mapping[str, AttributeFilter] | None) -> tuple[Condition, ...]:
    """A body's `filter`. Raises RequestError."""
    return tuple(_condition(attribute, given) for attribute, given in (wanted or {}).items())


def _condition(attribute: str, given: AttributeFilter) -> Condition:
    if isinstance(given, AttributeRange):
        condition = Condition(attribute=attribute, at_least=given.min, at_most=given.max)
    else:
        values = given if isinstance(given, list) else [given]
        condition = Condition(attribute=attribute, any_of=tuple(_as_text(value) for value in values))
    if fault := condition_fault(condition):
        raise invalid(f"filter.{attribute[:100]}", f"`filter`: {fault}", code="invalid_value")
    return condition


def _as_text(value: str | bool | int | float) -> str:
    """As a catalogue keeps what JSON wrote."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _check_attributes(where: Sequence[Condition], catalogue: CatalogueFacts) -> None:
    for condition in where:
        name = condition.attribute
        if name not in catalogue.attributes:
            known = ", ".join(f"`{known}`" for known in catalogue.attributes[:20]) or "none"
            raise invalid(
                f"filter.{name}",
                f"`filter`: items of `{catalogue.ref.name}` have no attribute `{name}`; they have: {known}",
                code="unknown_attribute",
            )
        is_range = condition.at_least is not None or condition.at_most is not None
        if is_range and catalogue.kinds[name] == "text":
            message = (
                f"`filter`: `{name}` is text in `{catalogue.ref.name}`; it has no `min` or `max`, give values"
            )
            raise invalid(f"filter.{name}", message, code="invalid_value")


def _warning(result: TargetingResult, asked: TargetingParams, reason: FinishReason) -> str | None:
    num_items = len(result.items)
    if reason is FinishReason.DEADLINE or not result.is_complete:
        return "the deadline passed before the search was complete"
    if num_items >= asked.k:
        return None
    if not num_items and asked.where:
        return "no item passes the filter"
    what = "items that pass the filter" if asked.where else "items in the catalogue"
    return f"{num_items} of {asked.k} items: fewer {what} were reached"
