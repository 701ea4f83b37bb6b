"""What is asked of a catalogue and what comes back survive the wire; what breaks the limits does not."""

from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.ids import RequestId
from cluster.messages import (
    CatalogueRef,
    Condition,
    Decoding,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    ScoredItem,
    SequenceFinished,
    TargetingParams,
    TargetingResult,
    Usage,
)
from cluster.targeting_limits import MAX_BEAMS, MAX_DIVERSITY
from cluster.wire import conversions
from cluster.wire import headrace_pb2 as pb
from cluster.wire.errors import WireError

uint32, uint64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
texts = st.text(max_size=20)
some_text = st.text(min_size=1, max_size=20)
numbers = st.floats(allow_nan=False)


@st.composite
def conditions(draw):
    any_of = draw(st.none() | st.lists(texts, max_size=4).map(tuple))
    at_most = draw(st.none() | numbers)
    needs_a_least = any_of is None and at_most is None
    return Condition(
        attribute=draw(some_text),
        any_of=any_of,
        at_least=draw(numbers if needs_a_least else st.none() | numbers),
        at_most=at_most,
    )


refs = st.builds(
    CatalogueRef,
    name=some_text,
    version=uint64,
    checksum=some_text,
    num_bytes=uint64,
    path=texts,
    fetch_address=texts,
)


@st.composite
def params(draw):
    beams = draw(st.integers(1, MAX_BEAMS))
    return TargetingParams(
        catalogue=draw(refs),
        k=draw(st.integers(1, beams)),
        beams=beams,
        scoring=draw(st.sampled_from(["vocabulary", "catalogue"])),
        where=draw(st.lists(conditions(), max_size=3).map(tuple)),
        diversity=draw(st.floats(0, MAX_DIVERSITY)),
        noise_seed=draw(st.none() | uint64),
    )


items = st.builds(
    ScoredItem, rank=uint32, item_id=texts, text=texts, logprob=numbers, bid=st.none() | numbers
)
results = st.builds(
    TargetingResult,
    items=st.lists(items, max_size=5).map(tuple),
    is_complete=st.booleans(),
    decoding=st.sampled_from(get_args(Decoding)),
    num_steps=uint32,
    num_rows=uint64,
    num_verified_items=uint32,
)


def request(targeting):
    return GenerateRequest(
        request_id=RequestId("r"),
        prompt_token_ids=(1, 2),
        sampling=SamplingParams(max_tokens=1, seed=0, temperature=0.0),
        targeting=targeting,
    )


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.none() | params())
def test_requests(targeting):
    sent = request(targeting)
    raw = conversions.generate_request_to_proto(sent).SerializeToString()
    assert conversions.generate_request_from_proto(pb.GenerateRequest.FromString(raw)) == sent


@given(st.none() | results)
def test_results(targeting):
    sent = SequenceFinished(
        request_id=RequestId("r"),
        reason=FinishReason.STOP,
        usage=Usage(prompt_tokens=2, completion_tokens=0, cached_tokens=1),
        stamps_ns={"finished": 3},
        targeting=targeting,
    )
    raw = conversions.event_to_proto(sent).SerializeToString()
    assert conversions.event_from_proto(pb.DecodeEvent.FromString(raw)) == sent


def a_request():
    ref = CatalogueRef(name="ads", version=1, checksum="c", num_bytes=1, path="/p")
    return conversions.generate_request_to_proto(request(TargetingParams(catalogue=ref, k=2)))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda t: setattr(t, "k", 0), "k 0 and 20 beams"),
        (lambda t: setattr(t, "k", 21), "k 21 and 20 beams"),
        (lambda t: setattr(t, "beams", MAX_BEAMS + 1), "65 beams"),
        (lambda t: setattr(t, "scoring", "luck"), "'luck'"),
        (lambda t: setattr(t, "diversity", float("nan")), "diversity"),
        (lambda t: setattr(t, "diversity", -1), "diversity"),
        (lambda t: setattr(t.catalogue, "checksum", ""), "checksum"),
        (lambda t: t.where.add(attribute="x"), "`x`"),
        (lambda t: t.where.add(attribute="", at_least=1), "name"),
        (lambda t: t.where.add(attribute="x", at_least=float("nan")), "`x`"),
        (lambda t: t.where.add(attribute="x", any_of=pb.TextValues(values=["v"] * 257)), "257 values"),
        (lambda t: t.where.extend([pb.TargetingCondition(attribute="x", at_least=1)] * 17), "17 conditions"),
    ],
)
def test_what_breaks_the_limits_is_named(spoil, said):
    message = a_request()
    spoil(message.targeting)
    with pytest.raises(WireError, match="(?s).*" + said):
        conversions.generate_request_from_proto(message)


@pytest.mark.parametrize(
    ("targeting", "said"),
    [
        (pb.TargetingResult(decoding="magic"), "'magic'"),
        (pb.TargetingResult(decoding="none", items=[pb.ScoredItem()] * 65), "65 items"),
    ],
)
def test_a_worker_that_breaks_them_too(targeting, said):
    finished = pb.SequenceFinished(reason="stop", targeting=targeting)
    with pytest.raises(WireError, match=said):
        conversions.event_from_proto(pb.DecodeEvent(request_id="r", finished=finished))
