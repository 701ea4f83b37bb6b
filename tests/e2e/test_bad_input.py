"""Everything wrong that can be sent: a 4xx that names the field, never a 500, never a hung stream."""

import json

import httpx
import pytest

pytestmark = pytest.mark.e2e

CASES = [
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": "ten"}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 1e308}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -7}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 10**6}, "n"),
    ({"seed": 2**70}, "seed"),
    ({"stop": ["x"] * 1000}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"logprobs": 1000}, "logprobs"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [10**9]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": "word " * 20_000}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"unknown_field": 1}, "unknown_field"),
    ({"deadline_ms": -5}, "deadline_ms"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True, "x": 1}}, "stream_options"),
]


def _assert_error(response, param=None):
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    if param is not None:
        assert param in (error["param"] or "") + error["message"]


@pytest.mark.parametrize(("change", "param"), CASES, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("stream", [False, True])
def test_bad_values_name_their_field(cluster, change, param, stream):
    body = {"model": cluster.model, "prompt": "x", "max_tokens": 4, "stream": stream} | change
    response = httpx.post(f"{cluster.http_url}/v1/completions", json=body, timeout=30)
    _assert_error(response, param)


@pytest.mark.parametrize(
    "content",
    [
        b'{"model": "m", "prompt": "\xff\xfe"}',
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{" * 100_000,
        b'{"a":' * 50_000,
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "\\ud800"}',
    ],
    ids=lambda content: repr(content[:24]),
)
def test_bad_bodies(cluster, content):
    response = httpx.post(
        f"{cluster.http_url}/v1/completions",
        content=content,
        headers={"content-type": "application/json"},
        timeout=30,
    )
    _assert_error(response)


def test_a_body_of_100_mb_is_refused(cluster):
    body = json.dumps({"model": cluster.model, "prompt": "x" * 100_000_000})
    with httpx.Client(timeout=60) as client:
        try:
            response = client.post(
                f"{cluster.http_url}/v1/completions",
                content=body,
                headers={"content-type": "application/json"},
            )
        except httpx.WriteError:
            return  # refused while we were still sending: the connection is closed, nothing hangs
    assert response.status_code == 413
    _assert_error(response)


def test_wrong_content_type_and_method(cluster):
    url = f"{cluster.http_url}/v1/completions"
    wrong_type = httpx.post(url, content=b"model=x", headers={"content-type": "text/plain"}, timeout=30)
    assert wrong_type.status_code == 415
    _assert_error(wrong_type)
    assert httpx.get(url, timeout=30).status_code == 405
    assert httpx.get(f"{cluster.http_url}/v1/nothing", timeout=30).status_code == 404


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "robot", "content": "x"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": 5}], "content"),
        ("hello", "messages"),
        ([{"role": "user", "content": "x"}] * 10_000, "messages"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_chat_messages(cluster, messages, param):
    response = httpx.post(
        f"{cluster.http_url}/v1/chat/completions",
        json={"model": cluster.model, "messages": messages, "max_tokens": 4},
        timeout=60,
    )
    _assert_error(response, param)
