"""KV hand-offs by each way there is, from one process of this machine to another.

    python benchmarks/transfer.py [--quick] [--json FILE]

The sender, the receiver, the checksum and gRPC are the real ones; the receiver's sink copies into memory, as
a CPU's KV pool does. The KV is that of 1,000 tokens of the packaged model, a chunk a layer. Ways take turns
in one run; `NAME_gb_s` is the median of whole hand-offs, from header to acknowledgement, and `NAME_vs_grpc`
the median of their ratios to the hand-off by gRPC beside them. NIXL only where it is installed, by whichever
of UCX's transports `UCX_TLS` names.
"""

import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import parser, write_figures
from cluster.ids import Epoch, HandoffId, WorkerId
from cluster.kv_layout import KvLayout
from cluster.messages import WorkerAddress
from cluster.transfer import HandoffError, HandoffHeader, KvChunk
from cluster.transfer.grpc_transport import GrpcKvTransport
from cluster.transfer.host_id import host_id
from cluster.transfer.nixl import installed_package
from cluster.transfer.nixl_endpoint import NixlEndpoint
from cluster.transfer.receiver import HandoffReceiver
from cluster.wire import headrace_pb2_grpc as pb_grpc

LAYOUT = KvLayout(
    model_fingerprint="benchmark",
    num_layers=30,
    num_kv_heads=3,
    head_dim=64,
    dtype="float16",
    block_size_tokens=16,
)
NUM_TOKENS = 1000
EPOCH = Epoch(1)
GRPC, SHARED_MEMORY, NIXL = "grpc", "shared_memory", "nixl"
NIXL_BYTES = 128 * 2**20
TIMEOUT_S = 600.0
ROUNDS, ROUNDS_QUICK = 60, 15
WARM_UP_ROUNDS = 3


class CopyingSink:
    """Into memory that was written before: fresh pages would cost more than the copy."""

    def __init__(self, memory: np.ndarray) -> None:
        self._memory = memory

    def write(self, chunk: KvChunk) -> None:
        self._memory[chunk.layer, : chunk.data.nbytes] = np.frombuffer(chunk.data, dtype=np.uint8)

    def commit(self, valid_tokens: int) -> None:
        assert valid_tokens == NUM_TOKENS

    def abort(self, error: HandoffError) -> None:
        print(f"hand-off failed: {error}", file=sys.stderr)


def handoff_id(way: str, number: int) -> HandoffId:
    return HandoffId(f"{way}-{number}")


async def receive(num_rounds: int) -> None:
    """The other process: prints its port, and serves until its input ends."""
    endpoint = NixlEndpoint(NIXL_BYTES) if installed_package() else None
    if endpoint is not None:
        await endpoint.start()
    receiver = HandoffReceiver(LAYOUT, lambda: EPOCH, TIMEOUT_S, endpoint)
    sink = CopyingSink(np.ones((LAYOUT.num_layers, NUM_TOKENS * LAYOUT.bytes_per_token_layer), np.uint8))
    for way in ways():
        for number in range(num_rounds):
            receiver.expect(handoff_id(way, number), 0, NUM_TOKENS, sink)
    server = grpc.aio.server()
    pb_grpc.add_KvReceiverServicer_to_server(receiver, server)
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await asyncio.to_thread(sys.stdin.read)
    receiver.close()
    await server.stop(None)
    if endpoint is not None:
        await endpoint.close()


def ways() -> tuple[str, ...]:
    return (GRPC, SHARED_MEMORY, NIXL) if installed_package() else (GRPC, SHARED_MEMORY)


async def layers(kv: np.ndarray) -> AsyncIterator[KvChunk]:
    for layer in range(LAYOUT.num_layers):
        yield KvChunk(layer, 0, NUM_TOKENS, memoryview(kv[layer]))


async def send_all(port: int, num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each hand-off, by way."""
    endpoint = NixlEndpoint(NIXL_BYTES) if installed_package() else None
    if endpoint is not None:
        await endpoint.start()
    own = host_id()
    transports = {
        way: GrpcKvTransport(
            own_host_id=own,
            timeout_s=TIMEOUT_S,
            prefer_shared_memory=way == SHARED_MEMORY,
            nixl=endpoint if way == NIXL else None,
        )
        for way in ways()
    }
    target = WorkerAddress(
        worker_id=WorkerId("receiver"), epoch=EPOCH, grpc_address=f"127.0.0.1:{port}", host_id=own
    )
    shape = LAYOUT.num_layers, NUM_TOKENS * LAYOUT.bytes_per_token_layer
    kv = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    seconds: dict[str, list[float]] = {way: [] for way in transports}
    for number in range(num_rounds):
        for way, transport in transports.items():
            header = HandoffHeader(
                handoff_id=handoff_id(way, number),
                epoch=EPOCH,
                layout_fingerprint=LAYOUT.fingerprint,
                first_token=0,
                num_tokens=NUM_TOKENS,
                total_bytes=kv.nbytes,
            )
            begin_s = time.perf_counter()
            receipt = await transport.send(target, header, layers(kv))
            if receipt.transport != way:
                raise RuntimeError(f"a hand-off that was to go by {way} went by {receipt.transport}")
            if number >= WARM_UP_ROUNDS:
                seconds[way].append(time.perf_counter() - begin_s)
    for transport in transports.values():
        await transport.close()
    if endpoint is not None:
        await endpoint.close()
    return seconds


async def measure(num_rounds: int) -> dict[str, list[float]]:
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        "--receive",
        str(num_rounds),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdin is not None
    try:
        return await send_all(int(await child.stdout.readline()), num_rounds)
    finally:
        child.stdin.close()
        await child.wait()


def main() -> None:
    options = parser(__doc__.split("\n")[0])
    options.add_argument("--receive", type=int, metavar="ROUNDS", help="be the receiver")
    chosen = options.parse_args()
    if chosen.receive is not None:
        asyncio.run(receive(chosen.receive))
        return
    num_rounds = WARM_UP_ROUNDS + (ROUNDS_QUICK if chosen.quick else ROUNDS)
    seconds = asyncio.run(measure(num_rounds))
    num_bytes = NUM_TOKENS * LAYOUT.bytes_per_token
    print(f"{num_bytes / 1e6:.1f} MB a hand-off, {LAYOUT.num_layers} chunks, {num_rounds} rounds")
    figures = {}
    for way, taken in seconds.items():
        figures[f"{way}_gb_s"] = num_bytes / statistics.median(taken) / 1e9
        line = f"{way:14} {figures[f'{way}_gb_s']:6.2f} GB/s  {statistics.median(taken) * 1e3:6.1f} ms"
        if way != GRPC:
            ratios = sorted(by_grpc / own for by_grpc, own in zip(seconds[GRPC], taken, strict=True))
            figures[f"{way}_vs_grpc"] = statistics.median(ratios)
            low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
            line += f"  {figures[f'{way}_vs_grpc']:5.2f} times gRPC ({low:.2f} to {high:.2f}, 8 of 10)"
        print(line)
    write_figures(chosen.json, figures, num_rounds - WARM_UP_ROUNDS)


if __name__ == "__main__":
    main()
