"""Targeting's records to protobuf and back, within the limits of what anyone may ask for."""

import math
from collections.abc import Iterable
from typing import cast, get_args

from cluster.messages import (
    CatalogueRef,
    Condition,
    Decoding,
    ScoredItem,
    TargetingParams,
    TargetingResult,
)
from cluster.targeting_limits import (
    MAX_ATTRIBUTE_CHARS,
    MAX_BEAMS,
    MAX_CONDITION_VALUES,
    MAX_CONDITIONS,
    MAX_DIVERSITY,
)
from cluster.wire import headrace_pb2 as pb
from cluster.wire.errors import WireError

SCORINGS = ("vocabulary", "catalogue")
DECODINGS = get_args(Decoding)


def catalogue_ref_to_proto(ref: CatalogueRef) -> pb.CatalogueRef:
    return pb.CatalogueRef(
        name=ref.name,
        version=ref.version,
        checksum=ref.checksum,
        num_bytes=ref.num_bytes,
        path=ref.path,
        fetch_address=ref.fetch_address,
    )


def catalogue_ref_from_proto(message: pb.CatalogueRef) -> CatalogueRef:
    if not message.name or not message.checksum:
        raise WireError("a catalogue needs a name and a checksum")
    return CatalogueRef(
        name=message.name,
        version=message.version,
        checksum=message.checksum,
        num_bytes=message.num_bytes,
        path=message.path,
        fetch_address=message.fetch_address,
    )


def condition_to_proto(condition: Condition) -> pb.TargetingCondition:
    any_of = condition.any_of
    return pb.TargetingCondition(
        attribute=condition.attribute,
        any_of=None if any_of is None else pb.TextValues(values=any_of),
        at_least=condition.at_least,
        at_most=condition.at_most,
    )


def conditions_from_proto(messages: Iterable[pb.TargetingCondition]) -> tuple[Condition, ...]:
    """Raises WireError, whose message names the attribute."""
    conditions = tuple(_condition_from_proto(message) for message in messages)
    if len(conditions) > MAX_CONDITIONS:
        raise WireError(f"{len(conditions)} conditions; at most {MAX_CONDITIONS} are allowed")
    return conditions


def _condition_from_proto(message: pb.TargetingCondition) -> Condition:
    condition = Condition(
        attribute=message.attribute,
        any_of=tuple(message.any_of.values) if message.HasField("any_of") else None,
        at_least=message.at_least if message.HasField("at_least") else None,
        at_most=message.at_most if message.HasField("at_most") else None,
    )
    if fault := condition_fault(condition):
        raise WireError(fault)
    return condition


def condition_fault(condition: Condition) -> str | None:
    """What is wrong with a condition by itself, whatever the catalogue."""
    name = condition.attribute
    if not 1 <= len(name) <= MAX_ATTRIBUTE_CHARS:
        return f"an attribute's name must have 1 to {MAX_ATTRIBUTE_CHARS} characters"
    bounds = [bound for bound in (condition.at_least, condition.at_most) if bound is not None]
    if condition.any_of is None and not bounds:
        return f"the condition on `{name}` must name values, a least or a most"
    if any(math.isnan(bound) for bound in bounds):
        return f"the condition on `{name}` has a bound that is not a number"
    values = condition.any_of or ()
    if len(values) > MAX_CONDITION_VALUES:
        return (
            f"the condition on `{name}` has {len(values)} values; at most {MAX_CONDITION_VALUES} are allowed"
        )
    if any(len(value) > MAX_ATTRIBUTE_CHARS for value in values):
        return f"the condition on `{name}` has a value of more than {MAX_ATTRIBUTE_CHARS} characters"
    return None


def targeting_params_to_proto(params: TargetingParams) -> pb.TargetingParams:
    return pb.TargetingParams(
        catalogue=catalogue_ref_to_proto(params.catalogue),
        k=params.k,
        beams=params.beams,
        scoring=params.scoring,
        where=[condition_to_proto(condition) for condition in params.where],
        diversity=params.diversity,
        noise_seed=params.noise_seed,
    )


def targeting_params_from_proto(message: pb.TargetingParams) -> TargetingParams:
    """Raises WireError."""
    if not 1 <= message.k <= message.beams <= MAX_BEAMS:
        raise WireError(f"k {message.k} and {message.beams} beams: 1 <= k <= beams <= {MAX_BEAMS} must hold")
    if message.scoring not in SCORINGS:
        raise WireError(f"unknown scoring {message.scoring!r}")
    if not 0.0 <= message.diversity <= MAX_DIVERSITY:
        raise WireError(f"diversity {message.diversity} is not from 0 to {MAX_DIVERSITY:g}")
    return TargetingParams(
        catalogue=catalogue_ref_from_proto(message.catalogue),
        k=message.k,
        beams=message.beams,
        scoring="catalogue" if message.scoring == "catalogue" else "vocabulary",
        where=conditions_from_proto(message.where),
        diversity=message.diversity,
        noise_seed=message.noise_seed if message.HasField("noise_seed") else None,
    )


def targeting_result_to_proto(result: TargetingResult) -> pb.TargetingResult:
    items = [
        pb.ScoredItem(
            rank=item.rank, item_id=item.item_id, text=item.text, logprob=item.logprob, bid=item.bid
        )
        for item in result.items
    ]
    return pb.TargetingResult(
        items=items,
        is_complete=result.is_complete,
        decoding=result.decoding,
        num_steps=result.num_steps,
        num_rows=result.num_rows,
        num_verified_items=result.num_verified_items,
    )


def targeting_result_from_proto(message: pb.TargetingResult) -> TargetingResult:
    """Raises WireError."""
    if len(message.items) > MAX_BEAMS:
        raise WireError(f"{len(message.items)} items; at most {MAX_BEAMS} can be asked for")
    if message.decoding not in DECODINGS:
        raise WireError(f"unknown decoding {message.decoding!r}")
    return TargetingResult(
        items=tuple(
            ScoredItem(
                rank=item.rank,
                item_id=item.item_id,
                text=item.text,
                logprob=item.logprob,
                bid=item.bid if item.HasField("bid") else None,
            )
            for item in message.items
        ),
        is_complete=message.is_complete,
        decoding=cast(Decoding, message.decoding),
        num_steps=message.num_steps,
        num_rows=message.num_rows,
        num_verified_items=message.num_verified_items,
    )
