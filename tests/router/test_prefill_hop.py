"""The prefill hop: chosen by placement, retried elsewhere once, then left to the decode worker."""

import asyncio

import grpc
import httpx
import pytest

from cluster.messages import StepCost, WorkerStatus
from tests.router.conftest import MODEL, eventually
from tests.router.scripted_workers import completion_ids

PROMPT = list(range(5, 69))
ALWAYS = {"x-headrace-prefill-hop": "always"}


def body(**changes):
    return {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "seed": 1} | changes


async def post(cluster, headers=ALWAYS, **changes):
    return await cluster.http.post("/v1/completions", json=body(**changes), headers=headers)


def assert_answered(response, tokenizer):
    assert response.status_code == 200, response.text
    ids = completion_ids(tokenizer, tuple(PROMPT), 1, 4)
    expected = b"".join(tokenizer.token_bytes(i) for i in ids).decode()
    assert response.json()["choices"][0]["text"] == expected


async def test_the_hop_brings_what_decode_lacks(make_cluster, tokenizer):
    cluster = await make_cluster(prefills=1)
    cluster.decode.behaviour.cached_tokens = 8
    cluster.prefills[0].cached_tokens = 20
    response = await post(cluster, headers=ALWAYS | {"x-headrace-timeline": "1"})
    assert_answered(response, tokenizer)
    (run,) = cluster.prefills[0].runs
    (generate,) = cluster.decode.seen.generates
    assert run.handoff_id == generate.handoff_id
    assert list(run.prompt_token_ids) == PROMPT[:-1]
    assert run.first_token == 8
    assert run.target.grpc_address == cluster.decode.grpc_address
    assert (run.target.worker_id, run.target.epoch) == ("decode-0", 1)
    assert run.layout_fingerprint == cluster.decode.layout
    # The 8 that decode had are among the 20 that prefill had.
    assert response.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 20
    facts = response.json()["headrace"]
    assert facts["placement"]["prefill"] == "prefill-0"
    assert facts["timeline"]["prefill_finished"] == 4


async def test_short_prompts_and_never_take_no_hop(make_cluster, tokenizer):
    cluster = await make_cluster(prefills=1)
    assert_answered(await post(cluster, headers={"x-headrace-prefill-hop": "never"}), tokenizer)
    assert (await post(cluster, prompt=[5])).status_code == 200
    assert not cluster.prefills[0].runs
    assert all(not generate.handoff_id for generate in cluster.decode.seen.generates)


async def test_placement_takes_the_hop_where_it_is_predicted_cheaper(make_cluster, tokenizer):
    cluster = await make_cluster(prefills=1)
    slow = (StepCost(rows=1, ms=50.0), StepCost(rows=8, ms=400.0))
    fast = (StepCost(rows=1, ms=1.0), StepCost(rows=256, ms=2.0))
    cluster.decode.status = WorkerStatus(total_kv_tokens=1000, free_kv_tokens=1000, step_table=slow)
    cluster.prefills[0].status = WorkerStatus(total_kv_tokens=1000, free_kv_tokens=1000, step_table=fast)
    assert_answered(await post(cluster, headers={}), tokenizer)
    assert len(cluster.prefills[0].runs) == 1


async def test_a_hop_is_dropped_where_decode_holds_more_than_the_index_knew(make_cluster, tokenizer):
    cluster = await make_cluster(prefills=1)
    even = (StepCost(rows=1, ms=5.0), StepCost(rows=8, ms=6.0))
    fast = (StepCost(rows=1, ms=8.0), StepCost(rows=256, ms=9.0))
    cluster.decode.status = WorkerStatus(total_kv_tokens=1000, free_kv_tokens=1000, step_table=even)
    cluster.prefills[0].status = WorkerStatus(total_kv_tokens=1000, free_kv_tokens=1000, step_table=fast)
    cluster.decode.behaviour.cached_tokens = len(PROMPT) - 3
    assert_answered(await post(cluster, headers={}), tokenizer)
    (generate,) = cluster.decode.seen.generates
    assert generate.handoff_id
    assert not cluster.prefills[0].runs
    assert len(cluster.decode.seen.local) == 1


