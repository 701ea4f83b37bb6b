"""A catalogue over a whole cluster: uploaded, asked, replaced, deleted; and what goes wrong on the way."""

import csv
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import httpx
import pytest

from cluster.catalogue.sample import sample_items
from cluster.wire import headrace_pb2 as pb
from cluster.wire.headrace_pb2_grpc import TargetingStub
from tests.e2e.failures import kill_replica, wait_for_workers
from tests.e2e.local_cluster import LocalCluster

pytestmark = pytest.mark.e2e

CONTEXT = "A reader of an article about hiking boots is shown an ad. The item that fits best:"
NUM_ITEMS = 24
ASKED = {"catalogue": "shop", "k": 5, "beams": 64}
"""A beam for every item: no answer depends on what a worker measured its steps to take."""


def shop_csv(version: int) -> bytes:
    """Ids and texts differ between versions."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["id", "text", "bid", "category"])
    for item in sample_items(NUM_ITEMS, seed=version):
        writer.writerow([f"v{version}-{item.id}", item.text, item.bid, item.category])
    return buffer.getvalue().encode()


def upload(cluster: LocalCluster, content: Any, name: str = "shop") -> httpx.Response:
    url = f"{cluster.http_url}/v1/catalogues/{name}"
    return httpx.put(url, content=content, headers={"content-type": "text/csv"}, timeout=60)


def shown(cluster: LocalCluster) -> dict[str, Any]:
    response = httpx.get(f"{cluster.http_url}/v1/catalogues/shop", timeout=30)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def post(cluster: LocalCluster, **fields: object) -> httpx.Response:
    body = {"model": cluster.model, "context": CONTEXT, **ASKED, **fields}
    body = {name: value for name, value in body.items() if value is not None}
    return httpx.post(f"{cluster.http_url}/v1/targeting", json=body, timeout=120)


def ask(cluster: LocalCluster, **fields: object) -> dict[str, Any]:
    return checked(post(cluster, **fields))


def checked(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    version = answer["catalogue"]["version"]
    assert all(item["id"].startswith(f"v{version}-") for item in answer["items"])
    return answer


def items_of(answer: dict[str, Any]) -> list[tuple[str, str, float]]:
    return [(item["id"], item["text"], item["logprob"]) for item in answer["items"]]


@pytest.fixture(scope="module")
def version(cluster: LocalCluster) -> int:
    """Of the catalogue that most tests ask."""
    response = upload(cluster, shop_csv(1))
    assert response.status_code == 200, response.text
    answer = response.json()
    assert (answer["version"], answer["items"], answer["num_faults"]) == (1, NUM_ITEMS, 0)
    return 1


@contextmanager
def asked_all_along(cluster: LocalCluster, **fields: object) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Two clients ask one question after the other; none may fail. Gives what has been answered by now."""
    answers: list[dict[str, Any]] = []
    is_over = threading.Event()

    def client() -> None:
        while not is_over.is_set():
            answers.append(ask(cluster, **fields))

    with ThreadPoolExecutor(2) as pool:
        clients = [pool.submit(client) for _ in range(2)]
        try:
            yield lambda: list(answers)
        finally:
            is_over.set()
        for one in clients:
            one.result()


