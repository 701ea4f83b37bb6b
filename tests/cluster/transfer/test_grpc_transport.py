import pytest

from cluster.transfer.grpc_transport import GrpcKvTransport
from cluster.transfer.host_id import host_id
from tests.cluster.transfer.loopback import chunks_of, receiver_at_work, streamed


@pytest.mark.parametrize("shared", [True, False])
async def test_a_hand_off_arrives_byte_for_byte(shared: bool) -> None:
    async with receiver_at_work() as work:
        transport = GrpcKvTransport(own_host_id=host_id(), timeout_s=5, prefer_shared_memory=shared)
        header, sink = work.expect(5, 23)
        receipt = await transport.send(work.target(), header, streamed(chunks_of(5, 23)))
        assert receipt.transport == ("shared_memory" if shared else "grpc")
        sink.assert_holds(5, 23)
        await transport.close()
