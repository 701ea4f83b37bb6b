"""/v1/catalogues: uploads of every kind, good and bad, beside the version that serves."""

import asyncio
import contextlib
import json
import tracemalloc

import msgspec
import psutil
import pytest

from cluster.catalogue.file_lock import try_locked
from cluster.catalogue.store import CatalogueNameError, CatalogueStore, _lock_path
from cluster.config import CatalogueConfig
from router.catalogues import check_name
from router.errors import RequestError
from router.upload import BUFFER_BYTES, spool_body
from router.uploads import Uploads
from tests.router.catalogue_support import CSV, ITEMS, JSON_LINES, items_of, jsonl, many, put, store
from tests.router.conftest import MODEL, eventually

KEY = {"authorization": "Bearer k-1"}


def spooled(cluster):
    return list((cluster.catalogue_folder / ".uploads").glob("*"))


async def test_an_upload_is_compiled_and_shown(cluster, tokenizer):
    response = await put(cluster)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert (answer["name"], answer["object"], answer["version"], answer["items"]) == (
        "ads", "catalogue.upload", 1, 4,
    )  # fmt: skip
    num_tokens = sum(len(tokenizer.encode(item["text"], allow_special=False)) + 1 for item in ITEMS)
    assert answer["tokens"] == num_tokens
    assert (answer["num_faults"], answer["faults"]) == (0, [])
    assert set(answer["timings_ms"]) == {"receive", "read", "sort", "write"}
    shown = (await cluster.http.get("/v1/catalogues/ads")).json()
    assert shown["state"] == "ready"
    assert set(shown["attributes"]) == {"bid", "kind", "price", "is_new"}
    assert (shown["items"], shown["nodes"], shown["bytes"]) == (4, answer["nodes"], answer["bytes"])
    assert shown["progress"] is None
    assert (await cluster.http.get("/v1/catalogues")).json() == {"object": "list", "data": [shown]}
    assert spooled(cluster) == []
    again = await put(cluster, content=b'text,id\n"mill, wheel",7\n', headers=CSV)
    assert (again.json()["version"], again.json()["items"]) == (2, 1)


async def test_deleted_is_gone(cluster, served):
    store(cluster, served)
    deleted = await cluster.http.delete("/v1/catalogues/ads")
    assert deleted.json() == {"name": "ads", "object": "catalogue", "deleted": True}
    for response in (
        await cluster.http.delete("/v1/catalogues/ads"),
        await cluster.http.get("/v1/catalogues/ads"),
    ):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "catalogue_not_found"
    assert (await cluster.http.get("/v1/catalogues")).json()["data"] == []


async def test_tenants_do_not_see_one_another(cluster, served):
    store(cluster, served)
    response = await put(cluster, content=jsonl(ITEMS[:1]), headers={**JSON_LINES, **KEY})
    assert (response.json()["version"], response.json()["items"]) == (1, 1)
    assert await items_of(cluster) == (4, 1)
    mine = (await cluster.http.get("/v1/catalogues/ads", headers=KEY)).json()
    assert mine["items"] == 1
    await cluster.http.delete("/v1/catalogues/ads", headers=KEY)
    assert await items_of(cluster) == (4, 1)


async def test_a_broken_line_deep_inside_is_named_and_the_version_before_serves(cluster, served):
    store(cluster, served)
    rows = ["id,text,price"] + [f"{row},item number {row},{row % 7}" for row in range(2, 70_010)]
    rows[70_000] = "70001,item,1,too many"
    content = "\n".join(rows).encode()
    refused = await put(cluster, content=content, headers=CSV)
    assert refused.status_code == 400
    answer = refused.json()
    assert [fault["line"] for fault in answer["faults"]] == [70_001]
    assert "4 fields" in answer["faults"][0]["message"]
    assert answer["num_faults"] == 1
    assert answer["error"]["code"] == "invalid_catalogue"
    assert "skip_bad" in answer["error"]["message"]
    assert await items_of(cluster) == (4, 1)


async def test_bad_lines_can_be_left_out(cluster):
    content = jsonl(ITEMS) + b'{"txt": "x"}\nnot json\n'
    refused = await put(cluster, content=content)
    assert [fault["line"] for fault in refused.json()["faults"]] == [5, 6]
    assert (await cluster.http.get("/v1/catalogues/ads")).status_code == 404
    kept = await put(cluster, content=content, skip_bad="true")
    assert (kept.status_code, kept.json()["items"], kept.json()["num_faults"]) == (200, 4, 2)
    assert [fault["line"] for fault in kept.json()["faults"]] == [5, 6]