def wait_until(is_true: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s"
        time.sleep(0.05)


@pytest.mark.parametrize("scoring", ["vocabulary", "catalogue"])
def test_the_same_question_has_the_same_answer_by_http_and_grpc(cluster, version, scoring):
    answer = ask(cluster, scoring=scoring)
    assert [item["rank"] for item in answer["items"]] == [1, 2, 3, 4, 5]
    scores = [item["logprob"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True)
    assert answer["finish_reason"] == "stop"
    assert items_of(ask(cluster, scoring=scoring)) == items_of(answer)
    fields = {**ASKED, "model": cluster.model, "context": CONTEXT, "scoring": scoring}
    with grpc.insecure_channel(cluster.grpc_address) as channel:
        response = TargetingStub(channel).Select(pb.TargetingRequest(**fields), timeout=60)
    assert [(i.item_id, i.text, i.logprob) for i in response.result.items] == items_of(answer)
    assert response.catalogue_version == answer["catalogue"]["version"]


def test_messages_and_filters(cluster, version):
    everything = ask(cluster, k=64)
    assert len(everything["items"]) == NUM_ITEMS
    assert len({item["id"] for item in everything["items"]}) == NUM_ITEMS
    messages = [{"role": "user", "content": CONTEXT}]
    chat = ask(cluster, context=None, messages=messages, k=64)
    assert {item["id"] for item in chat["items"]} == {item["id"] for item in everything["items"]}
    assert items_of(chat) != items_of(everything), "a chat template is another context"
    category = {item.text: item.category for item in sample_items(NUM_ITEMS, seed=version)}
    wanted = max(category.values(), key=list(category.values()).count)
    of_category = ask(cluster, k=64, filter={"category": wanted})
    kept = [item for item in items_of(everything) if category[item[1]] == wanted]
    assert items_of(of_category) == kept
    nothing = ask(cluster, filter={"category": "none such"})
    assert (nothing["items"], nothing["finish_reason"]) == ([], "stop")
    assert nothing["warning"]


def test_a_deadline_that_cannot_be_met_is_told(cluster, version):
    answer = ask(cluster, deadline_ms=1)
    assert answer["finish_reason"] == "deadline"
    assert len(answer["items"]) < 5
    assert ask(cluster)["finish_reason"] == "stop"


def test_what_cannot_be_asked_is_a_4xx(cluster, version):
    unknown = post(cluster, catalogue="no-such-shop")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "catalogue_not_found")
    many = post(cluster, k=10**9)
    assert (many.status_code, many.json()["error"]["param"]) == (400, "k")
    attribute = post(cluster, filter={"colour": "red"})
    assert (attribute.status_code, attribute.json()["error"]["param"]) == (400, "filter.colour")


def test_a_refused_or_broken_upload_leaves_the_version_that_serves(cluster, version):
    before = items_of(ask(cluster))
    rows = ["id,text", *(f"{row},item number {row}" for row in range(2, 70_010))]
    rows[70_000] = "70001,item,too many"
    refused = upload(cluster, "\n".join(rows).encode())
    assert refused.status_code == 400
    assert [fault["line"] for fault in refused.json()["faults"]] == [70_001]
    content = shop_csv(2)
    with socket.create_connection(("127.0.0.1", cluster.http_port)) as half:
        head = "PUT /v1/catalogues/shop HTTP/1.1\r\nhost: x\r\ncontent-type: text/csv\r\n"
        length = f"content-length: {len(content)}\r\n\r\n"
        half.sendall((head + length).encode() + content[: len(content) // 2])
        wait_until(lambda: shown(cluster)["state"] == "compiling")
    wait_until(lambda: shown(cluster)["state"] == "ready")
    assert shown(cluster)["version"] == version
    assert items_of(ask(cluster)) == before


def test_two_uploads_of_one_name_at_a_time_are_a_conflict(cluster):
    go_on = threading.Event()
    content = shop_csv(1)

    def slowly() -> Iterator[bytes]:
        yield content[:100]
        assert go_on.wait(60)
        yield content[100:]

    url = f"{cluster.http_url}/v1/catalogues/twice"
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(upload, cluster, slowly(), "twice")
        wait_until(lambda: httpx.get(url, timeout=30).status_code == 200)
        second = upload(cluster, content, "twice")
        go_on.set()
        assert first.result().status_code == 200
    assert (second.status_code, second.json()["error"]["code"]) == (409, "upload_under_way")
    assert httpx.delete(url, timeout=30).status_code == 200


def test_a_new_version_replaces_the_old_while_it_is_asked_and_deleted_is_gone(cluster):
    assert upload(cluster, shop_csv(1), "fresh").status_code == 200
    with asked_all_along(cluster, catalogue="fresh") as answered:
        wait_until(lambda: len(answered()) >= 2)
        assert upload(cluster, shop_csv(2), "fresh").json()["version"] == 2
        assert ask(cluster, catalogue="fresh")["catalogue"]["version"] == 2
        wait_until(lambda: answered()[-1]["catalogue"]["version"] == 2)
    by_version = {answer["catalogue"]["version"]: [] for answer in answered()}
    for answer in answered():
        by_version[answer["catalogue"]["version"]].append(items_of(answer))
    assert set(by_version) == {1, 2}
    for answers in by_version.values():
        assert all(items == answers[0] for items in answers)
    assert httpx.delete(f"{cluster.http_url}/v1/catalogues/fresh", timeout=30).status_code == 200
    gone = post(cluster, catalogue="fresh")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "catalogue_not_found")


@pytest.mark.slow
def test_a_worker_killed_while_it_searches_costs_nothing_but_time(cluster, version):
    undisturbed = items_of(ask(cluster))
    retries = cluster.metrics().total("headrace_retries_total", what="decode")
    answers: list[dict[str, Any]] = []
    is_killed = threading.Event()

    def client() -> None:
        while True:
            response = post(cluster)
            is_last = is_killed.is_set()
            if is_last and response.status_code == 503 and response.json()["error"]["code"] == "no_worker":
                return  # not placed before the worker was gone: refused until there is another
            answers.append(checked(response))
            if is_last:
                return

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client) for _ in range(4)]
        wait_until(lambda: len(answers) >= 2 or any(one.done() for one in clients))
        is_killed.set()
        kill_replica(cluster, "DecodeWorker")
        for one in clients:
            one.result()
    assert all(items_of(answer) == undisturbed for answer in answers)
    assert cluster.metrics().total("headrace_retries_total", what="decode") > retries
    wait_for_workers(cluster, "decode")
