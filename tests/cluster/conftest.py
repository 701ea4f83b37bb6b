"""One real redis-server for all tests of the cluster package; each test has a model name of its own."""

import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from cluster.placement.embedded import EmbeddedRedis
from cluster.placement.redis_store import RedisPlacementStore, connect

_model_numbers = itertools.count()

StoreFactory = Callable[..., RedisPlacementStore]


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def model() -> str:
    return f"test-model/{next(_model_numbers)}"


@pytest.fixture
async def new_store(redis_server: EmbeddedRedis, model: str) -> AsyncIterator[StoreFactory]:
    """Makes stores of this test's model; each has connections of its own, all closed at the end."""
    async with contextlib.AsyncExitStack() as stack:

        def make(
            url: str = redis_server.url,
            model: str = model,
            block_ttl_s: float = 60.0,
            op_timeout_s: float = 5.0,
            max_connections: int = 4,
        ) -> RedisPlacementStore:
            client = connect(url, max_connections=max_connections)
            store = RedisPlacementStore(client, model, block_ttl_s=block_ttl_s, op_timeout_s=op_timeout_s)
            stack.push_async_callback(store.close)
            return store

        yield make


@pytest.fixture
def store(new_store: StoreFactory) -> RedisPlacementStore:
    return new_store()
