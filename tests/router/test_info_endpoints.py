from prometheus_client.parser import text_string_to_metric_families

from tests.router.conftest import MODEL, eventually


async def samples(cluster):
    response = await cluster.http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return [s for family in text_string_to_metric_families(response.text) for s in family.samples]


async def test_metrics_hold_the_routers_and_every_workers(make_cluster):
    cluster = await make_cluster(decodes=2, prefills=1)
    await cluster.http.post("/v1/completions", json={"model": MODEL, "prompt": "x", "max_tokens": 3})
    found = await samples(cluster)
    steps = {
        (s.labels["worker"], s.labels["role"]): s.value for s in found if s.name == "headrace_steps_total"
    }
    assert steps == {("decode-0", "decode"): 3, ("decode-1", "decode"): 3, ("prefill-0", "prefill"): 3}
    (generated,) = [s for s in found if s.name == "headrace_generation_tokens_total"]
    assert generated.value == 3


async def test_workers_that_do_not_answer_in_time_are_shown_as_such(make_cluster):
    cluster = await make_cluster(decodes=2, prefills=1)
    cluster.decodes[1].admin.delay_s = 30.0
    await cluster.prefills[0].stop()
    found = await samples(cluster)
    up = {s.labels["worker"]: s.value for s in found if s.name == "headrace_worker_metrics_up"}
    assert up == {"decode-0": 1, "decode-1": 0, "prefill-0": 0}


async def test_ready_says_what_is_there(make_cluster):
    cluster = await make_cluster(decodes=2, prefills=1)
    ready = (await cluster.http.get("/ready")).json()
    assert ready == {"status": "ready", "decode_workers": 2, "prefill_workers": 1, "reason": None}
    cluster.directory.workers.clear()
    response = await cluster.http.get("/ready")
    assert response.status_code == 503
    assert response.json()["reason"] == "no decode worker is registered"
    assert (await cluster.http.get("/health")).json() == {"status": "ok"}


async def test_connections_to_departed_workers_are_closed(make_cluster):
    cluster = await make_cluster(decodes=2)
    await eventually(lambda: all(len(d.seen.hellos) == 1 for d in cluster.decodes))
    cluster.directory.workers.pop()
    await eventually(lambda: len(cluster.router._pool._connections) == 1)
