"""The hand-built bytes are the types of `openai_answers`, whatever text they carry."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.ids import Epoch, WorkerId
from cluster.messages import EmittedToken, FinishReason, TokenLogprob, Usage, WorkerAddress
from cluster.placement.choose import Placement, PlacementReason
from router.chunks import AnswerHead, ChatChunks, CompletionChunks
from router.openai_answers import ChatCompletionChunk, CompletionBody, facts_of, usage_body
from router.sequence import SequenceEnded, TextEmitted

USAGE = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)
PLACEMENT = Placement(
    decode=WorkerAddress(worker_id=WorkerId("d"), epoch=Epoch(1), grpc_address="h:1", host_id="h"),
    prefill=None,
    reason=PlacementReason.SESSION,
    predicted_ttft_ms=None,
    cached_tokens=0,
    computed_tokens=3,
)
TOKEN = EmittedToken(
    token_id=40, logprob=float("-inf"), top_logprobs=(TokenLogprob(token_id=41, logprob=-0.25),)
)
KINDS = {
    "completion": (CompletionChunks, CompletionBody, "text_completion"),
    "chat": (ChatChunks, ChatCompletionChunk, "chat.completion.chunk"),
}


def writer(kind, *, include_usage=False, logprobs_of=None):
    chunks, _, name = KINDS[kind]
    head = AnswerHead(id='i"d', object=name, created=5, model="mödel")
    return chunks(head, 2, include_usage=include_usage, logprobs_of=logprobs_of)


def parsed(kind, data):
    events = data.decode().split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") for event in events)
    return [msgspec.json.decode(event[6:], type=KINDS[kind][1]) for event in events]


def text_of(kind, chunk):
    choice = chunk.choices[0]
    return choice.text if kind == "completion" else choice.delta.content or ""


def ended(choice=0, text="", reason=FinishReason.STOP):
    return SequenceEnded(choice=choice, reason=reason, text=text, usage=USAGE, placement=PLACEMENT)


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_chunks_decode_to_what_was_said(kind, include_usage, texts):
    chunks = writer(kind, include_usage=include_usage)
    data = b"".join(chunks.text(TextEmitted(1, i, (TOKEN,), text)) for i, text in enumerate(texts))
    decoded = parsed(kind, data + chunks.ended(ended(1, "tail"), None))
    assert "".join(text_of(kind, chunk) for chunk in decoded) == "".join(texts) + "tail"
    assert {chunk.choices[0].index for chunk in decoded} == {1}
    assert [chunk.choices[0].finish_reason for chunk in decoded[:-1]] == [None] * (len(decoded) - 1)
    assert decoded[-1].choices[0].finish_reason == "stop"
    assert {(chunk.id, chunk.model, chunk.created) for chunk in decoded} == {('i"d', "mödel", 5)}


@pytest.mark.parametrize("kind", KINDS)
def test_usage_and_facts_come_last(kind):
    chunks = writer(kind, include_usage=True)
    facts = facts_of({"received": 1}, PLACEMENT)
    (last,) = parsed(kind, chunks.usage(usage_body(USAGE), facts))
    assert last.choices == []
    assert last.usage.total_tokens == 5
    assert last.usage.prompt_tokens_details.cached_tokens == 1
    assert last.headrace.placement.reason == "session"
    *_, finish = parsed(kind, writer(kind).ended(ended(text="x"), facts))
    assert finish.headrace.timeline == {"received": 1}
    assert finish.choices[0].finish_reason == "stop"


def test_chat_announces_the_role_once_a_choice():
    chunks = writer("chat")
    first = parsed("chat", chunks.text(TextEmitted(0, 0, (TOKEN,), "a")))
    assert [chunk.choices[0].delta.role for chunk in first] == ["assistant", msgspec.UNSET]
    again = parsed("chat", chunks.text(TextEmitted(0, 1, (TOKEN,), "b")))
    assert [chunk.choices[0].delta.content for chunk in again] == ["b"]
    only_end = parsed("chat", chunks.ended(ended(1), None))
    assert only_end[0].choices[0].delta.role == "assistant"


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_without_text_say_nothing_unless_logprobs_were_asked(kind, tokenizer):
    silent = TextEmitted(0, 0, (TOKEN,), "")
    assert all(not text_of(kind, chunk) for chunk in parsed(kind, writer(kind).text(silent)))
    *_, chunk = parsed(kind, writer(kind, logprobs_of=tokenizer).text(silent))
    logprobs = chunk.choices[0].logprobs
    if kind == "completion":
        assert logprobs.token_logprobs == [-9999.0]
        assert logprobs.top_logprobs == [{tokenizer.token_text(41): -0.25, tokenizer.token_text(40): -9999.0}]
        assert logprobs.text_offset == [0]
    else:
        assert logprobs.content[0].logprob == -9999.0
        assert bytes(logprobs.content[0].bytes) == tokenizer.token_bytes(40)
        assert logprobs.content[0].top_logprobs[0].logprob == -0.25
