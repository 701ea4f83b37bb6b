"""POST /v1/targeting: items of a catalogue for a context, through the same dispatch as a completion."""

import asyncio

import pytest

from cluster.messages import WorkerStatus
from tests.router.catalogue_support import ITEMS, put, store
from tests.router.conftest import MAX_CONTEXT, MODEL, eventually


def body(**changes):
    given = {"model": MODEL, "catalogue": "ads", "context": "the mill"} | changes
    return {name: value for name, value in given.items() if value is not ...}


async def ask(cluster, headers=None, **changes):
    return await cluster.http.post("/v1/targeting", json=body(**changes), headers=headers)


@pytest.fixture
async def targeted(make_cluster, served):
    """A router with the catalogue `ads`."""
    cluster = await make_cluster()
    store(cluster, served)
    return cluster


def sent(cluster):
    (generate,) = cluster.decode.seen.generates
    return generate


async def test_the_items_come_with_their_scores_and_how_they_were_found(targeted):
    response = await ask(targeted, k=2)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["id"].startswith("tgt-")
    assert answer["object"] == "targeting.result"
    assert answer["catalogue"] == {"name": "ads", "version": 1}
    known = {item["id"]: item for item in ITEMS}
    assert [item["rank"] for item in answer["items"]] == [1, 2]
    for item in answer["items"]:
        assert item["text"] == known[item["id"]]["text"]
        assert item["bid"] == known[item["id"]].get("bid")
        assert item["logprob"] == -0.5 * item["rank"]
    assert (answer["finish_reason"], answer["decoding"], answer["steps"], answer["rows"]) == (
        "stop", "stepwise", 3, 7,
    )  # fmt: skip
    assert answer["usage"]["completion_tokens"] == 0
    assert answer["timings_ms"]["search"] == 2.0
    assert {"tokenize", "place", "total"} <= set(answer["timings_ms"])
    assert "warning" not in answer
    assert "headrace" not in answer


async def test_what_is_asked_reaches_the_worker(targeted, tokenizer):
    wanted = {
        "k": 3, "beams": 7, "scoring": "catalogue", "diversity": 0.5, "seed": -1, "deadline_ms": 5_000,
        "filter": {"kind": ["wood", "stone"], "price": {"min": 1, "max": 50}, "is_new": True, "bid": 2},
    }  # fmt: skip
    assert (await ask(targeted, **wanted)).status_code == 200
    generate = sent(targeted)
    targeting = generate.targeting
    assert list(generate.prompt_token_ids) == tokenizer.encode("the mill", allow_special=True)
    assert (generate.sampling.max_tokens, generate.sampling.temperature) == (1, 0)
    assert generate.deadline_unix_ns > 0
    assert (targeting.k, targeting.beams, targeting.scoring, targeting.diversity) == (3, 7, "catalogue", 0.5)
    assert targeting.noise_seed == 2**64 - 1
    conditions = {condition.attribute: condition for condition in targeting.where}
    assert list(conditions["kind"].any_of.values) == ["wood", "stone"]
    assert (conditions["price"].at_least, conditions["price"].at_most) == (1, 50)
    assert not conditions["price"].HasField("any_of")
    assert list(conditions["is_new"].any_of.values) == ["true"]
    assert list(conditions["bid"].any_of.values) == ["2"]
    ref = targeting.catalogue
    assert (ref.name, ref.version) == ("ads", 1)
    assert ref.fetch_address == f"127.0.0.1:{targeted.router.grpc_port}"
    shown = (await targeted.http.get("/v1/catalogues/ads")).json()
    assert (ref.checksum, ref.num_bytes) == (shown["checksum"], shown["bytes"])


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, (20, 20)),
        ({"k": 30}, (30, 30)),
        ({"k": 5}, (5, 20)),
        ({"beams": 4}, (4, 4)),
        ({"k": 64}, (64, 64)),
    ],
    ids=str,
)
async def test_defaults_of_k_and_beams(targeted, asked, expected):
    assert (await ask(targeted, **asked)).status_code == 200
    targeting = sent(targeted).targeting
    assert (targeting.k, targeting.beams) == expected
    assert targeting.scoring == "vocabulary"
    assert not targeting.HasField("noise_seed")


