"""gRPC channels to many workers: reused, bounded, and never closed under a call."""

import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator

import grpc

MAX_CHANNELS = 64
"""Idle channels beyond this are closed, least recently used first."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.enable_http_proxy", 0),  # workers are peers; a proxy of the environment is for the outside
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # also the time one connection attempt gets
    ("grpc.max_reconnect_backoff_ms", 1_000),  # a restarted worker is found again at once
)


class _Entry:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.num_users = 0


class ChannelPool:
    """Channels by `host:port`. For one event loop."""

    def __init__(self, max_channels: int = MAX_CHANNELS) -> None:
        self._max_channels = max_channels
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    @contextlib.asynccontextmanager
    async def use(self, address: str) -> AsyncIterator[grpc.aio.Channel]:
        entry = self._entries.get(address)
        if entry is None:
            entry = self._entries[address] = _Entry(grpc.aio.insecure_channel(address, CHANNEL_OPTIONS))
        self._entries.move_to_end(address)
        entry.num_users += 1
        try:
            yield entry.channel
        finally:
            entry.num_users -= 1
            await self._close_surplus()

    async def close(self) -> None:
        while self._entries:
            _, entry = self._entries.popitem()
            await entry.channel.close()

    async def _close_surplus(self) -> None:
        idle = [address for address, entry in self._entries.items() if entry.num_users == 0]
        for address in idle[: max(0, len(self._entries) - self._max_channels)]:
            await self._entries.pop(address).channel.close()
