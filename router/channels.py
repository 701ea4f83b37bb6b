"""One gRPC channel a worker address, shared by all calls to it."""

from collections.abc import Collection

import grpc.aio

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A worker that comes back is wanted at once: the library's own backoff goes up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # also the time one connection attempt gets
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
)


class Channels:
    """Belongs to the event loop it is first used on."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    def get(self, grpc_address: str) -> grpc.aio.Channel:
        """Connects with the first call."""
        channel = self._channels.get(grpc_address)
        if channel is None:
            channel = self._channels[grpc_address] = grpc.aio.insecure_channel(grpc_address, options=OPTIONS)
        return channel

    async def keep_only(self, grpc_addresses: Collection[str]) -> None:
        """Close the channels of workers that are gone."""
        for address in [address for address in self._channels if address not in grpc_addresses]:
            await self._channels.pop(address).close()

    async def close(self) -> None:
        await self.keep_only(())