async def test_messages_go_through_the_chat_template(targeted, tokenizer):
    messages = [{"role": "user", "content": "the mill"}]
    assert (await ask(targeted, context=..., messages=messages)).status_code == 200
    text = "<|im_start|>user\nthe mill<|im_end|>\n<|im_start|>assistant\n"
    assert list(sent(targeted).prompt_token_ids) == tokenizer.encode(text, allow_special=True)


BAD = [
    ({"k": 0}, "k"),
    ({"k": 10**9}, "k"),
    ({"k": 65}, "k"),
    ({"k": 1.5}, "k"),
    ({"k": 21, "beams": 20}, "k"),
    ({"beams": 0}, "beams"),
    ({"beams": 65}, "beams"),
    ({"scoring": "luck"}, "scoring"),
    ({"diversity": -1}, "diversity"),
    ({"diversity": 1e9}, "diversity"),
    ({"seed": 2**63}, "seed"),
    ({"deadline_ms": 0}, "deadline_ms"),
    ({"context": ...}, "context"),
    ({"context": ""}, "context"),
    ({"context": "mill " * MAX_CONTEXT}, "context"),
    ({"context": "x" * 1_000_000}, "context"),
    ({"messages": [{"role": "user", "content": "x"}]}, "context"),
    ({"context": ..., "messages": []}, "messages"),
    ({"context": ..., "messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"catalogue": ...}, "catalogue"),
    ({"catalogue": ""}, "catalogue"),
    ({"catalogue": 5}, "catalogue"),
    ({"filter": []}, "filter"),
    ({"filter": {"colour": "red"}}, "filter.colour"),
    ({"filter": {"kind": None}}, "filter[...]"),
    ({"filter": {"kind": [None]}}, "filter[...][0]"),
    ({"filter": {"kind": {}}}, "filter.kind"),
    ({"filter": {"kind": {"least": 1}}}, "filter[...].least"),
    ({"filter": {"kind": {"min": 1}}}, "filter.kind"),
    ({"filter": {"kind": "x" * 257}}, "filter[...]"),
    ({"filter": {"kind": ["x"] * 257}}, "filter[...]"),
    ({"filter": {f"a{i}": 1 for i in range(17)}}, "filter"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"stream": True}, "stream"),
]


async def test_bad_input_names_its_field(targeted):
    for change, param in BAD:
        response = await ask(targeted, **change)
        assert response.status_code == 400, (change, response.text)
        error = response.json()["error"]
        assert error["param"] == param, (change, error)
        assert param.split("[")[0].split(".")[0] in error["message"], (change, error)
    assert not targeted.decode.seen.generates


async def test_an_unknown_attribute_names_those_there_are(targeted):
    error = (await ask(targeted, filter={"knd": "x"})).json()["error"]
    assert all(f"`{name}`" in error["message"] for name in ("bid", "is_new", "kind", "price"))


async def test_unknown_catalogues_and_models_are_not_found(targeted):
    response = await ask(targeted, catalogue="adz")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "catalogue_not_found"
    assert "`ads`" in response.json()["error"]["message"]
    assert (await ask(targeted, model="other")).json()["error"]["code"] == "model_not_found"
    stranger = await ask(targeted, headers={"authorization": "Bearer another"})
    assert stranger.status_code == 404
    assert "ads" not in stranger.json()["error"]["message"].replace("`ads` does not", "")


async def test_a_filter_that_nothing_passes_is_an_empty_answer(targeted):
    answer = (await ask(targeted, filter={"kind": "glass"})).json()
    assert answer["items"] == []
    assert answer["finish_reason"] == "stop"
    assert answer["warning"] == "no item passes the filter"
    few = (await ask(targeted, filter={"kind": "stone"})).json()
    assert {item["id"] for item in few["items"]} == {"b", "c"}
    assert few["warning"].startswith("2 of 20 items")


async def test_the_deadline_ends_a_stuck_search(targeted):
    targeted.decode.behaviour.hang_at = 0
    answer = (await ask(targeted, deadline_ms=80)).json()
    assert (answer["items"], answer["finish_reason"], answer["decoding"]) == ([], "deadline", "none")
    assert "deadline" in answer["warning"]
    await eventually(lambda: targeted.decode.num_live == 0)


@pytest.mark.parametrize("fault", [{"die_at": 0}, {"forgets_items": True}], ids=str)
async def test_another_worker_searches_where_one_failed(make_cluster, served, fault):
    cluster = await make_cluster(decodes=2)
    store(cluster, served)
    first, second = cluster.decodes
    second.status = WorkerStatus(total_kv_tokens=10**6, queued_tokens=10**5)
    for name, value in fault.items():
        setattr(first.behaviour, name, value)
    response = await ask(cluster, k=2)
    assert response.status_code == 200, response.text
    assert len(response.json()["items"]) == 2
    assert len(first.seen.generates) == len(second.seen.generates) == 1
    assert cluster.metric("headrace_retries_total", what="decode") == 1


async def test_a_worker_that_knows_no_targeting_is_not_believed(targeted):
    targeted.decode.behaviour.forgets_items = True
    response = await ask(targeted)
    assert response.status_code == 503
    assert "without its items" in response.json()["error"]["message"]


async def test_a_session_goes_where_its_kv_is(targeted):
    assert (await ask(targeted, headers={"x-session-id": "s"})).status_code == 200
    assert sent(targeted).session_id == ":s"
    await eventually(lambda: ":s" in targeted.store.sessions)
    assert targeted.store.sessions[":s"].num_tokens == len(sent(targeted).prompt_token_ids)


async def test_the_timeline_header_tells_placement(targeted):
    answer = (await ask(targeted, headers={"x-headrace-timeline": "1"})).json()
    assert answer["headrace"]["placement"]["decode"] == "decode-0"
    assert {"received", "placed", "first_step_started"} <= set(answer["headrace"]["timeline"])


async def test_overload_and_no_worker(make_cluster, served):
    cluster = await make_cluster(max_inflight_requests=1)
    store(cluster, served)
    cluster.decode.behaviour.hang_at = 0
    waiting = asyncio.create_task(ask(cluster, deadline_ms=400))
    await eventually(lambda: cluster.decode.num_live == 1)
    refused = await ask(cluster)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert (await waiting).status_code == 200
    cluster.directory.workers.clear()
    await eventually(lambda: not cluster.router._pool.usable())
    assert (await ask(cluster)).status_code == 503


async def test_a_client_that_leaves_cancels_the_search(targeted, serve):
    targeted.decode.behaviour.hang_at = 0
    url = await serve(targeted)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    raw = b'{"model": "scripted", "catalogue": "ads", "context": "x"}'
    head = b"POST /v1/targeting HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    writer.write(head + b"content-length: %d\r\n\r\n" % len(raw) + raw)
    await eventually(lambda: targeted.decode.num_live == 1)
    writer.close()
    await eventually(lambda: targeted.decode.num_live == 0)
    route = {"route": "targeting", "outcome": "cancelled"}
    await eventually(lambda: targeted.metric("headrace_requests_total", **route) == 1)
    del reader


async def test_a_new_version_serves_from_its_upload_on(targeted):
    assert (await put(targeted, content=b'{"id": "z", "text": "a wheel"}\n')).json()["version"] == 2
    answer = (await ask(targeted)).json()
    assert answer["catalogue"]["version"] == 2
    assert [item["id"] for item in answer["items"]] == ["z"]
