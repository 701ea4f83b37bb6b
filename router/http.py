"""HTTP as this router speaks it: bounded bodies, one error shape, and knowing when a client has left."""

import asyncio
import math
import re
from collections.abc import Iterable, Mapping
from email.message import Message
from typing import Self

from starlette.types import Receive, Scope, Send

from cluster.ids import new_request_id
from router.admission import Caller, campaign_of, deadline_header, prefill_hop_of, session_of, tenant_of
from router.errors import RequestError

BODY_TIMEOUT_S = 30.0
_SANE_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
JSON_TYPE = b"application/json"
SSE_TYPE = b"text/event-stream; charset=utf-8"

DEADLINE_HEADER = "x-headrace-deadline-ms"
CAMPAIGN_HEADER = "x-headrace-campaign"
SESSION_HEADER = "x-session-id"
HOP_HEADER = "x-headrace-prefill-hop"
TIMELINE_HEADER = "x-headrace-timeline"
REQUEST_ID_HEADER = "x-request-id"


class ClientGoneError(Exception):
    """The client closed its connection. Nobody is left to be answered."""


def headers_of(scope: Scope) -> dict[str, str]:
    """The first value of each header, names in lower case."""
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.decode("latin-1"), value.decode("latin-1"))
    return headers


def request_id_of(headers: Mapping[str, str]) -> str:
    """The client's own id, for it to recognise the answer by, or a new one."""
    given = headers.get(REQUEST_ID_HEADER)
    return given if given is not None and _SANE_REQUEST_ID.fullmatch(given) else new_request_id()


def caller_of(headers: Mapping[str, str]) -> Caller:
    """From HTTP headers or gRPC metadata. Raises RequestError."""
    return Caller(
        tenant=tenant_of(headers.get("authorization")),
        session_id=session_of(headers.get(SESSION_HEADER), SESSION_HEADER),
        deadline_ms=deadline_header(headers.get(DEADLINE_HEADER), DEADLINE_HEADER),
        campaign=campaign_of(headers.get(CAMPAIGN_HEADER), CAMPAIGN_HEADER),
        prefill_hop=prefill_hop_of(headers.get(HOP_HEADER), HOP_HEADER),
        wants_timeline=headers.get(TIMELINE_HEADER) == "1",
    )


def check_json(headers: Mapping[str, str]) -> None:
    given = headers.get("content-type")
    # The common case first: parsing a header takes longer than all the rest of this.
    if given != "application/json" and not _is_json_type(given or ""):
        shown = f", not {given[:80]!r}" if given else ""
        raise RequestError(
            415,
            f"the content type must be application/json in UTF-8{shown}",
            param="content-type",
            code="unsupported_media_type",
        )
    check_encoding(headers)


def check_encoding(headers: Mapping[str, str]) -> None:
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise RequestError(
            415,
            f"`content-encoding` must be identity, not {encoding[:80]!r}",
            param="content-encoding",
            code="unsupported_media_type",
        )


def _is_json_type(content_type: str) -> bool:
    header = Message()
    header["content-type"] = content_type
    charset = header.get_param("charset", "utf-8")
    is_utf8 = isinstance(charset, str) and charset.lower().replace("-", "") == "utf8"
    return header.get_content_type() == "application/json" and is_utf8


def body_too_large(max_bytes: int) -> RequestError:
    message = f"the body must be at most {max_bytes} bytes"
    return RequestError(413, message, param="content-length", code="request_too_large")


async def read_body(headers: Mapping[str, str], receive: Receive, max_bytes: int) -> bytes:
    """The whole body; one that says or shows that it is too large is left unread.

    Raises RequestError (408, 413), ClientGoneError.
    """
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > max_bytes:
        raise body_too_large(max_bytes)
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                chunk = message.get("body", b"")
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise body_too_large(max_bytes)
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
    except TimeoutError:
        message_text = f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s"
        raise RequestError(408, message_text, code="request_timeout") from None


class ClientWatch:
    """Cancels its `async with` block when the client closes the connection; that raises ClientGoneError.

    Enter it only after the whole body has been read: it reads on.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._is_gone = False
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        block = asyncio.current_task()
        assert block is not None
        self._watcher = asyncio.create_task(self._watch(block))
        return self

    def answered(self) -> None:
        """Stop watching. Call it before the response's last message: a server then reports a disconnect."""
        if self._watcher is not None:
            self._watcher.cancel()

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.answered()
        block = asyncio.current_task()
        assert block is not None
        if self._is_gone and kind is asyncio.CancelledError and block.uncancel() == 0:
            raise ClientGoneError

    async def _watch(self, block: "asyncio.Task[object]") -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._is_gone = True
        block.cancel()


async def respond(
    send: Send,
    status: int,
    body: bytes,
    headers: Iterable[tuple[bytes, bytes]],
    content_type: bytes = JSON_TYPE,
) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", content_type),
                (b"content-length", b"%d" % len(body)),
                *headers,
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})


def error_headers(error: RequestError) -> list[tuple[bytes, bytes]]:
    headers: list[tuple[bytes, bytes]] = []
    if error.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
        headers.append((b"retry-after-ms", b"%d" % max(1, math.ceil(error.retry_after_s * 1_000))))
    if error.status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body stays unread
    return headers
