"""The router's own gRPC server: Inference, Targeting, Catalogues, health, reflection."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import cast

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.config import RouterConfig
from cluster.wire import headrace_pb2 as pb
from cluster.wire.headrace_pb2_grpc import (
    add_CataloguesServicer_to_server,
    add_InferenceServicer_to_server,
    add_TargetingServicer_to_server,
)
from router.catalogues_service import CataloguesService
from router.inference_service import InferenceService
from router.targeting_service import TargetingService

HEALTH_INTERVAL_S = 0.5
STOP_GRACE_S = 1.0
SERVICES = tuple(
    pb.DESCRIPTOR.services_by_name[name].full_name for name in ("Inference", "Targeting", "Catalogues")
)
_add_inference = cast(Callable[[InferenceService, grpc.aio.Server], None], add_InferenceServicer_to_server)
_add_targeting = cast(Callable[[TargetingService, grpc.aio.Server], None], add_TargetingServicer_to_server)
_add_catalogues = cast(Callable[[CataloguesService, grpc.aio.Server], None], add_CataloguesServicer_to_server)


class RouterStartError(RuntimeError):
    """The router cannot start; the message says what to change. Handled by whoever starts it."""


class InferenceServer:
    """Belongs to one event loop. Several processes of a host share the port."""

    def __init__(
        self,
        service: InferenceService,
        targeting: TargetingService,
        catalogues: CataloguesService,
        config: RouterConfig,
        is_ready: Callable[[], bool],
    ) -> None:
        self._service = service
        self._targeting = targeting
        self._catalogues = catalogues
        self._config = config
        self._is_ready = is_ready
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self._health_task: asyncio.Task[None] | None = None
        self.port = 0

    async def start(self) -> None:
        """Raises RouterStartError."""
        self._server = grpc.aio.server(
            options=(
                ("grpc.so_reuseport", 1),
                ("grpc.max_receive_message_length", self._config.max_body_bytes),
            )
        )
        _add_inference(self._service, self._server)
        _add_targeting(self._targeting, self._server)
        _add_catalogues(self._catalogues, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )
        host, port = self._config.host, self._config.grpc_port
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise RouterStartError(
                f"cannot listen for gRPC on {address}: another process may hold the port; "
                f"set `router.grpc_port` to a free one ({error})"
            ) from None
        await self._publish_health()
        await self._server.start()
        self._health_task = asyncio.create_task(self._keep_publishing(), name="gRPC health")

    async def stop(self) -> None:
        """Safe to repeat."""
        task, self._health_task = self._health_task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        server, self._server = self._server, None
        if server is not None:
            await self._health.enter_graceful_shutdown()
            await server.stop(STOP_GRACE_S)

    async def _publish_health(self) -> None:
        statuses = health_pb2.HealthCheckResponse
        status = statuses.SERVING if self._is_ready() else statuses.NOT_SERVING
        for name in ("", *SERVICES):
            await self._health.set(name, status)

    async def _keep_publishing(self) -> None:
        while True:
            await asyncio.sleep(HEALTH_INTERVAL_S)
            await self._publish_health()
