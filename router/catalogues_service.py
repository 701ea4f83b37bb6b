"""`headrace.v1.Catalogues`: compiled files for workers on other machines."""

import asyncio
from collections.abc import AsyncGenerator
from typing import BinaryIO

import grpc
import grpc.aio

from cluster.catalogue.fetch import CHUNK_BYTES
from cluster.wire import headrace_pb2 as pb
from cluster.wire.headrace_pb2_grpc import CataloguesServicer
from router.catalogues import Catalogues

MAX_FETCHES = 8
"""At once; a worker that is refused fails the request, which goes elsewhere."""

Context = grpc.aio.ServicerContext[pb.FetchCatalogueRequest, pb.CatalogueChunk]


class CataloguesService(CataloguesServicer):
    def __init__(self, catalogues: Catalogues) -> None:
        self._catalogues = catalogues
        self._num_fetches = 0

    async def Fetch(  # noqa: N802 - the name in the proto file
        self, request: pb.FetchCatalogueRequest, context: Context
    ) -> AsyncGenerator[pb.CatalogueChunk, None]:
        if self._num_fetches >= MAX_FETCHES:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_FETCHES} are being fetched")
        self._num_fetches += 1
        try:
            file = await asyncio.to_thread(self._open, request)
            if file is None:
                message = f"no version {request.version} of `{request.name[:100]}` with that checksum here"
                await context.abort(grpc.StatusCode.NOT_FOUND, message)
            assert file is not None
            with file:
                while data := await asyncio.to_thread(file.read, CHUNK_BYTES):
                    yield pb.CatalogueChunk(data=data)
        finally:
            self._num_fetches -= 1

    def _open(self, request: pb.FetchCatalogueRequest) -> BinaryIO | None:
        """An open file outlives its removal."""
        path = self._catalogues.file_of(request.name, request.version, request.checksum)
        try:
            return None if path is None else path.open("rb")
        except FileNotFoundError:
            return None
