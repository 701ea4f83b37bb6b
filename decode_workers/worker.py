"""A decode worker: the engine on its thread, and the gRPC server in front of it.

No lease, no Redis, no Ray: whoever composes the worker publishes `status` and `drain_block_changes`.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable

import grpc
import msgspec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.block_changes import BlockChanges
from cluster.catalogue.local import LocalCatalogues
from cluster.config import DecodeConfig, TransferConfig
from cluster.ids import ChainHash, Epoch
from cluster.kv_layout import KvLayout
from cluster.messages import DecodeEvent, FailureCode, StepCost, WorkerStatus
from cluster.metrics import DecodeMetrics, exposition
from cluster.model_card import ModelCard
from cluster.text import Tokenizer
from cluster.transfer.nixl_endpoint import endpoint_of
from cluster.transfer.receiver import HandoffReceiver
from cluster.wire import headrace_pb2 as pb
from cluster.wire import headrace_pb2_grpc as pb_grpc
from decode_workers.engine import DecodeEngine, Drafter
from decode_workers.engine_thread import EngineThread
from decode_workers.executor import StepExecutor
from decode_workers.inbox import Inbox
from decode_workers.service import DecodeService
from decode_workers.targeting.item_chooser import ItemChooser

MAX_CONCURRENT_CALLS = 512
HEALTH_INTERVAL_S = 0.5
SERVER_GRACE_S = 1.0

SERVICE_NAMES = ("headrace.v1.Decode", "headrace.v1.KvReceiver", "headrace.v1.WorkerAdmin")

logger = logging.getLogger(__name__)


class _AdminService(pb_grpc.WorkerAdminServicer):
    def __init__(self, metrics: DecodeMetrics) -> None:
        self._metrics = metrics

    async def Metrics(self, _request: pb.MetricsRequest, _context: object) -> pb.MetricsResponse:  # noqa: N802
        return pb.MetricsResponse(text=exposition(self._metrics.registry))


class DecodeWorker:
    """`start`, then serve until `stop`; both on one event loop. The other methods from any thread."""

    def __init__(
        self,
        executor: StepExecutor,
        tokenizer: Tokenizer,
        card: ModelCard,
        config: DecodeConfig,
        *,
        epoch: Callable[[], Epoch],
        host: str = "127.0.0.1",
        port: int = 0,
        drafter: Drafter | None = None,
        catalogues: LocalCatalogues | None = None,
        transfer: TransferConfig = TransferConfig(),  # noqa: B008 - frozen
    ) -> None:
        """`epoch`: this incarnation's, as its lease has it; hand-offs for another one are rejected. Without
        `catalogues` targeting requests are refused.

        The worker owns the executor from here on, and closes it. `port` 0: any free one.
        """
        self._executor = executor
        self._config = config
        self._address = f"{host}:{port}"
        self._inbox = Inbox()
        self._transfer = transfer
        self._nixl = endpoint_of(transfer)
        self._receiver = HandoffReceiver(executor.layout, epoch, config.handoff_timeout_s, self._nixl)
        self.metrics = DecodeMetrics()
        self._engine = DecodeEngine(
            executor,
            tokenizer,
            card,
            config,
            handoffs=self._receiver,
            inbox=self._inbox,
            metrics=self.metrics,
            drafter=drafter,
        )
        self._service = DecodeService(
            self._engine.roster,
            self._inbox,
            card,
            max_commands_waiting=2 * config.max_queued_requests,
            chooser=None if catalogues is None else ItemChooser(catalogues),
            drafter=drafter,
        )
        self._thread = EngineThread(
            self._engine, self._inbox, self._deliver, self._crash, config.stall_timeout_s
        )
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._health_watch: asyncio.Task[None] | None = None
        self._has_stopped = False
        self._step_table: tuple[StepCost, ...] = ()

    @property
    def address(self) -> str:
        """`host:port`, the port a real one once `start` returned."""
        return self._address

    @property
    def layout(self) -> KvLayout:
        return self._executor.layout

    async def start(self) -> str:
        """Measure the step table, listen, serve; the address `host:port` that others dial."""
        self._loop = asyncio.get_running_loop()
        if self._nixl is not None and self._transfer.transport == "nixl":
            await self._nixl.start()
        self._thread.start()
        self._step_table = await asyncio.wrap_future(self._thread.ask(self._engine.measure))
        self._server = grpc.aio.server(maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS)
        pb_grpc.add_DecodeServicer_to_server(self._service, self._server)
        pb_grpc.add_KvReceiverServicer_to_server(self._receiver, self._server)
        pb_grpc.add_WorkerAdminServicer_to_server(_AdminService(self.metrics), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        bound_port = self._server.add_insecure_port(self._address)
        self._address = f"{self._address.rpartition(':')[0]}:{bound_port}"
        await self._server.start()
        self._health_watch = asyncio.create_task(self._watch_health())
        return self._address

    async def stop(self, grace_s: float = 5.0) -> None:
        """Refuse what is new, let running requests end for `grace_s`, fail the rest for a retry elsewhere.

        A no-op the second time.
        """
        if self._has_stopped:
            return
        self._has_stopped = True
        if self._loop is None:
            self._executor.close()
            return
        self._inbox.post(self._refuse_new)
        await self._until_idle(grace_s)
        message = "the worker is stopping"
        self._inbox.post(lambda: self._engine.roster.fail_all(FailureCode.UNAVAILABLE, message))
        await self._until_idle(SERVER_GRACE_S)
        if self._health_watch is not None:
            self._health_watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._health_watch
        self._receiver.close()
        self._service.close()
        if self._server is not None:
            await self._server.stop(SERVER_GRACE_S)
        if self._nixl is not None:
            await self._nixl.close()
        has_ended = await asyncio.to_thread(self._thread.stop, self._config.stall_timeout_s)
        if has_ended:
            self._executor.close()
        else:
            logger.error("the engine's thread is stuck in a step; its executor stays open")

    def status(self) -> WorkerStatus:
        """What to publish with the lease; figures are at most a step old."""
        status = self._engine.roster.status(self._step_table)
        return status if self.is_healthy() else msgspec.structs.replace(status, is_accepting=False)

    def is_healthy(self) -> bool:
        """By progress: false where no step ended for `stall_timeout_s` with work queued."""
        return self._thread.find_fault() is None

    def health_fault(self) -> str | None:
        """Why `is_healthy` is false."""
        return self._thread.find_fault()

    def drain_block_changes(self) -> BlockChanges:
        """Full blocks that entered or left the prefix cache since the last call, for the placement index."""
        return self._engine.kv.drain_changes()

    def all_block_hashes(self) -> list[ChainHash]:
        """Every cached full block: what to publish after registering anew."""
        return self._engine.kv.all_hashes()

    def _refuse_new(self) -> None:
        self._engine.roster.is_accepting = False

    async def _until_idle(self, timeout_s: float) -> None:
        if self.is_healthy():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._service.wait_idle()

    async def _watch_health(self) -> None:
        serving = health_pb2.HealthCheckResponse.SERVING
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        while True:
            state = serving if self.is_healthy() else not_serving
            for name in ("", *SERVICE_NAMES):
                await self._health.set(name, state)
            await asyncio.sleep(HEALTH_INTERVAL_S)

    def _deliver(self, events: list[DecodeEvent]) -> None:
        self._on_loop(self._service.deliver, events)

    def _crash(self, error: Exception) -> None:
        self._on_loop(self._service.crash, error)

    def _on_loop(self, call: Callable[..., None], argument: object) -> None:
        """From the engine's thread."""
        assert self._loop is not None, "the engine runs before the worker started"
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(call, argument)
