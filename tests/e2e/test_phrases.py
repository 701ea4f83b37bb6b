"""Phrases from their upload to tokens: over a router and a decode worker in this process; over a cluster."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest

from cluster.catalogue.fetch import fetch_catalogue
from cluster.catalogue.file import Catalogue
from cluster.catalogue.local import LocalCatalogues
from cluster.config import DecodeConfig, HeadraceConfig, PlacementConfig, RouterConfig
from cluster.ids import Epoch, WorkerId
from cluster.messages import PROTOCOL_VERSION, CatalogueRef, WorkerAddress, WorkerRecord
from cluster.model_card import ServedModel
from decode_workers.drafting.phrase_files import PhraseFiles
from decode_workers.step_batch import Float32Array, StepBatch
from decode_workers.worker import DecodeWorker
from router.app import Router
from tests.decode_workers.draft_support import Serving
from tests.decode_workers.support import CARD, EOS, TOKENIZER, HashExecutor
from tests.e2e.local_cluster import LocalCluster
from tests.router.conftest import MemoryStore, StaticDirectory, eventually

JSON_LINES = {"content-type": "application/x-ndjson"}
SAID = "Our new tent is waterproof, light as a feather, and delivered free to your door."
PHRASES = "".join(
    json.dumps({"text": text}) + "\n"
    for text in ("light as a feather", "delivered free to your door", "tent is waterproof")
)


class Elsewhere(LocalCatalogues):
    """On another machine than the router's."""

    def open(self, ref: CatalogueRef, tenant: str = "") -> Catalogue:
        return super().open(msgspec.structs.replace(ref, path="/not/here"), tenant)


class Shop:
    """A decode worker whose model says SAID, and a router before it that the worker shares no file with."""

    role = "decode"

    def __init__(self, folder: Path) -> None:
        self.executor = HashExecutor(num_blocks=200)
        self.executor.spoil = self._say
        self.may_fetch = asyncio.Event()
        self.fetched: list[str] = []
        self._loop = asyncio.get_running_loop()
        self.local = Elsewhere(folder / "fetched", self._fetch)
        files = PhraseFiles(self.local, TOKENIZER, CARD.vocab_size)
        self.drafter = Serving(files)
        self.worker = DecodeWorker(
            self.executor,
            TOKENIZER,
            CARD,
            DecodeConfig(),
            epoch=lambda: Epoch(1),
            catalogues=self.local,
            drafter=self.drafter,
        )
        self.http: httpx.AsyncClient

    def _say(self, batch: StepBatch, logits: Float32Array) -> None:
        said = TOKENIZER.encode(SAID, allow_special=False)
        is_read = batch.needs_logits if batch.needs_best is None else batch.needs_logits | batch.needs_best
        for place, position in enumerate(batch.positions[np.flatnonzero(is_read)].tolist()):
            logits[place] = 0
            logits[place, said[position] if position < len(said) else EOS] = 100.0

    def _fetch(self, ref: CatalogueRef, path: Path) -> None:
        """Once it may."""
        asyncio.run_coroutine_threadsafe(self.may_fetch.wait(), self._loop).result(60)
        fetch_catalogue(ref, path)
        self.fetched.append(ref.name)

    @property
    def record(self) -> WorkerRecord:
        address = WorkerAddress(
            worker_id=WorkerId("decode"), epoch=Epoch(1), grpc_address=self.worker.address, host_id="here"
        )
        return WorkerRecord(
            address=address,
            role="decode",
            model=CARD.name,
            protocol_version=PROTOCOL_VERSION,
            layout_fingerprint=self.worker.layout.fingerprint,
            block_size_tokens=self.worker.layout.block_size_tokens,
            status=self.worker.status(),
        )

    async def num_steps(self, campaign: str, **fields: object) -> int:
        """Of one answer, which is always the same. A campaign of its own: nothing was learned in it."""
        before = len(self.executor.batches)
        body = {"model": CARD.name, "prompt": [1], "max_tokens": 90, "temperature": 0, "campaign": campaign}
        response = await self.http.post("/v1/completions", json={**body, **fields})
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["text"] == SAID
        return len(self.executor.batches) - before


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    async with AsyncExitStack() as stack:
        shop = Shop(tmp_path)
        await shop.worker.start()
        stack.push_async_callback(shop.worker.stop, 0)
        directory = StaticDirectory()
        directory.workers.append(shop)
        config = HeadraceConfig(
            router=RouterConfig(host="127.0.0.1", grpc_port=0),
            placement=PlacementConfig(lookup_timeout_s=1.0),
        )
        served = ServedModel(card=CARD, tokenizer_json=TOKENIZER._json.encode())
        router = Router(served, config, MemoryStore(), directory, catalogue_folder=tmp_path / "catalogues")
        await router.start()
        stack.push_async_callback(router.stop)
        transport = httpx.ASGITransport(router.asgi)
        shop.http = await stack.enter_async_context(
            httpx.AsyncClient(transport=transport, base_url="http://router", timeout=60)
        )
        yield shop


