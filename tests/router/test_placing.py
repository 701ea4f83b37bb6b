"""What the router asks the index, and what it tells it."""

import msgspec

from cluster.block_hash import chain_hashes, chain_salt
from cluster.ids import WorkerId
from cluster.placement.store import IndexHits
from router.admission import tenant_of, tenant_session
from tests.router.conftest import MODEL, eventually
from tests.router.scripted_workers import BLOCK_SIZE, LAYOUT, completion_ids

PROMPT = list(range(5, 5 + 3 * BLOCK_SIZE + 1))


async def post(cluster, headers=None, **changes):
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "seed": 3} | changes
    response = await cluster.http.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


async def test_lookup_is_for_full_blocks_or_a_session(cluster):
    await post(cluster, prompt=[5, 6])
    assert cluster.store.lookups == []
    await post(cluster)
    assert cluster.store.lookups == [(3, None)]
    await post(cluster, prompt=[5, 6], headers={"x-session-id": "s"})
    assert cluster.store.lookups[1:] == [(0, ":s")]


async def test_a_slow_or_absent_store_costs_nothing_but_a_metric(make_cluster):
    cluster = await make_cluster(lookup_timeout_s=0.002)
    cluster.store.delay_s = 30.0
    await post(cluster)
    cluster.store.is_down = True
    await post(cluster, headers={"x-session-id": "s"})
    assert cluster.metric("headrace_placement_unavailable_total") == 2


async def test_cached_prefix_decides(make_cluster):
    cluster = await make_cluster(decodes=3)
    cluster.store.hits = IndexHits(cached_blocks={WorkerId("decode-2"): 3}, session=None)
    answer = await post(cluster, headers={"x-headrace-timeline": "1"})
    assert answer["headrace"]["placement"] == {
        "reason": "cached_prefix",
        "decode": "decode-2",
        "prefill": None,
    }
    assert cluster.metric("headrace_placements_total", reason="cached_prefix") == 1


async def test_a_session_is_remembered_by_tenant_and_returns_to_its_worker(make_cluster, tokenizer):
    cluster = await make_cluster(decodes=3)
    headers = {"x-session-id": "s", "authorization": "Bearer key", "x-headrace-timeline": "1"}
    first = await post(cluster, headers=headers)
    tenant = tenant_of("Bearer key")
    session_id = tenant_session(tenant, "s")
    await eventually(lambda: session_id in cluster.store.sessions)
    record = cluster.store.sessions[session_id]
    assert record.worker_id == first["headrace"]["placement"]["decode"]
    assert record.num_tokens == len(PROMPT) + 3, "the last token was sampled, never run"
    held = [*PROMPT, *completion_ids(tokenizer, tuple(PROMPT), 3, 4)[:3]]
    assert record.last_hash == chain_hashes(held, BLOCK_SIZE, chain_salt(LAYOUT, tenant))[-1]
    longer = [*held, 9, 10, 11]
    second = await post(cluster, headers=headers, prompt=longer)
    assert second["headrace"]["placement"]["decode"] == record.worker_id
    assert second["headrace"]["placement"]["reason"] == "session"
    assert {g.tenant for d in cluster.decodes for g in d.seen.generates} == {tenant}


async def test_what_fits_no_pool_is_a_400(cluster):
    cluster.decode.status = msgspec.structs.replace(cluster.decode.status, total_kv_tokens=10)
    body = {"model": MODEL, "prompt": PROMPT}
    response = await cluster.http.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