@pytest.mark.parametrize(
    ("content", "headers", "said"),
    [
        (b"", JSON_LINES, "no items"),
        (b"", CSV, "empty"),
        (b"name;price\n", CSV, "text"),
        (jsonl(ITEMS)[:-20], JSON_LINES, "cut"),
        (b'text\n"half', CSV, "cut"),
        (many(11), JSON_LINES, "more than 10 items"),
    ],
    ids=["empty", "empty csv", "no text column", "cut", "cut csv", "too many"],
)
async def test_what_is_no_catalogue_is_a_400(make_cluster, content, headers, said):
    cluster = await make_cluster(catalogue={"max_items": 10})
    response = await put(cluster, content=content, headers=headers)
    assert response.status_code == 400, response.text
    assert said in response.json()["error"]["message"]
    assert (await cluster.http.get("/v1/catalogues/ads")).status_code == 404
    assert spooled(cluster) == []


async def test_what_is_refused_before_it_is_read(make_cluster):
    cluster = await make_cluster(catalogue={"max_upload_bytes": 1000})
    for headers, param in [
        ({}, "content-type"),
        ({"content-type": "application/json"}, "content-type"),
        ({"content-type": "text/csv; charset=latin-1"}, "content-type"),
        ({**CSV, "content-encoding": "gzip"}, "content-encoding"),
    ]:
        response = await put(cluster, headers=headers)
        assert (response.status_code, response.json()["error"]["param"]) == (415, param)
    assert (await put(cluster, content=b"x" * 1001)).status_code == 413
    for name in ("Ads", "-ads", "a" * 65, "%2e%2e", "a b", "ä"):
        for call in (cluster.http.get, cluster.http.delete):
            assert (await call(f"/v1/catalogues/{name}")).status_code == 400
        assert (await put(cluster, name)).json()["error"]["param"] == "catalogue"
    for params in ({"skip_bad": "perhaps"}, {"skipbad": "true"}):
        assert (await put(cluster, **params)).status_code == 400
    assert spooled(cluster) == []


@pytest.mark.parametrize("name", ["ads", "a", "0.-_", "a" * 64, "a" * 65, "", "A", ".a", "a/b", "a\n", "ä"])
def test_names_are_the_stores(tmp_path, name):
    try:
        CatalogueStore(tmp_path).get(name)
    except CatalogueNameError:
        with pytest.raises(RequestError):
            check_name(name)
    except LookupError:
        check_name(name)


def stream(*parts):
    """A body that comes in parts; an Event among them is waited for."""

    async def body():
        for part in parts:
            if isinstance(part, asyncio.Event):
                await part.wait()
            else:
                yield part

    return body()


async def test_a_second_upload_of_the_name_is_a_conflict(cluster, served):
    store(cluster, served)
    go_on = asyncio.Event()
    first = asyncio.create_task(put(cluster, content=stream(jsonl(ITEMS[:2]), go_on, b"")))
    await eventually(lambda: cluster.router._uploads.progress("", "ads") is not None)
    shown = (await cluster.http.get("/v1/catalogues/ads")).json()
    assert (shown["state"], shown["version"], shown["progress"]["phase"]) == ("compiling", 1, "receive")
    new = (await cluster.http.get("/v1/catalogues")).json()["data"]
    assert [(one["name"], one["state"]) for one in new] == [("ads", "compiling")]
    second = await put(cluster)
    assert (second.status_code, second.json()["error"]["code"]) == (409, "upload_under_way")
    assert (await cluster.http.delete("/v1/catalogues/ads")).status_code == 409
    other = await put(cluster, "others")
    assert other.status_code == 200
    go_on.set()
    assert (await first).status_code == 200
    assert await items_of(cluster) == (2, 2)


async def test_uploads_at_once_and_catalogues_are_bounded(make_cluster, served, monkeypatch):
    cluster = await make_cluster(catalogue={"max_catalogues": 1})
    store(cluster, served)
    full = await put(cluster, "more")
    assert (full.status_code, full.json()["error"]["code"]) == (400, "too_many_catalogues")
    monkeypatch.setattr("router.uploads.MAX_UPLOADS", 0)
    busy = await put(cluster)
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "10")


async def test_another_routers_upload_is_a_conflict_too(cluster):
    catalogue = CatalogueStore(cluster.catalogue_folder)._path("", "ads")
    catalogue.parent.mkdir()
    with try_locked(_lock_path(catalogue)):
        assert (await put(cluster)).status_code == 409


