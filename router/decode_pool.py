"""The connections to all decode workers, following the directory."""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Protocol

from cluster.ids import WorkerId
from cluster.messages import Role, WorkerAddress, WorkerRecord
from cluster.wire import headrace_pb2 as pb
from router.channels import Channels
from router.decode_connection import DecodeConnection

FOLLOW_INTERVAL_S = 0.2
SILENT_S = 3.0
"""A worker whose lease is gone and that says nothing for this long is dead, whatever TCP believes."""

_log = logging.getLogger(__name__)


class Directory(Protocol):
    """What the router reads of `cluster.membership.WorkerDirectory`."""

    def snapshot(self, role: Role | None = None) -> Sequence[WorkerRecord]: ...

    def local_adjust(self, worker_id: WorkerId, num_tokens: int) -> None: ...


class DecodePool:
    """Belongs to one event loop."""

    def __init__(self, directory: Directory, channels: Channels, greeting: pb.Hello) -> None:
        self._directory = directory
        self._channels = channels
        self._greeting = greeting
        self._connections: dict[WorkerId, DecodeConnection] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.follow()
        self._task = asyncio.create_task(self._keep_following(), name="decode pool")

    async def stop(self) -> None:
        """Safe to repeat."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait((task,))
        while self._connections:
            _, connection = self._connections.popitem()
            await connection.stop("this router stops")

    def usable(self) -> list[WorkerRecord]:
        """Decode workers that a request may be placed on now."""
        return [
            record
            for record in self._directory.snapshot("decode")
            if (connection := self._connections.get(record.address.worker_id)) is None or connection.is_usable
        ]

    def refusals(self) -> list[str]:
        """What workers that are up said against this router."""
        return [
            f"{worker_id}: {connection.refusal}"
            for worker_id, connection in self._connections.items()
            if connection.refusal
        ]

    def connection(self, address: WorkerAddress) -> DecodeConnection:
        connection = self._connections.get(address.worker_id)
        if connection is None:
            connection = self._open(address)
        return connection

    async def follow(self) -> None:
        """Connect to new workers, let go of dead ones."""
        records = {record.address.worker_id: record for record in self._directory.snapshot("decode")}
        for worker_id, connection in list(self._connections.items()):
            record = records.get(worker_id)
            if is_over(connection, record, time.monotonic()):
                del self._connections[worker_id]
                await connection.stop(f"{worker_id} is gone")
            elif record is not None:
                connection.address = record.address
        for record in records.values():
            self.connection(record.address)
        in_use = {connection.address.grpc_address for connection in self._connections.values()}
        in_use |= {record.address.grpc_address for record in self._directory.snapshot()}
        await self._channels.keep_only(in_use)

    def _open(self, address: WorkerAddress) -> DecodeConnection:
        connection = DecodeConnection(address, self._channels.get(address.grpc_address), self._greeting)
        self._connections[address.worker_id] = connection
        connection.start()
        return connection

    async def _keep_following(self) -> None:
        while True:
            await asyncio.sleep(FOLLOW_INTERVAL_S)
            try:
                await self.follow()
            except Exception:  # noqa: BLE001 - without this loop no new worker is ever found
                _log.exception("following the worker directory failed; trying again")


def is_over(connection: DecodeConnection, record: WorkerRecord | None, now_s: float) -> bool:
    """Whether a connection should be replaced or dropped, given what the directory says of its worker."""
    if record is None:
        is_silent = now_s - connection.heard_at_s > SILENT_S
        return is_silent or not connection.is_usable or connection.num_requests == 0
    if record.address.grpc_address != connection.address.grpc_address:
        return True
    # A worker that refused us is asked again once it is another incarnation.
    return connection.refusal is not None and record.address.epoch != connection.address.epoch