async def test_uploaded_phrases_are_drafted_once_they_are_fetched(shop: Shop) -> None:
    uploaded = await shop.http.put("/v1/catalogues/house", content=PHRASES, headers=JSON_LINES)
    assert uploaded.status_code == 200, uploaded.text
    without = await shop.num_steps("a")
    on_its_way = await shop.num_steps("b", phrases="house")
    assert on_its_way == without, "nobody waits"
    shop.may_fetch.set()
    await eventually(lambda: shop.fetched == ["house"] and len(shop.local._open) == 1)
    with_phrases = await shop.num_steps("c", phrases="house")
    assert with_phrases < without - 30, "of 56 letters in phrases"
    assert await shop.num_steps("d", phrases="house", speculation=False) > without
    assert await shop.num_steps("e") == without, "another request's phrases are not its own"
    assert shop.fetched == ["house"]


async def test_a_catalogue_that_is_gone_is_not_found_and_one_that_cannot_be_fetched_is_done_without(
    shop: Shop,
) -> None:
    await shop.http.put("/v1/catalogues/house", content=PHRASES, headers=JSON_LINES)
    without = await shop.num_steps("a")
    await shop.num_steps("b", phrases="house")
    assert (await shop.http.delete("/v1/catalogues/house")).status_code == 200
    body = {"model": CARD.name, "prompt": [1], "phrases": "house"}
    response = await shop.http.post("/v1/completions", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "catalogue_not_found")
    # Deleted while it was on its way: the fetch fails, and the worker goes on.
    shop.may_fetch.set()
    await eventually(lambda: not any(thread.name == "phrases" for thread in threading.enumerate()))
    assert shop.fetched == []
    assert await shop.num_steps("c") == without
    # What fails is not tried again at once; another version is.
    await shop.http.put("/v1/catalogues/house", content=PHRASES, headers=JSON_LINES)
    assert await shop.num_steps("d", phrases="house") == without
    more = PHRASES + '{"text": "Our new tent"}\n'
    await shop.http.put("/v1/catalogues/house", content=more, headers=JSON_LINES)
    await shop.num_steps("e", phrases="house")
    await eventually(lambda: len(shop.local._open) == 1)
    assert await shop.num_steps("f", phrases="house") < without - 30


@pytest.mark.e2e
def test_the_packaged_model_says_the_same_with_phrases(cluster: LocalCluster) -> None:
    asked = {
        "model": cluster.model,
        "prompt": "The mill stands at the river. Its wheel",
        "max_tokens": 32,
        "temperature": 0,
        "seed": 1,
    }

    def complete(**fields: object) -> httpx.Response:
        return httpx.post(f"{cluster.http_url}/v1/completions", json={**asked, **fields}, timeout=120)

    plain = complete(speculation=False).json()["choices"][0]["text"]
    words = plain.split()
    phrases = {" ".join(words[at : at + 5]) for at in range(0, len(words), 4)}
    lines = "".join(json.dumps({"text": phrase}) + "\n" for phrase in phrases)
    url = f"{cluster.http_url}/v1/catalogues/said"
    assert httpx.put(url, content=lines, headers=JSON_LINES, timeout=60).status_code == 200
    for at in range(3):
        response = complete(phrases="said", campaign=f"phrases {at}")
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["text"] == plain
    assert httpx.delete(url, timeout=30).status_code == 200
    gone = complete(phrases="said")
    assert (gone.status_code, gone.json()["error"]["param"]) == (404, "phrases")
