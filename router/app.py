"""The router: HTTP and gRPC in, tokens out. Plain objects; Serve, or any ASGI server, mounts `asgi`."""

from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route

from cluster.config import HeadraceConfig
from cluster.ids import new_worker_id
from cluster.metrics import RouterMetrics
from cluster.model_card import ServedModel
from cluster.placement.predict import PlacementCosts
from cluster.placement.store import PlacementStore
from router.admission import InflightLimit, limits_of
from router.answers import ChatApi, CompletionsApi
from router.catalogue_endpoints import CatalogueEndpoints
from router.catalogues import Catalogues, reachable_host
from router.catalogues_service import CataloguesService
from router.channels import Channels
from router.completion_endpoint import CompletionEndpoint
from router.decode_connection import hello
from router.decode_pool import DecodePool, Directory
from router.dispatch import Dispatcher
from router.generation import Generation
from router.grpc_server import InferenceServer
from router.inference_service import InferenceService
from router.info_endpoints import InfoEndpoints, defect, http_error
from router.openapi import openapi_document
from router.placing import Placer
from router.prefill_client import PrefillClient
from router.targeting import Targeting
from router.targeting_endpoint import TargetingEndpoint
from router.targeting_service import TargetingService
from router.tokenizer import PromptEncoder
from router.uploads import Uploads

DEFAULT_COSTS = PlacementCosts(kv_bytes_per_token=64 * 1024)
"""What a small model's KV weighs; the hop's fixed costs outweigh an error in it."""


class Router:
    """Build it in the process that serves; `start` and `stop` it on the loop that runs `asgi`."""

    def __init__(
        self,
        served: ServedModel,
        config: HeadraceConfig,
        store: PlacementStore,
        directory: Directory,
        *,
        catalogue_folder: Path,
        costs: PlacementCosts = DEFAULT_COSTS,
    ) -> None:
        """`store` and `directory` (a started WorkerDirectory) stay the caller's, to stop after the router.
        `catalogue_folder` is made where it is not there; routers of one machine share it.

        Raises UnsupportedTokenizerError, UnsupportedTemplateError.
        """
        card = served.card
        limits = limits_of(card, config.router)
        self.metrics = RouterMetrics()
        self._channels = Channels()
        greeting = hello(card.name, card.fingerprint, new_worker_id("router"))
        self._pool = DecodePool(directory, self._channels, greeting)
        self._placer = Placer(store, directory, self._pool, config.placement, costs, self.metrics)
        prefill = PrefillClient(self._channels)
        dispatcher = Dispatcher(
            self._placer,
            self._pool,
            prefill,
            directory,
            self.metrics,
            config.router.recovery_timeout_s,
        )
        inflight = InflightLimit(limits.max_inflight, self.metrics)
        generation = Generation(self._placer, dispatcher, inflight, self.metrics)
        encoder = PromptEncoder(served)
        info = InfoEndpoints(
            card, directory, self._pool, self._channels, self.metrics, openapi_document(card, limits)
        )
        max_body_bytes = config.router.max_body_bytes
        self._catalogues = Catalogues(catalogue_folder, served, config.catalogue, self._fetch_address)
        completions = CompletionEndpoint(
            CompletionsApi(encoder, limits),
            generation,
            self._catalogues,
            limits,
            self.metrics,
            max_body_bytes=max_body_bytes,
        )
        chat = CompletionEndpoint(
            ChatApi(encoder),
            generation,
            self._catalogues,
            limits,
            self.metrics,
            max_body_bytes=max_body_bytes,
        )
        self._uploads = Uploads(self._catalogues, config.catalogue)
        targeting = Targeting(encoder, self._catalogues, generation, limits)
        targeting_endpoint = TargetingEndpoint(targeting, limits, self.metrics, max_body_bytes=max_body_bytes)
        catalogue_endpoints = CatalogueEndpoints(self._catalogues, self._uploads, self.metrics)
        self.asgi = Starlette(
            routes=[
                Route("/v1/completions", completions, methods=["POST"], name="completions"),
                Route("/v1/chat/completions", chat, methods=["POST"], name="chat"),
                Route("/v1/targeting", targeting_endpoint, methods=["POST"], name="targeting"),
                *catalogue_endpoints.routes(),
                *info.routes(),
            ],
            exception_handlers={HTTPException: http_error, Exception: defect},
        )
        self.asgi.router.redirect_slashes = False
        service = InferenceService(encoder, generation, self._catalogues, limits, self.metrics)
        self._grpc = InferenceServer(
            service,
            TargetingService(targeting, limits, self.metrics),
            CataloguesService(self._catalogues),
            config.router,
            lambda: info.readiness().status == "ready",
        )
        self._fetch_host = config.catalogue.fetch_host or reachable_host(config.router.host)

    def _fetch_address(self) -> str:
        """Where workers on other machines get catalogues from."""
        return f"{self._fetch_host}:{self.grpc_port}"

    @property
    def grpc_port(self) -> int:
        """Where Inference is served: the configured port, or the one found for 0."""
        return self._grpc.port

    async def start(self) -> None:
        """Connects to the workers known and serves gRPC. Raises RouterStartError."""
        await self._pool.start()
        try:
            await self._grpc.start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Ends what is in flight and closes every connection. Safe to repeat."""
        await self._grpc.stop()
        await self._placer.stop()
        await self._pool.stop()
        await self._channels.close()
