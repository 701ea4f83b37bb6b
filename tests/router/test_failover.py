"""Decode workers that die, refuse or misbehave: the client sees no gap, no duplicate, the same tokens."""

import asyncio
import json

import msgspec
import pytest

from cluster.messages import WorkerStatus
from tests.router.conftest import MODEL, eventually
from tests.router.scripted_workers import completion_ids

PROMPT = list(range(5, 17))


def body(**changes):
    return {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "seed": 7, "logprobs": 0} | changes


def expected_ids(tokenizer, count=12, seed=7):
    return completion_ids(tokenizer, tuple(PROMPT), seed, count)


def expected_text(tokenizer, count=12, seed=7):
    return b"".join(tokenizer.token_bytes(i) for i in expected_ids(tokenizer, count, seed)).decode()


def events(response):
    assert response.text.endswith("\n\n")
    return [event.removeprefix("data: ") for event in response.text[:-2].split("\n\n")]


async def test_a_deadline_that_passes_without_a_worker_gives_what_there_is(make_cluster, tokenizer):
    cluster = await make_cluster(recovery_timeout_s=30.0)
    cluster.decode.behaviour.step_delay_s = 0.02

    async def kill():
        await eventually(lambda: cluster.metric("headrace_time_to_first_token_seconds_count") > 0)
        await cluster.decode.stop()

    killer = asyncio.create_task(kill())
    wanted = body(deadline_ms=1_000, max_tokens=200)
    response = await cluster.http.post("/v1/completions", json=wanted)
    await killer
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "deadline"
    assert 0 < response.json()["usage"]["completion_tokens"] < 200
    assert choice["text"]
    assert expected_text(tokenizer, 200).startswith(choice["text"])


@pytest.mark.parametrize("die_at", [0, 1, 5, 11])
@pytest.mark.parametrize("stream", [False, True])
async def test_another_worker_goes_on_where_one_died(make_cluster, tokenizer, die_at, stream):
    cluster = await make_cluster(decodes=2)
    for decode in cluster.decodes:
        decode.behaviour.tokens_per_step = 1
    first = cluster.decodes[0]
    cluster.decodes[1].status = WorkerStatus(total_kv_tokens=10**6, queued_tokens=10**5)
    first.behaviour.die_at = die_at
    response = await cluster.http.post("/v1/completions", json=body(stream=stream))
    assert response.status_code == 200
    if stream:
        *chunks, done = events(response)
        assert done == "[DONE]"
        choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
        tokens = [token for c in choices if c["logprobs"] for token in c["logprobs"]["tokens"]]
        text = "".join(choice["text"] for choice in choices)
    else:
        choice = response.json()["choices"][0]
        tokens, text = choice["logprobs"]["tokens"], choice["text"]
        assert response.json()["usage"]["completion_tokens"] == 12
    assert tokens == [tokenizer.token_text(i) for i in expected_ids(tokenizer)]
    assert text == expected_text(tokenizer)
    (replay,) = cluster.decodes[1].seen.generates
    assert list(replay.emitted_token_ids) == expected_ids(tokenizer)[:die_at]
    assert replay.sampling.seed == 7
    assert cluster.metric("headrace_retries_total", what="decode") == 1


async def test_the_only_worker_is_asked_again_when_its_stream_is_back(cluster, tokenizer):
    cluster.decode.behaviour.die_at = 4
    response = await cluster.http.post("/v1/completions", json=body())
    assert response.json()["choices"][0]["text"] == expected_text(tokenizer)
    assert len(cluster.decode.seen.hellos) >= 2
    first, replay = cluster.decode.seen.generates
    assert first.request_id != replay.request_id


async def test_gaps_never_reach_the_client(make_cluster, tokenizer):
    cluster = await make_cluster(decodes=2)
    cluster.decodes[1].status = WorkerStatus(total_kv_tokens=10**6, queued_tokens=10**5)
    cluster.decodes[0].behaviour.skip_index_at = 3
    response = await cluster.http.post("/v1/completions", json=body())
    assert response.json()["choices"][0]["text"] == expected_text(tokenizer)
    assert cluster.decodes[0].seen.cancels, "the worker that broke the contract is told to stop"


async def test_a_worker_gone_for_good_ends_the_stream_with_an_error(cluster, tokenizer):
    cluster.decode.behaviour.step_delay_s = 0.02

    async def kill():
        await eventually(lambda: cluster.metric("headrace_time_to_first_token_seconds_count") > 0)
        await cluster.decode.stop()

    killer = asyncio.create_task(kill())
    response = await cluster.http.post("/v1/completions", json=body(stream=True, max_tokens=100))
    await killer
    *chunks, last = events(response)
    assert json.loads(last)["error"]["code"] == "worker_failed"
    assert json.loads(last)["error"]["type"] == "service_unavailable_error"
    text = "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)
    assert expected_text(tokenizer, 100).startswith(text)
    refused = await cluster.http.post("/v1/completions", json=body(deadline_ms=300))
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"


