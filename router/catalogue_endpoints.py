"""/v1/catalogues: list, upload, show, delete. A catalogue belongs to the API key that sent it."""

from collections.abc import Mapping
from typing import Literal
from urllib.parse import parse_qsl

import msgspec
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cluster.metrics import RouterMetrics
from router.admission import tenant_of
from router.catalogues import CatalogueFacts, Catalogues, check_name, upload_under_way
from router.compile_messages import Compiled
from router.errors import RequestError, invalid
from router.http import ClientGoneError, check_encoding, error_headers, headers_of, request_id_of, respond
from router.targeting_api import (
    CatalogueBody,
    CatalogueDeletedBody,
    CatalogueListBody,
    CatalogueUploadBody,
    UploadFault,
    UploadProgress,
)
from router.uploads import Uploads

ROUTE = "catalogues"
FORMATS: dict[str, Literal["jsonl", "csv"]] = {
    "application/x-ndjson": "jsonl",
    "application/jsonl": "jsonl",
    "text/csv": "csv",
}
BOOLEANS = {"true": True, "false": False}


class CatalogueEndpoints:
    def __init__(self, catalogues: Catalogues, uploads: Uploads, metrics: RouterMetrics) -> None:
        self._catalogues = catalogues
        self._uploads = uploads
        self._metrics = metrics

    def routes(self) -> list[Route]:
        return [
            Route("/v1/catalogues", _Asgi(self, is_one=False), methods=["GET"], name="catalogues"),
            Route(
                "/v1/catalogues/{name}",
                _Asgi(self, is_one=True),
                methods=["GET", "PUT", "DELETE"],
                name="catalogue",
            ),
        ]

    async def list_all(self, tenant: str) -> CatalogueListBody:
        found = await self._catalogues.all_of(tenant)
        under_way = self._uploads.under_way(tenant)
        bodies = {facts.ref.name: _body(facts, under_way.get(facts.ref.name)) for facts in found}
        for name, progress in under_way.items():
            bodies.setdefault(name, _first_version(name, progress))
        return CatalogueListBody(object="list", data=[bodies[name] for name in sorted(bodies)])

    async def show(self, tenant: str, name: str) -> CatalogueBody:
        progress = self._uploads.progress(tenant, name)
        try:
            return _body(await self._catalogues.find(tenant, name), progress)
        except RequestError as error:
            if error.status != 404 or progress is None:
                raise
        return _first_version(name, progress)

    async def put(
        self, tenant: str, name: str, headers: Mapping[str, str], query: bytes, receive: Receive
    ) -> CatalogueUploadBody:
        upload_format = _format_of(headers)
        skip_bad = _skip_bad(query)
        compiled = await self._uploads.put(
            tenant, name, headers, receive, upload_format=upload_format, skip_bad=skip_bad
        )
        return _upload_body(name, compiled)

    async def delete(self, tenant: str, name: str) -> CatalogueDeletedBody:
        if self._uploads.progress(tenant, name) is not None:
            raise upload_under_way(name)
        await self._catalogues.delete(tenant, name)
        return CatalogueDeletedBody(name=name, object="catalogue", deleted=True)

    def count(self, outcome: str) -> None:
        self._metrics.requests.labels(ROUTE, outcome).inc()


class _Asgi:
    def __init__(self, endpoints: CatalogueEndpoints, *, is_one: bool) -> None:
        self._endpoints = endpoints
        self._is_one = is_one

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = headers_of(scope)
        response_headers = [(b"x-request-id", request_id_of(headers).encode("latin-1"))]
        try:
            body = await self._answer(scope, headers, receive)
        except RequestError as error:
            self._endpoints.count("rejected" if error.status < 500 else "failed")
            closing = [(b"connection", b"close")] if scope["method"] == "PUT" else []
            extra = [header for header in error_headers(error) if header not in closing]
            await respond(send, error.status, error.body(), [*response_headers, *extra, *closing])
        except ClientGoneError:
            self._endpoints.count("cancelled")
        else:
            self._endpoints.count("stop")
            await respond(send, 200, msgspec.json.encode(body), response_headers)

    async def _answer(self, scope: Scope, headers: Mapping[str, str], receive: Receive) -> msgspec.Struct:
        endpoints, tenant = self._endpoints, tenant_of(headers.get("authorization"))
        if not self._is_one:
            return await endpoints.list_all(tenant)
        name: str = scope["path_params"]["name"]
        check_name(name)
        match scope["method"]:
            case "PUT":
                return await endpoints.put(tenant, name, headers, scope["query_string"], receive)
            case "DELETE":
                return await endpoints.delete(tenant, name)
            case _:
                return await endpoints.show(tenant, name)


def _format_of(headers: Mapping[str, str]) -> Literal["jsonl", "csv"]:
    given = headers.get("content-type", "")
    kind, _, parameters = given.partition(";")
    upload_format = FORMATS.get(kind.strip().lower())
    charset = parameters.strip().lower().removeprefix("charset=").strip('"').replace("-", "")
    if upload_format is None or charset not in ("", "utf8", "header=present"):
        shown = f", not {given[:80]!r}" if given else ""
        raise RequestError(
            415,
            f"the content type must be one of {', '.join(FORMATS)} in UTF-8{shown}",
            param="content-type",
            code="unsupported_media_type",
        )
    check_encoding(headers)
    return upload_format


def _skip_bad(query: bytes) -> bool:
    parameters = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    value = "false"
    for key, given in parameters:
        if key != "skip_bad":
            raise invalid(key[:80], f"unknown parameter `{key[:80]}`: `skip_bad` is the only one here")
        value = given
    if value not in BOOLEANS:
        raise invalid("skip_bad", f"`skip_bad` must be true or false, not {value[:80]!r}")
    return BOOLEANS[value]


def _body(facts: CatalogueFacts, progress: UploadProgress | None) -> CatalogueBody:
    return CatalogueBody(
        name=facts.ref.name,
        object="catalogue",
        state="ready" if progress is None else "compiling",
        version=facts.ref.version,
        items=facts.num_items,
        nodes=facts.num_nodes,
        bytes=facts.ref.num_bytes,
        attributes=list(facts.attributes),
        checksum=facts.ref.checksum,
        created=facts.created_unix_s,
        progress=progress,
    )


def _first_version(name: str, progress: UploadProgress) -> CatalogueBody:
    return CatalogueBody(
        name=name,
        object="catalogue",
        state="compiling",
        version=None,
        items=0,
        nodes=0,
        bytes=0,
        attributes=[],
        checksum=None,
        created=None,
        progress=progress,
    )


def _upload_body(name: str, compiled: Compiled) -> CatalogueUploadBody:
    return CatalogueUploadBody(
        name=name,
        object="catalogue.upload",
        version=compiled.version,
        items=compiled.num_items,
        tokens=compiled.num_path_tokens,
        nodes=compiled.num_nodes,
        bytes=compiled.num_bytes,
        num_faults=compiled.num_faults,
        faults=[UploadFault(line=fault.line, message=fault.message) for fault in compiled.faults],
        timings_ms=compiled.phase_ms,
    )
