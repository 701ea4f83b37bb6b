"""A sender as a process of its own: `python -m tests.cluster.transfer.sender_process ADDRESS ID MODE TOKENS`.

Prints the transport that carried the hand-off, or the failure's code. MODE is `shared`, `nixl` or `grpc`;
with `,hang` it prints `half` after half of the chunks, and waits to be killed.
"""

import asyncio
import sys
from collections.abc import AsyncIterator

from cluster.ids import HandoffId
from cluster.transfer import HandoffError, KvChunk
from cluster.transfer.grpc_transport import GrpcKvTransport
from cluster.transfer.host_id import host_id
from cluster.transfer.nixl_endpoint import NixlEndpoint
from tests.cluster.transfer.loopback import chunks_of, header_of, streamed, target_at


async def hanging(chunks: list[KvChunk]) -> AsyncIterator[KvChunk]:
    for each in chunks[: len(chunks) // 2]:
        yield each
    print("half", flush=True)
    await asyncio.Event().wait()


async def main(address: str, handoff_id: str, mode: str, num_tokens: int) -> None:
    chunks = chunks_of(0, num_tokens)
    nixl = NixlEndpoint(2**22) if mode.startswith("nixl") else None
    if nixl is not None:
        await nixl.start()
    transport = GrpcKvTransport(
        own_host_id=host_id(), timeout_s=20, prefer_shared_memory=mode.startswith("shared"), nixl=nixl
    )
    header = header_of(HandoffId(handoff_id), 0, num_tokens)
    source = hanging(chunks) if mode.endswith(",hang") else streamed(chunks)
    try:
        receipt = await transport.send(target_at(address), header, source)
        print(receipt.transport, flush=True)
    except HandoffError as error:
        print(error.code, flush=True)
    finally:
        await transport.close()
        if nixl is not None:
            await nixl.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
