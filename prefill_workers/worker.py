"""A prefill worker: one engine, one gRPC server. The composition root registers and supervises it."""

import asyncio
import logging
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.block_changes import BlockChanges
from cluster.config import PrefillConfig, TransferConfig
from cluster.ids import ChainHash
from cluster.messages import StepCost, WorkerStatus
from cluster.metrics import PrefillMetrics
from cluster.transfer.grpc_transport import GrpcKvTransport
from cluster.transfer.host_id import host_id
from cluster.transfer.nixl_endpoint import endpoint_of
from cluster.wire import headrace_pb2 as pb
from cluster.wire import headrace_pb2_grpc as pb_grpc
from prefill_workers.engine import PrefillEngine
from prefill_workers.engine_loop import EngineLoop
from prefill_workers.servicer import AdminServicer, PrefillServicer
from prefill_workers.validation import PrefillLimits

HEALTH_PERIOD_S = 0.5
CLEANUP_TIMEOUT_S = 3.0
"""For failed jobs to tell their receivers and their callers, when the worker stops."""
SERVICES = tuple(pb.DESCRIPTOR.services_by_name[name].full_name for name in ("Prefill", "WorkerAdmin"))

logger = logging.getLogger(__name__)


class PrefillWorker:
    """Serves `Prefill` on one event loop; the engine runs in a thread of its own."""

    def __init__(
        self,
        engine: PrefillEngine,
        *,
        vocab_size: int,
        max_context_tokens: int,
        config: PrefillConfig,
        transfer: TransferConfig,
        host: str = "127.0.0.1",
        port: int = 0,
        stall_timeout_s: float = 30.0,
    ) -> None:
        """`port` 0: any free one. `stall_timeout_s`: a step that takes longer makes the worker unhealthy."""
        self._engine = engine
        self._vocab_size = vocab_size
        self._max_context_tokens = max_context_tokens
        self._config = config
        self._transfer = transfer
        self._host = host
        self._port = port
        self._stall_timeout_s = stall_timeout_s
        self._metrics = PrefillMetrics()
        self._loop = EngineLoop(engine, config.max_queued_requests, self._metrics, stall_timeout_s)
        self._step_table: tuple[StepCost, ...] = ()
        self._total_kv_tokens = 0
        self._server: grpc.aio.Server | None = None
        self._nixl = endpoint_of(transfer)
        self._transport: GrpcKvTransport | None = None
        self._prefill: PrefillServicer | None = None
        self._is_stopping = False
        self._is_engine_closed = False
        self._health = health.aio.HealthServicer()
        self._health_task: asyncio.Task[None] | None = None

    async def start(self) -> tuple[str, int]:
        """Measure the engine, then serve; returns (host, port). Raises what the engine or the port raised."""
        try:
            return await self._start()
        except BaseException:
            await self.stop(grace_s=0)
            raise

    async def _start(self) -> tuple[str, int]:
        if self._nixl is not None and self._transfer.transport == "nixl":
            await self._nixl.start()
        max_step_tokens = self._config.max_tokens_per_step
        assert max_step_tokens is not None, "the configuration was not resolved"
        ready = self._loop.start(min(max_step_tokens, self._max_context_tokens), self._vocab_size)
        self._step_table = await asyncio.wrap_future(ready)
        self._total_kv_tokens = self._loop.load().free_kv_tokens
        self._transport = GrpcKvTransport(
            own_host_id=host_id(),
            timeout_s=self._transfer.timeout_s,
            prefer_shared_memory=self._transfer.transport == "auto",
            nixl=self._nixl,
        )
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        self._add_services(self._server, self._transport)
        port = self._server.add_insecure_port(f"{self._host}:{self._port}")
        await self._server.start()
        self._health_task = asyncio.create_task(self._publish_health())
        return self._host, port

    async def stop(self, grace_s: float = 5.0) -> None:
        """Refuse new jobs, give running ones `grace_s`, then fail them for a retry elsewhere.

        Safe to call twice, and after a `start` that failed.
        """
        self._is_stopping = True
        if self._health_task is not None:
            self._health_task.cancel()
            await asyncio.gather(self._health_task, return_exceptions=True)
        await self._health.enter_graceful_shutdown()
        if self._prefill is not None:
            await self._prefill.stop(grace_s)
        if not await asyncio.to_thread(self._loop.stop, self._stall_timeout_s):
            logger.error("the prefill engine is stuck in a step; its thread is left behind")
        else:
            await asyncio.to_thread(self._close_engine)
        if self._prefill is not None:
            await self._prefill.stop(CLEANUP_TIMEOUT_S)
        if self._server is not None:
            await self._server.stop(CLEANUP_TIMEOUT_S)
        if self._transport is not None:
            await self._transport.close()
        if self._nixl is not None:
            await self._nixl.close()

    def _close_engine(self) -> None:
        if not self._is_engine_closed:
            self._is_engine_closed = True
            self._engine.close()

    def status(self) -> WorkerStatus:
        load = self._loop.load()
        return WorkerStatus(
            queued_requests=load.queued_requests,
            running_requests=load.running_requests,
            queued_tokens=load.queued_tokens,
            free_kv_tokens=load.free_kv_tokens,
            total_kv_tokens=self._total_kv_tokens,
            step_table=self._step_table,
            is_accepting=self.is_healthy() and not self._is_stopping,
        )

    @property
    def index_block_tokens(self) -> int:
        """Of the blocks that it names to the placement index."""
        return self._engine.index_block_tokens

    def drain_block_changes(self) -> BlockChanges:
        """Full blocks that entered or left the prefix cache since the last call, for the placement index."""
        return self._engine.drain_changes()

    def all_block_hashes(self) -> Sequence[ChainHash]:
        """Every cached full block: what to publish after registering anew."""
        return self._engine.all_hashes()

    def is_healthy(self) -> bool:
        """Whether the engine's thread runs and makes progress."""
        return self._loop.is_healthy()

    def _add_services(self, server: grpc.aio.Server, transport: GrpcKvTransport) -> None:
        limits = PrefillLimits(
            layout_fingerprint=self._engine.layout.fingerprint,
            vocab_size=self._vocab_size,
            max_context_tokens=self._max_context_tokens,
            total_kv_tokens=self._total_kv_tokens,
        )
        self._prefill = PrefillServicer(
            self._loop, self._engine.layout, limits, transport, self._transfer.chunk_bytes, self._metrics
        )
        pb_grpc.add_PrefillServicer_to_server(self._prefill, server)
        admin = AdminServicer(self._loop, limits, self._engine.total_staging_bytes, self._metrics)
        pb_grpc.add_WorkerAdminServicer_to_server(admin, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)

    async def _publish_health(self) -> None:
        """Keep the health service's answer equal to `is_healthy`."""
        published: bool | None = None
        while True:
            is_healthy = self.is_healthy()
            if is_healthy is not published:
                serving = health_pb2.HealthCheckResponse
                answer = serving.SERVING if is_healthy else serving.NOT_SERVING
                for service in ("", *SERVICES):
                    await self._health.set(service, answer)
                published = is_healthy
            await asyncio.sleep(HEALTH_PERIOD_S)