async def raw_upload(url, head, body):
    _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    start = "PUT /v1/catalogues/ads HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-ndjson\r\n"
    writer.write(start.encode() + head + b"\r\n" + body)
    await writer.drain()
    return writer


async def test_a_client_that_leaves_half_way_leaves_nothing(cluster, serve, served):
    store(cluster, served)
    url = await serve(cluster)
    content = jsonl(ITEMS)
    writer = await raw_upload(url, b"content-length: %d\r\n" % len(content), content[: len(content) // 2])
    await eventually(lambda: len(spooled(cluster)) == 1)
    writer.close()
    await eventually(lambda: spooled(cluster) == [])
    assert await items_of(cluster) == (4, 1)
    labels = {"route": "catalogues", "outcome": "cancelled"}
    await eventually(lambda: cluster.metric("headrace_requests_total", **labels) == 1)


async def test_a_client_that_leaves_while_it_compiles_ends_that(cluster, serve, served):
    store(cluster, served)
    url = await serve(cluster)
    content = many(150_000)
    writer = await raw_upload(url, b"content-length: %d\r\n" % len(content), content)

    def phase():
        progress = cluster.router._uploads.progress("", "ads")
        return progress and progress.phase

    await eventually(lambda: phase() in ("read", "sort", "write"), timeout_s=20)
    shown = (await cluster.http.get("/v1/catalogues/ads")).json()
    assert (shown["state"], shown["version"]) == ("compiling", 1)
    assert shown["progress"]["done"] > 0
    asked = {"model": MODEL, "catalogue": "ads", "context": "the mill"}
    assert len((await cluster.http.post("/v1/targeting", json=asked)).json()["items"]) == 4
    writer.close()
    await eventually(lambda: phase() is None, timeout_s=20)
    assert spooled(cluster) == []
    assert await items_of(cluster) == (4, 1)
    assert (await put(cluster)).json()["version"] == 2


def compilers():
    """The processes that compile for this one."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "router.catalogue_process" in process.cmdline():
                found.append(process)
    return found


async def test_a_compiling_process_that_is_killed_changes_nothing(cluster, served):
    store(cluster, served)
    upload = asyncio.create_task(put(cluster, content=many(50_000)))
    await eventually(lambda: len(compilers()) == 1, timeout_s=20)
    compilers()[0].kill()
    assert ((await upload).status_code, (await upload).json()["error"]["code"]) == (500, "internal_error")
    assert await items_of(cluster) == (4, 1)
    assert spooled(cluster) == []
    assert (await put(cluster)).json()["version"] == 2


async def test_a_body_shorter_than_it_said_is_a_400(cluster, served):
    store(cluster, served)
    content = jsonl(ITEMS)
    headers = {**JSON_LINES, "content-length": str(len(content) + 10)}
    response = await put(cluster, content=content, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "body_cut_short")
    assert await items_of(cluster) == (4, 1)


async def test_a_body_that_stalls_is_given_up(tmp_path):
    async def receive():
        await asyncio.sleep(3600)

    with pytest.raises(RequestError) as error:
        await spool_body({}, receive, tmp_path / "body", 100, idle_timeout_s=0.01)
    assert error.value.status == 408


async def test_memory_does_not_grow_with_the_body(tmp_path):
    num_parts, part = 1024, b"x" * 65536
    left = num_parts

    async def receive():
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": part, "more_body": left > 0}

    tracemalloc.start()
    try:
        num_bytes = await spool_body({}, receive, tmp_path / "body", 2**30, idle_timeout_s=5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num_bytes == (tmp_path / "body").stat().st_size == num_parts * len(part)
    assert peak < 4 * BUFFER_BYTES


async def test_what_a_killed_router_left_is_cleared_by_the_next(make_cluster, served):
    cluster = await make_cluster()
    folder = cluster.catalogue_folder / ".uploads"
    folder.mkdir()
    (folder / "dead.upload").write_bytes(b"x")
    Uploads(cluster.router._catalogues, CatalogueConfig())
    assert spooled(cluster) == []


async def test_a_catalogue_of_another_model_is_refused(make_cluster, served):
    cluster = await make_cluster()
    card = msgspec.structs.replace(served.card, fingerprint="another")
    store(cluster, msgspec.structs.replace(served, card=card))
    asked = {"model": MODEL, "catalogue": "ads", "context": "the mill"}
    response = await cluster.http.post("/v1/targeting", json=asked)
    assert (response.status_code, response.json()["error"]["code"]) == (409, "catalogue_of_another_model")
    assert json.loads(response.text)["error"]["param"] == "catalogue"