async def test_no_worker_is_a_503_at_once(make_cluster):
    cluster = await make_cluster(decodes=0)
    response = await cluster.http.post("/v1/completions", json=body())
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "no_worker"
    assert response.headers["retry-after"] == "1"
    assert (await cluster.http.get("/ready")).status_code == 503
    assert (await cluster.http.get("/health")).status_code == 200


@pytest.mark.parametrize(
    ("code", "is_retryable", "status", "num_tries"),
    [
        ("overloaded", True, 429, 2),
        ("invalid", False, 400, 1),
        ("internal", True, 503, 2),
        ("internal", False, 503, 1),
    ],
)
async def test_refusals_are_tried_elsewhere_then_told(make_cluster, code, is_retryable, status, num_tries):
    cluster = await make_cluster(decodes=2)
    for decode in cluster.decodes:
        decode.behaviour.fail_with = (code, is_retryable)
    response = await cluster.http.post("/v1/completions", json=body())
    assert response.status_code == status
    assert "scripted failure" in response.json()["error"]["message"]
    assert sum(len(decode.seen.generates) for decode in cluster.decodes) == num_tries
    assert cluster.router._channels  # the router lives on
    for decode in cluster.decodes:
        decode.behaviour.fail_with = None
    assert (await cluster.http.post("/v1/completions", json=body())).status_code == 200


async def test_version_skew_is_told_and_healed_by_a_new_epoch(make_cluster, served):
    other = msgspec.structs.replace(
        served, card=msgspec.structs.replace(served.card, fingerprint="fingerprint-2")
    )
    cluster = await make_cluster(model=other)
    response = await cluster.http.post("/v1/completions", json=body())
    assert response.status_code == 503
    assert "fingerprint differs" in response.json()["error"]["message"]
    ready = await cluster.http.get("/ready")
    assert ready.status_code == 503
    assert "fingerprint differs" in ready.json()["reason"]
    num_hellos = len(cluster.decode.seen.hellos)
    assert (await cluster.http.post("/v1/completions", json=body())).status_code == 503
    assert len(cluster.decode.seen.hellos) == num_hellos, "a refusal is not asked for again"
    cluster.decode._expected = lambda hello: None
    cluster.decode.epoch += 1
    await eventually(lambda: cluster.router._pool.usable() != [])
    assert (await cluster.http.post("/v1/completions", json=body())).status_code == 200


async def test_the_deadline_ends_a_stuck_request_with_what_there_is(cluster, tokenizer):
    cluster.decode.behaviour.hang_at = 5
    response = await cluster.http.post("/v1/completions", json=body(deadline_ms=150))
    assert response.status_code == 200
    (choice,) = response.json()["choices"]
    assert choice["finish_reason"] == "deadline"
    assert choice["text"] == expected_text(tokenizer, 5)
    assert response.json()["usage"]["completion_tokens"] == 5
    await eventually(lambda: cluster.decode.num_live == 0)
    assert len(cluster.decode.seen.cancels) == 1


async def test_the_deadline_header_counts_too_and_is_told_to_the_worker(cluster):
    cluster.decode.behaviour.hang_at = 0
    headers = {"x-headrace-deadline-ms": "80"}
    response = await cluster.http.post("/v1/completions", json=body(stream=True), headers=headers)
    *_, finish, done = events(response)
    assert json.loads(finish)["choices"][0]["finish_reason"] == "deadline"
    assert done == "[DONE]"
    assert cluster.decode.seen.generates[0].deadline_unix_ns > 0


async def test_overload_is_a_429_and_ends_with_it(make_cluster):
    cluster = await make_cluster(max_inflight_requests=2)
    cluster.decode.behaviour.hang_at = 1
    waiting = [
        asyncio.create_task(cluster.http.post("/v1/completions", json=body(deadline_ms=400)))
        for _ in range(2)
    ]
    await eventually(lambda: cluster.decode.num_live == 2)
    refused = await cluster.http.post("/v1/completions", json=body())
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "overloaded"
    too_many = await cluster.http.post("/v1/completions", json=body(n=3))
    assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "n")
    assert [r.status_code for r in await asyncio.gather(*waiting)] == [200, 200]
    cluster.decode.behaviour.hang_at = None
    assert (await cluster.http.post("/v1/completions", json=body())).status_code == 200
    assert cluster.metric("headrace_router_inflight_requests") == 0


async def test_load_counted_towards_placement_is_taken_back(make_cluster):
    cluster = await make_cluster(decodes=2)
    cluster.decodes[0].behaviour.die_at = 2
    for _ in range(4):
        await cluster.http.post("/v1/completions", json=body())
    assert set(cluster.directory.outstanding.values()) == {0}
