"""Targeting by gRPC: the same requests, checks and answers. And catalogues for workers elsewhere."""

import asyncio

import grpc
import grpc.aio
import msgspec
import pytest

from cluster.catalogue.fetch import FetchError, fetch_catalogue
from cluster.catalogue.file import Catalogue
from cluster.catalogue.local import LocalCatalogues
from cluster.messages import CatalogueRef
from cluster.wire import headrace_pb2 as pb
from cluster.wire.headrace_pb2_grpc import CataloguesStub, TargetingStub
from cluster.wire.targeting_conversions import catalogue_ref_from_proto
from router.catalogues_service import MAX_FETCHES
from tests.router.catalogue_support import ITEMS, store
from tests.router.conftest import MODEL, eventually


@pytest.fixture
async def targeted(make_cluster, served):
    cluster = await make_cluster()
    store(cluster, served)
    return cluster


@pytest.fixture
async def channel(targeted):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{targeted.router.grpc_port}") as channel:
        yield channel


async def ask(channel, metadata=(), **fields):
    given = {"model": MODEL, "catalogue": "ads", "context": "the mill"} | fields
    request = pb.TargetingRequest(**{name: value for name, value in given.items() if value is not ...})
    return await TargetingStub(channel).Select(request, metadata=metadata, timeout=10)


def condition(attribute, *values, **bounds):
    any_of = pb.TextValues(values=values) if values else None
    return pb.TargetingCondition(attribute=attribute, any_of=any_of, **bounds)


async def test_the_answer_is_that_of_http(channel, targeted):
    response = await ask(channel, k=2, filter=[condition("kind", "stone", "wood")])
    body = {
        "model": MODEL, "catalogue": "ads", "context": "the mill", "k": 2,
        "filter": {"kind": ["stone", "wood"]},
    }  # fmt: skip
    answer = (await targeted.http.post("/v1/targeting", json=body)).json()
    by_grpc, by_http = targeted.decode.seen.generates
    assert by_grpc.targeting == by_http.targeting
    assert by_grpc.prompt_token_ids == by_http.prompt_token_ids
    assert [(i.rank, i.item_id, i.text, i.logprob) for i in response.result.items] == [
        (i["rank"], i["id"], i["text"], i["logprob"]) for i in answer["items"]
    ]
    assert (response.catalogue, response.catalogue_version) == ("ads", 1)
    assert (response.finish_reason, response.result.decoding) == ("stop", "stepwise")
    assert response.usage.prompt_tokens == answer["usage"]["prompt_tokens"]
    assert response.request_id


async def test_all_fields(channel, targeted, tokenizer):
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="the mill")])
    metadata = (("x-headrace-prefill-hop", "never"), ("authorization", "Bearer k"))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await ask(channel, metadata)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND, "another tenant's"
    await ask(
        channel,
        context=...,
        chat=chat,
        beams=9,
        k=4,
        scoring="catalogue",
        diversity=0.5,
        seed=2**64 - 1,
        deadline_ms=9_000,
        session_id="s",
        filter=[condition("price", at_least=5, at_most=30)],
    )
    (generate,) = targeted.decode.seen.generates
    targeting = generate.targeting
    assert (targeting.k, targeting.beams, targeting.scoring, targeting.diversity) == (4, 9, "catalogue", 0.5)
    assert targeting.noise_seed == 2**64 - 1
    assert generate.session_id == ":s"
    assert tokenizer.token_text(generate.prompt_token_ids[0]) == "<|im_start|>"


BAD = [
    ({"model": "other"}, "NOT_FOUND", "model"),
    ({"catalogue": "adz"}, "NOT_FOUND", "catalogue"),
    ({"catalogue": ""}, "INVALID_ARGUMENT", "catalogue"),
    ({"context": ...}, "INVALID_ARGUMENT", "context"),
    ({"context": ""}, "INVALID_ARGUMENT", "context"),
    ({"context": ..., "chat": pb.ChatMessages()}, "INVALID_ARGUMENT", "chat"),
    ({"k": 0}, "INVALID_ARGUMENT", "k"),
    ({"k": 10**9}, "INVALID_ARGUMENT", "k"),
    ({"k": 9, "beams": 8}, "INVALID_ARGUMENT", "k"),
    ({"scoring": "luck"}, "INVALID_ARGUMENT", "scoring"),
    ({"diversity": float("nan")}, "INVALID_ARGUMENT", "diversity"),
    ({"filter": [condition("price")]}, "INVALID_ARGUMENT", "filter"),
    ({"filter": [condition("colour", "red")]}, "INVALID_ARGUMENT", "filter.colour"),
    ({"session_id": "a b"}, "INVALID_ARGUMENT", "session_id"),
]


