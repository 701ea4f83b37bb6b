"""Catalogues for router tests: small ones, and the calls that upload them."""

import json

from cluster.catalogue.compile import CompileTarget
from cluster.catalogue.store import CatalogueStore
from cluster.text import Tokenizer
from router.catalogues import end_token_of

ITEMS = [
    {"id": "a", "text": "mill wheel", "bid": 0.5, "kind": "wood", "price": 10},
    {"id": "b", "text": "mill water", "bid": 0.25, "kind": "stone", "price": 20.5},
    {"id": "c", "text": "headrace channel", "kind": "stone"},
    {"id": "d", "text": "full speed", "price": 5, "is_new": True},
]
JSON_LINES = {"content-type": "application/x-ndjson"}
CSV = {"content-type": "text/csv"}


def jsonl(items):
    return "".join(json.dumps(item) + "\n" for item in items).encode()


def many(count):
    return jsonl({"text": f"item number {index}"} for index in range(count))


def store(cluster, served, name="ads", items=ITEMS):
    """What an upload ends in, without its process."""
    card = served.card
    target = CompileTarget(
        tokenizer=Tokenizer.of(served), end_token=end_token_of(served), fingerprint=card.fingerprint
    )
    CatalogueStore(cluster.catalogue_folder).put(name, [jsonl(items)], upload_format="jsonl", target=target)


async def put(cluster, name="ads", content=None, headers=JSON_LINES, **params):
    content = jsonl(ITEMS) if content is None else content
    return await cluster.http.put(
        f"/v1/catalogues/{name}", content=content, headers=headers, params=params, timeout=60
    )


async def items_of(cluster, name="ads"):
    response = await cluster.http.get(f"/v1/catalogues/{name}")
    return response.json()["items"], response.json()["version"]
