"""Everything about the service that is not a generation: models, health, metrics, the OpenAPI document."""

import http
from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cluster.metrics import RouterMetrics
from cluster.model_card import ModelCard
from router.channels import Channels
from router.decode_pool import DecodePool, Directory
from router.errors import RequestError, internal, model_not_found
from router.http import headers_of, request_id_of
from router.openai_answers import HealthBody, ModelBody, ModelListBody, ReadyBody
from router.worker_metrics import cluster_exposition

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class InfoEndpoints:
    def __init__(
        self,
        card: ModelCard,
        directory: Directory,
        pool: DecodePool,
        channels: Channels,
        metrics: RouterMetrics,
        openapi: bytes,
    ) -> None:
        self._model = ModelBody(
            id=card.name, object="model", created=card.created_unix_s, owned_by="headrace"
        )
        self._directory = directory
        self._pool = pool
        self._channels = channels
        self._metrics = metrics
        self._openapi = openapi

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.models),
            Route("/v1/models/{id:path}", self.model),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.metrics),
            Route("/openapi.json", self.openapi),
        ]

    async def models(self, request: Request) -> Response:
        return _json(request, 200, msgspec.json.encode(ModelListBody(object="list", data=[self._model])))

    async def model(self, request: Request) -> Response:
        name = request.path_params["id"]
        if name != self._model.id:
            error = model_not_found(name, self._model.id)
            return _json(request, error.status, error.body())
        return _json(request, 200, msgspec.json.encode(self._model))

    async def health(self, request: Request) -> Response:
        return _json(request, 200, msgspec.json.encode(HealthBody(status="ok")))

    async def ready(self, request: Request) -> Response:
        body = self.readiness()
        status = 200 if body.status == "ready" else 503
        return _json(request, status, msgspec.json.encode(body))

    def readiness(self) -> ReadyBody:
        """Ready: at least one decode worker is there to place a request on."""
        num_decode = sum(worker.status.is_accepting for worker in self._pool.usable())
        return ReadyBody(
            status="ready" if num_decode else "not_ready",
            decode_workers=num_decode,
            prefill_workers=len(self._directory.snapshot("prefill")),
            reason=None if num_decode else self._why_not_ready(),
        )

    def _why_not_ready(self) -> str:
        if refusals := self._pool.refusals():
            return f"decode workers refuse this router: {'; '.join(refusals)}"
        registered = self._directory.snapshot("decode")
        if not registered:
            return "no decode worker is registered"
        return f"{len(registered)} decode workers are registered, none can be reached and takes requests"

    async def metrics(self, request: Request) -> Response:
        text = await cluster_exposition(self._metrics, self._directory, self._channels)
        return Response(text, headers={**_request_id(request), "content-type": METRICS_TYPE})

    async def openapi(self, request: Request) -> Response:
        return _json(request, 200, self._openapi)


async def http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals (no such route, no such method) in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    phrase = http.HTTPStatus(error.status_code).phrase
    code = phrase.lower().replace(" ", "_")
    message = f"{phrase}: {request.method} {request.url.path[:200]}"
    body = RequestError(error.status_code, message, code=code).body()
    return _json(request, error.status_code, body, error.headers)


async def defect(request: Request, error: Exception) -> Response:
    """Starlette raises `error` again behind this answer, for the server to log."""
    del error
    return _json(request, 500, internal().body())


def _request_id(request: Request) -> dict[str, str]:
    return {"x-request-id": request_id_of(headers_of(request.scope))}


def _json(request: Request, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> Response:
    return Response(
        body, status, headers={**_request_id(request), **(headers or {})}, media_type="application/json"
    )
