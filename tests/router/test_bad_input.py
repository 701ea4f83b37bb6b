"""Everything wrong that can be sent is a 4xx that names its field, streaming or not."""

import json

import pytest

from tests.router.conftest import MAX_CONTEXT, MODEL

COMPLETIONS = [
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": "ten"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": MAX_CONTEXT}, "max_tokens"),
    ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2**40}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"seed": 2**63}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"stop": ["x"] * 1000}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": ["ok", "x" * 257]}, "stop[1]"),
    ({"stop": 5}, "stop"),
    ({"logprobs": 6}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "x"]}, "prompt"),
    ({"prompt": ["x"] * 17}, "prompt"),
    ({"prompt": [10**9]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": "mill " * MAX_CONTEXT}, "prompt"),
    ({"prompt": "x" * 1_000_000}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {"text": "x"}}, "prompt"),
    ({"echo": True}, "echo"),
    ({"best_of": 3}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"presence_penalty": -1}, "presence_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"deadline_ms": -5}, "deadline_ms"),
    ({"deadline_ms": 0}, "deadline_ms"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True, "x": 1}, "stream": True}, "stream_options.x"),
    ({"user": "x" * 513}, "user"),
    ({"model": 5}, "model"),
    ({"model": ""}, "model"),
]
CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name"),
    ({"messages": [{"role": "user", "content": "x"}] * 5000}, "messages"),
    ({"messages": [{"role": "user", "content": "mill " * MAX_CONTEXT}]}, "messages"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"store": True}, "store"),
    ({"metadata": {"a": "b"}}, "metadata"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"modalities": ["audio"]}, "modalities[0]"),
]


def error_of(response):
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("change", "param"), COMPLETIONS, ids=lambda value: str(value)[:40])
async def test_completions(cluster, change, param, stream):
    body = {"model": MODEL, "prompt": "x", "max_tokens": 4, "stream": stream} | change
    response = await cluster.http.post("/v1/completions", json=body)
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == param
    assert param.split("[")[0] in error["message"]
    assert not cluster.decode.seen.generates


@pytest.mark.parametrize(("change", "param"), CHATS, ids=lambda value: str(value)[:40])
async def test_chats(cluster, change, param):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]} | change
    response = await cluster.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


async def test_unknown_fields_name_the_nearest(cluster):
    body = {"model": MODEL, "prompt": "x", "temprature": 1}
    error = error_of(await cluster.http.post("/v1/completions", json=body))
    assert error["code"] == "unknown_field"
    assert "`temperature`" in error["message"]


async def test_an_unknown_model_is_not_found(cluster):
    response = await cluster.http.post("/v1/completions", json={"model": "gpt-9", "prompt": "x"})
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"
    assert (await cluster.http.get("/v1/models/gpt-9")).status_code == 404


@pytest.mark.parametrize(
    "content",
    [
        b'{"model": "m", "prompt": "\xff\xfe"}',
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{" * 100_000,
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"model":"m","prompt":' + b"[" * 100_000,
        b'{"model":"scripted","prompt": "x", "temperature": NaN}',
        b'{"model":"scripted","prompt": "x", "temperature": Infinity}',
        b'{"model":"scripted","prompt": "x", "temperature": 1e999}',
        b'{"model":"scripted","prompt": "\\ud800"}',
        b'{"model":"scripted","prompt": "x"} trailing',
    ],
    ids=lambda content: repr(content[:30]),
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_bodies_that_are_no_request(cluster, content, path):
    response = await cluster.http.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    error_of(response)


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": ";;;"},
    ],
    ids=str,
)
async def test_wrong_content_types(cluster, headers):
    response = await cluster.http.post("/v1/completions", content=b"{}", headers=headers)
    assert response.status_code == 415
    error_of(response)


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "Application/JSON", "application/json;"]
)
async def test_right_content_types(cluster, content_type):
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 1}).encode()
    response = await cluster.http.post(
        "/v1/completions", content=body, headers={"content-type": content_type}
    )
    assert response.status_code == 200


async def test_a_body_that_says_it_is_too_large_is_not_read(make_cluster):
    cluster = await make_cluster(max_body_bytes=1000)
    num_read = 0

    async def body():
        nonlocal num_read
        for _ in range(100):
            num_read += 1
            yield b"x" * 100

    response = await cluster.http.post(
        "/v1/completions",
        content=body(),
        headers={"content-type": "application/json", "content-length": "10000"},
    )
    assert response.status_code == 413
    assert num_read == 0
    assert "1000 bytes" in error_of(response)["message"]
    endless = await cluster.http.post(
        "/v1/completions", content=body(), headers={"content-type": "application/json"}
    )
    assert endless.status_code == 413
    assert num_read < 15


async def test_wrong_methods_and_paths(cluster):
    wrong_method = await cluster.http.get("/v1/completions")
    assert wrong_method.status_code == 405
    assert wrong_method.headers["allow"] == "POST"
    error_of(wrong_method)
    for path in ("/v1/nothing", "/v1/completions/", "/"):
        response = await cluster.http.post(path, json={})
        assert response.status_code == 404
        error_of(response)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-headrace-deadline-ms", "soon"),
        ("x-headrace-deadline-ms", "0"),
        ("x-session-id", "two words"),
        ("x-session-id", "x" * 129),
        ("x-headrace-prefill-hop", "perhaps"),
    ],
)
async def test_bad_headers(cluster, header, value):
    body = {"model": MODEL, "prompt": "x"}
    response = await cluster.http.post("/v1/completions", json=body, headers={header: value})
    assert response.status_code == 400
    assert error_of(response)["param"] == header


async def test_deadline_in_body_and_header_must_agree(cluster):
    body = {"model": MODEL, "prompt": "x", "max_tokens": 1, "deadline_ms": 500}
    headers = {"x-headrace-deadline-ms": "600"}
    assert (await cluster.http.post("/v1/completions", json=body, headers=headers)).status_code == 400


async def test_request_ids_are_echoed_if_sane(cluster):
    body = {"model": MODEL, "prompt": "x", "max_tokens": 1}
    answer = await cluster.http.post("/v1/completions", json=body, headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    odd = await cluster.http.post("/v1/completions", json=body, headers={"x-request-id": "a b"})
    assert odd.headers["x-request-id"].startswith("req-")


async def test_neutral_values_of_unimplemented_fields_are_accepted(cluster):
    neutral = {
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": [], "tool_choice": "none",
        "response_format": {"type": "text"}, "store": False, "metadata": {}, "service_tier": "auto",
        "parallel_tool_calls": True, "reasoning_effort": "none", "modalities": ["text"], "functions": [],
        "user": "u", "verbosity": None, "top_k": -1, "stop": None, "seed": None, "max_tokens": 2,
    }  # fmt: skip
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "tool_calls": None},
        {"role": "user", "content": ""},
    ]
    body = {"model": MODEL, "messages": messages} | neutral
    response = await cluster.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