async def test_everything_cached_needs_no_prefill(make_cluster, tokenizer):
    cluster = await make_cluster(prefills=1)
    cluster.decode.behaviour.cached_tokens = len(PROMPT) - 1
    assert_answered(await post(cluster), tokenizer)
    assert not cluster.prefills[0].runs


@pytest.mark.parametrize(
    "status",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.FAILED_PRECONDITION,
    ],
)
async def test_a_failed_prefill_is_tried_once_elsewhere(make_cluster, tokenizer, status):
    cluster = await make_cluster(prefills=2)
    first, second = cluster.prefills
    second.status = WorkerStatus(total_kv_tokens=1000, queued_tokens=5)
    first.fail_with = status
    assert_answered(await post(cluster), tokenizer)
    assert (len(first.runs), len(second.runs)) == (1, 1)
    (retry,) = cluster.decode.seen.retries
    assert second.runs[0].handoff_id == retry.handoff_id != first.runs[0].handoff_id
    assert not cluster.decode.seen.local
    assert cluster.metric("headrace_retries_total", what="prefill") == 1


async def test_two_failed_prefills_leave_the_prompt_to_decode(make_cluster, tokenizer):
    cluster = await make_cluster(prefills=3)
    for prefill in cluster.prefills:
        prefill.fail_with = grpc.StatusCode.UNAVAILABLE
    assert_answered(await post(cluster), tokenizer)
    assert sum(len(prefill.runs) for prefill in cluster.prefills) == 2
    assert len(cluster.decode.seen.local) == 1


async def test_the_only_prefill_worker_failing_leaves_the_prompt_to_decode(make_cluster, tokenizer):
    cluster = await make_cluster(prefills=1)
    await cluster.prefills[0].stop()
    assert_answered(await post(cluster), tokenizer)
    assert len(cluster.decode.seen.local) == 1


async def test_a_rejected_handoff_cancels_its_prefill_and_is_tried_elsewhere(make_cluster, tokenizer):
    cluster = await make_cluster(prefills=2)
    cluster.prefills[0].hangs = True
    cluster.prefills[1].status = WorkerStatus(total_kv_tokens=1000, queued_tokens=5)
    cluster.decode.behaviour.handoffs_to_fail = 1
    assert_answered(await post(cluster), tokenizer)
    assert cluster.metric("headrace_retries_total", what="handoff") == 1
    assert len(cluster.prefills[1].runs) == 1
    assert len(cluster.prefills[0].runs) == cluster.prefills[0].num_cancelled <= 1


async def test_a_client_that_leaves_cancels_prefill_too(make_cluster, serve):
    cluster = await make_cluster(prefills=1)
    cluster.prefills[0].hangs = True
    url = await serve(cluster)
    async with httpx.AsyncClient(base_url=url) as client:
        asking = asyncio.create_task(client.post("/v1/completions", json=body(stream=True), headers=ALWAYS))
        await eventually(lambda: len(cluster.prefills[0].runs) == 1)
        asking.cancel()
        await asyncio.wait((asking,))
    await eventually(lambda: cluster.prefills[0].num_cancelled == 1)
    await eventually(lambda: cluster.decode.num_live == 0)
    await eventually(lambda: cluster.metric("headrace_router_inflight_requests") == 0)
    assert cluster.metric("headrace_requests_total", route="completions", outcome="cancelled") == 1


async def test_the_deadline_ends_a_stuck_prefill(make_cluster):
    cluster = await make_cluster(prefills=1)
    cluster.prefills[0].hangs = True
    response = await post(cluster, deadline_ms=120)
    assert response.json()["choices"][0]["finish_reason"] == "deadline"
    assert response.json()["choices"][0]["text"] == ""
    await eventually(lambda: cluster.prefills[0].num_cancelled == 1)
