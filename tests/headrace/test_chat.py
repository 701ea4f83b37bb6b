import json

import httpx
import pytest

from headrace.chat import ChatError, ChatOptions, Conversation, Delta, Reply, new_session_id

OPTIONS = ChatOptions(
    http_url="http://cluster",
    model="m",
    max_tokens=16,
    temperature=0.5,
    seed=3,
    system="Be brief.",
    session_id="s-1",
)
USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}


def content(text, finish_reason=None):
    return {"choices": [{"delta": {"content": text}, "finish_reason": finish_reason}]}


HELLO = (content("Hel"), content("lo\n"), content("", "stop"), {"choices": [], "usage": USAGE})


class Server:
    """Answers each request with the next list of chunks, and remembers what it was sent."""

    def __init__(self, *answers, status=200):
        self.requests = []
        self._answers = list(answers)
        self._status = status

    def conversation(self, options=OPTIONS):
        transport = httpx.MockTransport(self._answer)
        return Conversation(options, httpx.Client(base_url=options.http_url, transport=transport))

    def _answer(self, request):
        self.requests.append((request.headers, json.loads(request.content)))
        chunks = self._answers.pop(0)
        if self._status != 200:
            return httpx.Response(self._status, json=chunks)
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]
        return httpx.Response(200, text="".join(lines))


def test_text_streams_and_ends_with_its_figures():
    *deltas, reply = Server(HELLO).conversation().send("Hi")
    assert deltas == [Delta("Hel"), Delta("lo\n")]
    assert isinstance(reply, Reply)
    assert (reply.text, reply.finish_reason) == ("Hello\n", "stop")
    assert (reply.prompt_tokens, reply.completion_tokens, reply.cached_tokens) == (9, 2, 4)
    assert 0 < reply.ttft_s <= reply.duration_s
    assert "TTFT" in reply.summary()
    assert "4 cached" in reply.summary()


def test_drafted_tokens_are_counted_where_the_server_tells_of_them():
    details = {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 1}
    usage = {"choices": [], "usage": USAGE | {"completion_tokens_details": details}}
    for last, expected in ((usage, (3, 1)), (HELLO[-1], (0, 0))):
        *_, reply = Server((*HELLO[:-1], last)).conversation().send("Hi")
        assert (reply.accepted_tokens, reply.rejected_tokens) == expected


def test_a_turn_carries_the_conversation_and_its_session():
    server = Server(HELLO, HELLO, HELLO)
    conversation = server.conversation()
    for text in ("one", "two"):
        list(conversation.send(text))
    headers, body = server.requests[1]
    assert headers["x-session-id"] == "s-1"
    assert [(message["role"], message["content"]) for message in body["messages"]] == [
        ("system", "Be brief."),
        ("user", "one"),
        ("assistant", "Hello\n"),
        ("user", "two"),
    ]
    assert body["seed"] == 3
    conversation.reset()
    list(conversation.send("three"))
    assert [message["role"] for message in server.requests[2][1]["messages"]] == ["system", "user"]


def test_control_characters_do_not_reach_the_terminal():
    chunks = (content("\x1b[2Jred\x07\u009b31m\tok"), content("", "stop"))
    delta, reply = Server(chunks).conversation().send("Hi")
    assert delta == Delta("[2Jred31m\tok")
    assert "\x1b" in reply.text


def test_the_servers_words_are_the_error():
    error = {"error": {"message": "`temperature` must be 0 to 2", "type": "invalid_request_error"}}
    with pytest.raises(ChatError, match="`temperature` must be 0 to 2"):
        list(Server(error, status=400).conversation().send("Hi"))
    with pytest.raises(ChatError, match="in the middle"):
        list(Server((content("a"), {"error": {"message": "in the middle"}})).conversation().send("Hi"))


def test_a_stream_that_breaks_off_is_an_error_and_forgets_the_turn():
    server = Server((content("a"),), HELLO)
    conversation = server.conversation()
    with pytest.raises(ChatError, match="ended before"):
        list(conversation.send("lost"))
    list(conversation.send("kept"))
    assert [message["content"] for message in server.requests[1][1]["messages"]] == ["Be brief.", "kept"]


def test_nobody_there_is_an_error():
    def refuse(request):
        raise httpx.ConnectError("refused")

    client = httpx.Client(base_url="http://cluster", transport=httpx.MockTransport(refuse))
    with pytest.raises(ChatError, match="refused"):
        list(Conversation(OPTIONS, client).send("Hi"))


def test_session_ids_differ():
    assert new_session_id() != new_session_id()
