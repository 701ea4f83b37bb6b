"""`campaign`, `speculation` and `phrases`: from HTTP and gRPC to the decode worker."""

import grpc
import grpc.aio
import msgspec
import pytest

from cluster.ids import RequestId
from cluster.messages import CatalogueRef, GenerateRequest, SamplingParams, WorkerStatus
from cluster.model_card import ServedModel
from cluster.wire import conversions
from cluster.wire import headrace_pb2 as pb
from cluster.wire.headrace_pb2_grpc import InferenceStub
from tests.router.catalogue_support import ITEMS, store
from tests.router.conftest import MODEL
from tests.router.test_failover import body


async def test_both_reach_the_worker(cluster):
    await cluster.http.post("/v1/completions", json=body(campaign="spring", speculation=False))
    headers = {"x-headrace-campaign": "autumn"}
    await cluster.http.post("/v1/completions", json=body(), headers=headers)
    await cluster.http.post("/v1/completions", json=body())
    seen = [(one.campaign, one.speculate) for one in cluster.decode.seen.generates]
    assert seen == [("spring", False), ("autumn", True), ("", True)]


async def test_bad_ones_are_refused_by_name(cluster):
    for fields, headers, named in (
        ({"campaign": "x" * 129}, {}, "campaign"),
        ({"speculation": "no"}, {}, "speculation"),
        ({}, {"x-headrace-campaign": "two words"}, "x-headrace-campaign"),
        ({"campaign": "a"}, {"x-headrace-campaign": "b"}, "campaign"),
    ):
        response = await cluster.http.post("/v1/completions", json=body(**fields), headers=headers)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == named


def test_a_request_crosses_the_wire_with_them():
    request = GenerateRequest(
        request_id=RequestId("r"),
        prompt_token_ids=(1,),
        sampling=SamplingParams(max_tokens=1, seed=0),
        campaign="spring",
        speculate=False,
        phrases=CatalogueRef(
            name="ads", version=2, checksum="ab", num_bytes=9, path="/x", fetch_address="host:1"
        ),
    )
    message = conversions.generate_request_to_proto(request)
    assert conversions.generate_request_from_proto(message) == request
    message.ClearField("speculate")
    message.ClearField("phrases")
    without = conversions.generate_request_from_proto(message)
    assert without.speculate, "absent: true"
    assert without.phrases is None
    message.phrases.name = "ads"
    with pytest.raises(conversions.WireError, match="checksum"):
        conversions.generate_request_from_proto(message)


def phrases_of(generate):
    return generate.phrases.name, generate.phrases.version


async def test_phrases_reach_the_worker_as_the_version_that_serves(cluster, served):
    store(cluster, served)
    await cluster.http.post("/v1/completions", json=body(phrases="ads"))
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    await cluster.http.post("/v1/chat/completions", json={**chat, "phrases": "ads", "stream": True})
    store(cluster, served, items=ITEMS[:2])
    await cluster.http.post("/v1/completions", json=body(phrases="ads", n=2))
    await cluster.http.post("/v1/completions", json=body(phrases=None))
    first, second, *both, without = cluster.decode.seen.generates
    assert phrases_of(first) == phrases_of(second) == ("ads", 1)
    assert [phrases_of(one) for one in both] == [("ads", 2)] * 2
    assert not without.HasField("phrases")
    ref = conversions.generate_request_from_proto(first).phrases
    assert ref.fetch_address == f"127.0.0.1:{cluster.router.grpc_port}"
    shown = (await cluster.http.get("/v1/catalogues/ads")).json()
    assert (both[0].phrases.checksum, both[0].phrases.num_bytes) == (shown["checksum"], shown["bytes"])


async def test_phrases_are_those_of_the_callers_catalogues(cluster, served):
    store(cluster, served)
    unknown = await cluster.http.post("/v1/completions", json=body(phrases="adz"))
    targeting = {"model": MODEL, "context": "x", "catalogue": "adz"}
    as_targeting = (await cluster.http.post("/v1/targeting", json=targeting)).json()["error"]
    assert unknown.status_code == 404
    assert unknown.json()["error"] == {**as_targeting, "param": "phrases"}
    assert as_targeting["code"] == "catalogue_not_found"
    assert "`ads`" in as_targeting["message"]
    stranger = {"authorization": "Bearer another"}
    hidden = await cluster.http.post("/v1/completions", json=body(phrases="ads"), headers=stranger)
    assert (hidden.status_code, hidden.json()["error"]["code"]) == (404, "catalogue_not_found")
    assert not cluster.decode.seen.generates


async def test_phrases_by_grpc(cluster, served):
    store(cluster, served)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{cluster.router.grpc_port}") as channel:

        async def ask(**fields):
            request = pb.InferenceRequest(model=MODEL, prompt="x", max_tokens=1, **fields)
            async for _ in InferenceStub(channel).Generate(request, timeout=10):
                pass

        await ask(phrases="ads")
        await ask()
        given, without = cluster.decode.seen.generates
        assert phrases_of(given) == ("ads", 1)
        assert not without.HasField("phrases")
        for name, code in (
            ("adz", "NOT_FOUND"),
            ("Not a name", "INVALID_ARGUMENT"),
            ("x" * 65, "INVALID_ARGUMENT"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await ask(phrases=name)
            assert error.value.code().name == code
            assert dict(error.value.trailing_metadata())["headrace-error-param"] == "phrases"


@pytest.mark.parametrize("name", ["", "x" * 65, "Not a name", 7], ids=str)
async def test_names_that_no_catalogue_has_are_refused(cluster, name):
    response = await cluster.http.post("/v1/completions", json=body(phrases=name))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "phrases"


async def test_phrases_of_another_model_are_refused(cluster, served):
    card = msgspec.structs.replace(served.card, fingerprint="another")
    store(cluster, ServedModel(card=card, tokenizer_json=served.tokenizer_json))
    response = await cluster.http.post("/v1/completions", json=body(phrases="ads"))
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (
        409,
        "catalogue_of_another_model",
        "phrases",
    )


async def test_phrases_that_cannot_be_read_cost_a_request_nothing(cluster, served):
    store(cluster, served)
    (current,) = cluster.catalogue_folder.glob("*/ads/current.json")
    current.write_bytes(b"{")
    response = await cluster.http.post("/v1/completions", json=body(phrases="ads"))
    assert response.status_code == 200
    (generate,) = cluster.decode.seen.generates
    assert not generate.HasField("phrases")
    # A targeting request cannot do without.
    targeting = {"model": MODEL, "context": "x", "catalogue": "ads"}
    assert (await cluster.http.post("/v1/targeting", json=targeting)).status_code == 503


async def test_another_worker_is_told_the_same_phrases(make_cluster, served):
    cluster = await make_cluster(decodes=2)
    store(cluster, served)
    cluster.decodes[0].behaviour.die_at = 2
    cluster.decodes[1].status = WorkerStatus(total_kv_tokens=10**6, queued_tokens=10**5)
    response = await cluster.http.post("/v1/completions", json=body(phrases="ads"))
    assert response.status_code == 200
    (first,), (second,) = (one.seen.generates for one in cluster.decodes)
    assert first.phrases == second.phrases
    assert second.phrases.name == "ads"
