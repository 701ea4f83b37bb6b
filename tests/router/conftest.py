"""A served model with a small tokenizer, and a router over scripted workers on loopback."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec
import pytest
import tokenizers
import uvicorn

from cluster.config import CatalogueConfig, HeadraceConfig, PlacementConfig, RouterConfig
from cluster.ids import SessionId
from cluster.messages import SessionRecord, WorkerRecord
from cluster.model_card import ModelCard, ServedModel
from cluster.placement.choose import NO_HITS
from cluster.placement.store import IndexHits, PlacementUnavailableError
from cluster.text import Tokenizer
from router.app import Router
from tests.router.scripted_workers import WORDS, ScriptedDecode, ScriptedPrefill

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MODEL = "scripted"
MAX_CONTEXT = 256


def _tokenizer_json() -> bytes:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(SPECIALS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS * 4, "user assistant system hello world you are"], trainer)
    return tokenizer.to_str().encode()


@pytest.fixture(scope="session")
def served() -> ServedModel:
    tokenizer_json = _tokenizer_json()
    vocab_size = len(json.loads(tokenizer_json)["model"]["vocab"])
    card = ModelCard(
        name=MODEL,
        architecture="llama",
        fingerprint="fingerprint-1",
        vocab_size=vocab_size,
        max_context_tokens=MAX_CONTEXT,
        bos_token_id=None,
        add_bos_token=False,
        eos_token_ids=(0, 2),
        chat_template=CHAT_TEMPLATE,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        created_unix_s=1_700_000_000,
        num_parameters=1,
        quantization="none",
    )
    return ServedModel(card=card, tokenizer_json=tokenizer_json)


@pytest.fixture(scope="session")
def tokenizer(served: ServedModel) -> Tokenizer:
    return Tokenizer.of(served)


class StaticDirectory:
    """A directory whose records a test sets itself."""

    def __init__(self) -> None:
        self.workers: list[object] = []
        self.outstanding: dict[str, int] = {}

    def snapshot(self, role: str | None = None) -> Sequence[WorkerRecord]:
        return tuple(worker.record for worker in self.workers if role is None or worker.role == role)

    def local_adjust(self, worker_id: str, num_tokens: int) -> None:
        self.outstanding[worker_id] = self.outstanding.get(worker_id, 0) + num_tokens


class MemoryStore:
    """The part of a PlacementStore that a router uses."""

    def __init__(self) -> None:
        self.sessions: dict[SessionId, SessionRecord] = {}
        self.lookups: list[tuple[int, SessionId | None]] = []
        self.hits: IndexHits = NO_HITS
        self.is_down = False
        self.delay_s = 0.0

    async def lookup(self, hashes, session_id):
        self.lookups.append((len(hashes), session_id))
        if self.is_down:
            raise PlacementUnavailableError("down")
        await asyncio.sleep(self.delay_s)
        return msgspec.structs.replace(self.hits, session=self.sessions.get(session_id))

    async def put_session(self, session_id, record, ttl_ms):
        if self.is_down:
            raise PlacementUnavailableError("down")
        self.sessions[session_id] = record


@dataclass
class Cluster:
    """A started router with its scripted surroundings."""

    router: Router
    directory: StaticDirectory
    store: MemoryStore
    decodes: list[ScriptedDecode] = field(default_factory=list)
    prefills: list[ScriptedPrefill] = field(default_factory=list)
    catalogue_folder: Path | None = None
    http: httpx.AsyncClient | None = None

    @property
    def decode(self) -> ScriptedDecode:
        return self.decodes[0]

    def metric(self, name: str, **labels: str) -> float:
        return self.router.metrics.registry.get_sample_value(name, labels) or 0.0


MakeCluster = Callable[..., Awaitable[Cluster]]


@pytest.fixture
async def make_cluster(
    served: ServedModel, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[MakeCluster]:
    """`await make_cluster(decodes=2, prefills=1, max_inflight_requests=...)`."""

    def refusal(hello) -> str | None:
        return None if hello.model_fingerprint == served.card.fingerprint else "model fingerprint differs"

    async with AsyncExitStack() as stack:

        async def make(
            *,
            decodes: int = 1,
            prefills: int = 0,
            model: ServedModel = served,
            lookup_timeout_s: float = 1.0,
            catalogue: Mapping[str, object] | None = None,
            **router: object,
        ) -> Cluster:
            directory, store = StaticDirectory(), MemoryStore()
            decode_workers = [ScriptedDecode(f"decode-{i}", tokenizer, refusal) for i in range(decodes)]
            prefill_workers = [ScriptedPrefill(f"prefill-{i}") for i in range(prefills)]
            for worker in (*decode_workers, *prefill_workers):
                await worker.start()
                stack.push_async_callback(worker.stop)
            directory.workers += [*decode_workers, *prefill_workers]
            config = HeadraceConfig(
                router=RouterConfig(
                    **{"host": "127.0.0.1", "grpc_port": 0, "recovery_timeout_s": 1.0} | router
                ),
                placement=PlacementConfig(lookup_timeout_s=lookup_timeout_s),
                catalogue=CatalogueConfig(**catalogue or {}),
            )
            folder = tmp_path_factory.mktemp("catalogues")
            cluster = Cluster(
                Router(model, config, store, directory, catalogue_folder=folder),
                directory,
                store,
                decode_workers,
                prefill_workers,
                folder,
            )
            await cluster.router.start()
            stack.push_async_callback(cluster.router.stop)
            transport = httpx.ASGITransport(cluster.router.asgi, raise_app_exceptions=False)
            cluster.http = await stack.enter_async_context(
                httpx.AsyncClient(transport=transport, base_url="http://router", timeout=20)
            )
            return cluster

        yield make


@pytest.fixture
async def cluster(make_cluster: MakeCluster) -> Cluster:
    return await make_cluster()


Serve = Callable[[Cluster], Awaitable[str]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Serves a cluster's router on a loopback port with a real HTTP server; returns its URL."""
    async with AsyncExitStack() as stack:

        async def start(cluster: Cluster) -> str:
            config = uvicorn.Config(
                cluster.router.asgi, host="127.0.0.1", port=0, log_level="error", lifespan="off"
            )
            server = uvicorn.Server(config)
            server.capture_signals = contextlib.nullcontext  # the test process keeps its own
            task = asyncio.create_task(server.serve())
            await eventually(lambda: server.started)

            async def stop() -> None:
                server.should_exit = True
                server.force_exit = True
                await task

            stack.push_async_callback(stop)
            port = server.servers[0].sockets[0].getsockname()[1]
            return f"http://127.0.0.1:{port}"

        yield start


async def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Waits for something that has to happen soon."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for knows nothing of events
            await asyncio.sleep(0.005)