async def test_bad_requests_name_their_field(channel):
    for fields, code, param in BAD:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await ask(channel, **fields)
        assert error.value.code().name == code, fields
        assert dict(error.value.trailing_metadata())["headrace-error-param"] == param, fields
        assert param.split(".")[0] in error.value.details()


async def test_a_cancelled_call_cancels_the_search(channel, targeted):
    targeted.decode.behaviour.hang_at = 0
    call = asyncio.ensure_future(ask(channel))
    await eventually(lambda: targeted.decode.num_live == 1)
    call.cancel()
    await eventually(lambda: targeted.decode.num_live == 0)


async def test_a_deadline_gives_what_there_is(channel, targeted):
    targeted.decode.behaviour.hang_at = 0
    response = await ask(channel, deadline_ms=50)
    assert (response.finish_reason, list(response.result.items)) == ("deadline", [])
    assert "deadline" in response.warning


@pytest.fixture
async def ref(channel, targeted) -> CatalogueRef:
    """As a worker elsewhere is told of it."""
    await ask(channel)
    (generate,) = targeted.decode.seen.generates
    return catalogue_ref_from_proto(generate.targeting.catalogue)


async def test_a_worker_elsewhere_fetches_the_file(ref, tmp_path):
    target = tmp_path / "fetched"
    await asyncio.to_thread(fetch_catalogue, ref, target)
    fetched = Catalogue.open(target)
    assert fetched.checksum == ref.checksum
    assert {fetched.text(index) for index in range(fetched.num_items)} == {item["text"] for item in ITEMS}
    assert list(tmp_path.iterdir()) == [target]
    cache = LocalCatalogues(tmp_path / "cache", fetch_catalogue)
    elsewhere = msgspec.structs.replace(ref, path="/not/here")
    assert (await asyncio.to_thread(cache.open, elsewhere)).num_items == len(ITEMS)


UNFETCHABLE = [
    ({"checksum": "0" * 32}, "NOT_FOUND"),
    ({"version": 2}, "NOT_FOUND"),
    ({"name": "../x"}, "NOT_FOUND"),
    ({"name": "*"}, "NOT_FOUND"),
    ({"fetch_address": ""}, "nobody"),
    ({"fetch_address": "127.0.0.1:1"}, "UNAVAILABLE"),
    ({"num_bytes": 100}, "more than the 100 bytes"),
    ({"num_bytes": 10**6}, "of 1000000"),
    ({"num_bytes": 10**12}, "at most"),
]


async def test_what_cannot_be_fetched_leaves_the_target_as_it_was(ref, tmp_path):
    target = tmp_path / "fetched"
    target.write_bytes(b"before")
    for change, said in UNFETCHABLE:
        wrong = msgspec.structs.replace(ref, **change)
        with pytest.raises(FetchError, match=said):
            await asyncio.to_thread(fetch_catalogue, wrong, target, timeout_s=5)
        assert target.read_bytes() == b"before"
        assert list(tmp_path.iterdir()) == [target]


class Liar:
    """Serves other bytes than were asked for."""

    def __init__(self, data):
        self._data = data

    async def Fetch(self, request, context):
        yield pb.CatalogueChunk(data=self._data)


async def test_a_file_that_comes_changed_is_refused(ref, tmp_path):
    from pathlib import Path

    from cluster.wire.headrace_pb2_grpc import add_CataloguesServicer_to_server

    data = bytearray(await asyncio.to_thread(Path(ref.path).read_bytes))
    data[-1] ^= 1
    server = grpc.aio.server()
    add_CataloguesServicer_to_server(Liar(bytes(data)), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        lying = msgspec.structs.replace(ref, fetch_address=f"127.0.0.1:{port}")
        with pytest.raises(FetchError, match="damaged"):
            await asyncio.to_thread(fetch_catalogue, lying, tmp_path / "fetched")
    finally:
        await server.stop(0)
    assert list(tmp_path.iterdir()) == []


async def test_fetches_at_once_are_bounded(targeted, channel, ref, served, monkeypatch):
    waiting, go_on = [], asyncio.Event()

    async def held(*arguments):
        waiting.append(arguments)
        await go_on.wait()

    monkeypatch.setattr("router.catalogues_service.asyncio.to_thread", held)
    request = pb.FetchCatalogueRequest(name=ref.name, version=ref.version, checksum=ref.checksum)
    stub = CataloguesStub(channel)
    calls = [asyncio.ensure_future(stub.Fetch(request).read()) for _ in range(MAX_FETCHES)]
    await eventually(lambda: len(waiting) == MAX_FETCHES)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.Fetch(request).read()
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    go_on.set()
    await asyncio.gather(*calls, return_exceptions=True)
