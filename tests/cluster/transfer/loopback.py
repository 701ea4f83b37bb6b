"""A real receiver on loopback, sinks that keep what they are given, and KV worth checking."""

import asyncio
import gc
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest

from cluster.ids import Epoch, HandoffId, WorkerId, new_handoff_id
from cluster.kv_layout import KvLayout
from cluster.messages import WorkerAddress
from cluster.transfer import HandoffError, HandoffHeader, KvChunk
from cluster.transfer.host_id import host_id
from cluster.transfer.nixl import installed_package
from cluster.transfer.nixl_endpoint import NixlEndpoint
from cluster.transfer.receiver import HandoffReceiver
from cluster.wire import headrace_pb2_grpc as pb_grpc

LAYOUT = KvLayout(
    model_fingerprint="test", num_layers=3, num_kv_heads=2, head_dim=4, dtype="float32", block_size_tokens=4
)
EPOCH = Epoch(7)


def kv_bytes(layer: int, first_token: int, num_tokens: int, layout: KvLayout = LAYOUT) -> bytes:
    """One layer of tokens, every element a function of its place: K then V."""
    tokens = np.arange(first_token, first_token + num_tokens, dtype=np.float32)
    elements = np.arange(layout.num_kv_heads * layout.head_dim, dtype=np.float32)
    k = tokens[:, None] * 1000 + elements + layer * 100_000
    return np.stack([k, -k - 1]).tobytes()


def chunk(layer: int, first_token: int, num_tokens: int, layout: KvLayout = LAYOUT) -> KvChunk:
    return KvChunk(
        layer, first_token, num_tokens, memoryview(kv_bytes(layer, first_token, num_tokens, layout))
    )


def chunks_of(
    first_token: int, num_tokens: int, step_tokens: int = 4, layout: KvLayout = LAYOUT
) -> list[KvChunk]:
    """As an engine exports: each run of tokens through all layers, then the next run."""
    end = first_token + num_tokens
    return [
        chunk(layer, start, min(step_tokens, end - start), layout)
        for start in range(first_token, end, step_tokens)
        for layer in range(layout.num_layers)
    ]


async def streamed(chunks: list[KvChunk]) -> AsyncIterator[KvChunk]:
    for each in chunks:
        yield each


class KeepingSink:
    """Keeps K and V by (layer, token); `ended` is set by commit or abort."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[int, int], bytes] = {}
        self.num_writes = 0
        self.committed: int | None = None
        self.aborted: HandoffError | None = None
        self.ended = threading.Event()
        self.before_write: Callable[[KvChunk], None] = lambda _chunk: None

    def write(self, chunk: KvChunk) -> None:
        self.before_write(chunk)
        assert not self.ended.is_set(), "written to after its end"
        self.num_writes += 1
        k, v = np.frombuffer(chunk.data, dtype=np.uint8).reshape(2, chunk.num_tokens, -1)
        for i in range(chunk.num_tokens):
            self.tokens[chunk.layer, chunk.first_token + i] = k[i].tobytes() + v[i].tobytes()

    def commit(self, valid_tokens: int) -> None:
        assert not self.ended.is_set(), "ended twice"
        self.committed = valid_tokens
        self.ended.set()

    def abort(self, error: HandoffError) -> None:
        assert not self.ended.is_set(), "ended twice"
        self.aborted = error
        self.ended.set()

    async def wait_ended(self) -> None:
        assert await asyncio.to_thread(self.ended.wait, 10), "neither committed nor aborted"

    def assert_holds(self, first_token: int, num_tokens: int, layout: KvLayout = LAYOUT) -> None:
        assert self.committed == num_tokens
        assert self.tokens == {
            (layer, token): kv_bytes(layer, token, 1, layout)
            for layer in range(layout.num_layers)
            for token in range(first_token, first_token + num_tokens)
        }


def target_at(address: str, its_host_id: str | None = None) -> WorkerAddress:
    return WorkerAddress(
        worker_id=WorkerId("decode-1"),
        epoch=EPOCH,
        grpc_address=address,
        host_id=its_host_id or host_id(),
    )


class ReceiverAtWork:
    """A HandoffReceiver behind a real gRPC server on loopback."""

    def __init__(self, receiver: HandoffReceiver, server: grpc.aio.Server, port: int) -> None:
        self.receiver = receiver
        self.server = server
        self.address = f"127.0.0.1:{port}"
        self.epoch = EPOCH

    def target(self, its_host_id: str | None = None) -> WorkerAddress:
        return target_at(self.address, its_host_id)

    def expect(self, first_token: int, num_tokens: int) -> tuple[HandoffHeader, KeepingSink]:
        sink = KeepingSink()
        handoff_id = new_handoff_id()
        self.receiver.expect(handoff_id, first_token, num_tokens, sink)
        return header_of(handoff_id, first_token, num_tokens), sink


def header_of(
    handoff_id: HandoffId, first_token: int, num_tokens: int, layout: KvLayout = LAYOUT
) -> HandoffHeader:
    return HandoffHeader(
        handoff_id=handoff_id,
        epoch=EPOCH,
        layout_fingerprint=layout.fingerprint,
        first_token=first_token,
        num_tokens=num_tokens,
        total_bytes=num_tokens * layout.bytes_per_token,
    )


@asynccontextmanager
async def receiver_at_work(
    progress_timeout_s: float = 10.0, layout: KvLayout = LAYOUT, nixl: NixlEndpoint | None = None
) -> AsyncIterator[ReceiverAtWork]:
    server = grpc.aio.server()
    receiver = HandoffReceiver(layout, lambda: work.epoch, progress_timeout_s, nixl)
    pb_grpc.add_KvReceiverServicer_to_server(receiver, server)
    work = ReceiverAtWork(receiver, server, server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    try:
        yield work
    finally:
        receiver.close()
        await server.stop(None)


needs_nixl = pytest.mark.skipif(installed_package() is None, reason="NIXL is not installed: `make nixl`")


@asynccontextmanager
async def nixl_endpoint(
    num_bytes: int = 2**22, *, read_timeout_s: float = 5.0
) -> AsyncIterator[NixlEndpoint]:
    endpoint = NixlEndpoint(num_bytes, read_timeout_s=read_timeout_s)
    await endpoint.start()
    try:
        yield endpoint
    finally:
        await endpoint.close()


def open_fds() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def memfds() -> list[str]:
    """Memory files this process holds open or mapped; those only garbage holds do not count."""
    found = _memfds()
    if found:
        gc.collect()
        found = _memfds()
    return found


def _memfds() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:  # the listing's own
            continue
    with open("/proc/self/maps") as maps:
        found += [line.split(maxsplit=5)[-1] for line in maps if "memfd:headrace" in line]
    return [name for name in found if "memfd:headrace" in name]
