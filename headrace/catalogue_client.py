"""The cluster's catalogues and targeting over HTTP, for the command line."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgspec

CHUNK_BYTES = 256 * 1024
POLL_S = 0.3
_TIMEOUT = httpx.Timeout(600.0, connect=10.0)
_UPLOAD_TIMEOUT = httpx.Timeout(None, connect=10.0)
"""A large catalogue compiles for minutes after its last byte."""
TYPES = {".csv": "text/csv", ".jsonl": "application/x-ndjson", ".ndjson": "application/x-ndjson"}

OnProgress = Callable[[str, float | None], None]


class CatalogueError(Exception):
    """The request failed; the message is the server's. Handled by the command line."""

    def __init__(self, message: str, faults: tuple[tuple[int, str], ...] = (), num_faults: int = 0) -> None:
        super().__init__(message)
        self.faults = faults
        """By line, the first of them."""
        self.num_faults = num_faults


class Upload(msgspec.Struct, frozen=True, kw_only=True):
    """The part of the server's answer to an upload that is shown."""

    name: str
    version: int
    items: int
    nodes: int
    bytes: int
    num_faults: int
    faults: list[dict[str, Any]]
    timings_ms: dict[str, float]


class CatalogueClient:
    def __init__(self, http_url: str, client: httpx.Client | None = None) -> None:
        self._http_url = http_url
        self._client = client or httpx.Client(base_url=http_url, timeout=_TIMEOUT)

    def __enter__(self) -> "CatalogueClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def put(self, file: Path, name: str, *, skip_bad: bool, on_progress: OnProgress) -> Upload:
        """Sends the file and waits until it is compiled. Raises CatalogueError, OSError."""
        num_bytes = file.stat().st_size
        headers = {"content-type": content_type_of(file), "content-length": str(num_bytes)}
        is_sent, has_answered = threading.Event(), threading.Event()

        def body() -> Iterator[bytes]:
            sent = 0
            with file.open("rb") as source:
                while chunk := source.read(CHUNK_BYTES):
                    yield chunk
                    sent += len(chunk)
                    on_progress("sending", sent / max(1, num_bytes))
            is_sent.set()

        def watch() -> None:
            """What the server is at, once it has all."""
            while not has_answered.wait(POLL_S):
                if is_sent.is_set():
                    self._show_progress(name, on_progress)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            answer = self._call(
                "PUT",
                _path(name),
                content=body(),
                headers=headers,
                params={"skip_bad": "true"} if skip_bad else {},
                timeout=_UPLOAD_TIMEOUT,
            )
        finally:
            has_answered.set()
            watcher.join()
        return msgspec.convert(answer, Upload)

    def list(self) -> list[dict[str, Any]]:
        """Raises CatalogueError."""
        return list(self._call("GET", "/v1/catalogues")["data"])

    def delete(self, name: str) -> None:
        """Raises CatalogueError."""
        self._call("DELETE", _path(name))

    def target(self, body: dict[str, Any], session_id: str | None) -> dict[str, Any]:
        """Raises CatalogueError."""
        headers = {} if session_id is None else {"x-session-id": session_id}
        return self._call("POST", "/v1/targeting", json=body, headers=headers)

    def _show_progress(self, name: str, on_progress: OnProgress) -> None:
        with contextlib.suppress(httpx.HTTPError, ValueError):
            progress = self._client.get(_path(name), timeout=5.0).json().get("progress")
            if progress:
                done, total = progress["done"], progress["total"]
                on_progress(str(progress["phase"]), done / total if total else None)

    def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            response = self._client.request(method, path, **options)
        except httpx.HTTPError as error:
            raise CatalogueError(f"{self._http_url}: {error or type(error).__name__}") from None
        if response.status_code != 200:
            raise _refused(response)
        return dict(response.json())


def content_type_of(file: Path) -> str:
    """By the name's end, else by its first character: JSON lines begin with a brace."""
    if (known := TYPES.get(file.suffix.lower())) is not None:
        return known
    with file.open("rb") as source:
        head = source.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return TYPES[".jsonl"] if head.startswith(b"{") else TYPES[".csv"]


def _path(name: str) -> str:
    return f"/v1/catalogues/{quote(name, safe='')}"


def _refused(response: httpx.Response) -> CatalogueError:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        body = json.loads(response.content)
        faults = tuple((int(fault["line"]), str(fault["message"])) for fault in body.get("faults") or ())
        return CatalogueError(str(body["error"]["message"]), faults, int(body.get("num_faults", len(faults))))
    return CatalogueError(f"{response.status_code}: {response.text[:500]}")
