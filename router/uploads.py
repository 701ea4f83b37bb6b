"""Uploads under way: one a catalogue, each from the client's bytes to a version that serves."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec
from starlette.types import Receive

from cluster.catalogue.file_lock import try_locked
from cluster.config import CatalogueConfig
from router.catalogues import Catalogues, upload_under_way
from router.compile_client import CompileCrashError, compile_in_process
from router.compile_messages import Busy, Compiled, CompileJob, NoSpace, Progressed, Refused
from router.errors import RequestError, internal, overloaded, unavailable
from router.http import ClientWatch
from router.targeting_api import UploadProgress
from router.upload import IDLE_TIMEOUT_S, spool_body

RECEIVING = "receive"
WAITING = "wait"
MAX_UPLOADS = 16
"""Under way in this router; one more is refused at once."""
MAX_COMPILING = 2
"""Of them; the others wait."""
SPOOL_FOLDER = ".uploads"
"""Beside the tenants' folders."""
_log = logging.getLogger(__name__)

Key = tuple[str, str]
"""Tenant and name."""


class UploadRefusedError(RequestError):
    """What was sent is no catalogue; `refused` has the lines at fault."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(400, _first_line(refused.message), param="body", code="invalid_catalogue")
        self.refused = refused

    def body(self) -> bytes:
        fields = msgspec.json.decode(super().body())
        faults = [msgspec.structs.asdict(fault) for fault in self.refused.faults]
        return msgspec.json.encode({**fields, "num_faults": self.refused.num_faults, "faults": faults})


class Uploads:
    """Belongs to one event loop. Clears at its start what one that was killed left."""

    def __init__(
        self, catalogues: Catalogues, config: CatalogueConfig, *, idle_timeout_s: float = IDLE_TIMEOUT_S
    ) -> None:
        self._catalogues = catalogues
        self._config = config
        self._idle_timeout_s = idle_timeout_s
        self._folder = catalogues.folder / SPOOL_FOLDER
        self._compiling = asyncio.Semaphore(MAX_COMPILING)
        self._progress: dict[Key, UploadProgress] = {}
        for left in self._folder.glob("*.upload"):
            with try_locked(left):
                pass

    def progress(self, tenant: str, name: str) -> UploadProgress | None:
        """None where no upload of it is under way in this router."""
        return self._progress.get((tenant, name))

    def under_way(self, tenant: str) -> Mapping[str, UploadProgress]:
        """By name."""
        return {name: progress for (of, name), progress in self._progress.items() if of == tenant}

    async def put(
        self,
        tenant: str,
        name: str,
        headers: Mapping[str, str],
        receive: Receive,
        *,
        upload_format: Literal["jsonl", "csv"],
        skip_bad: bool,
    ) -> Compiled:
        """Nothing is left of one that fails. Raises RequestError (UploadRefusedError), ClientGoneError."""
        with self._only_one((tenant, name)) as key, self._spool_path() as path:
            await self._catalogues.check_room(tenant, name)
            started_s = time.perf_counter()
            await spool_body(
                headers,
                receive,
                path,
                self._config.max_upload_bytes,
                idle_timeout_s=self._idle_timeout_s,
                on_bytes=lambda done, total: self._show(key, RECEIVING, done, total),
            )
            received_ms = (time.perf_counter() - started_s) * 1e3
            job = self._catalogues.compile_job(
                tenant, name, path, upload_format=upload_format, skip_bad=skip_bad
            )
            async with ClientWatch(receive) as client:
                compiled = await self._compile(key, job)
                client.answered()
            return msgspec.structs.replace(
                compiled, phase_ms={RECEIVING: round(received_ms, 3), **compiled.phase_ms}
            )

    async def _compile(self, key: Key, job: CompileJob) -> Compiled:
        def show(progressed: Progressed) -> None:
            self._show(key, progressed.phase, progressed.done, progressed.total)

        self._show(key, WAITING, 0, None)
        try:
            async with self._compiling:
                message = await compile_in_process(job, show)
        except CompileCrashError:
            _log.exception("an upload of %r failed", job.name)
            raise internal() from None
        match message:
            case Compiled():
                return message
            case Refused():
                raise UploadRefusedError(message)
            case Busy():
                raise upload_under_way(job.name)
            case NoSpace():
                raise unavailable(message.message, code="no_space", retry_after_s=60.0)
            case Progressed():
                raise AssertionError("progress is not a last word")

    def _show(self, key: Key, phase: str, done: int, total: int | None) -> None:
        self._progress[key] = UploadProgress(phase=phase, done=done, total=total or 0)

    @contextlib.contextmanager
    def _only_one(self, key: Key) -> Iterator[Key]:
        if key in self._progress:
            raise upload_under_way(key[1])
        if len(self._progress) >= MAX_UPLOADS:
            raise overloaded(f"{MAX_UPLOADS} uploads are under way, the limit", retry_after_s=10.0)
        self._show(key, RECEIVING, 0, None)
        try:
            yield key
        finally:
            del self._progress[key]

    @contextlib.contextmanager
    def _spool_path(self) -> Iterator[Path]:
        """Locked while it is wanted, and gone then: what is not locked was left by somebody killed."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / f"{secrets.token_hex(8)}.upload"
        with try_locked(path) as is_ours:
            if not is_ours:  # a router that starts is looking at it this very moment
                raise unavailable("the catalogue folder is being cleared; try again")
            yield path


def _first_line(message: str) -> str:
    """The faults behind it are listed by themselves."""
    return message.partition("\n")[0]
