"""A body of any length into a file, a buffer at a time, while requests' tokens go on."""

import asyncio
import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from starlette.types import Receive

from router.errors import RequestError, invalid, unavailable
from router.http import ClientGoneError, body_too_large

BUFFER_BYTES = 1024 * 1024
"""Written at once, in a thread: what a router holds of a body."""
IDLE_TIMEOUT_S = 30.0
"""Without a byte for this long, the client is taken for lost."""


OnBytes = Callable[[int, int | None], None]
"""Bytes that have come, and how many were announced."""


def _silent(num_bytes: int, told_bytes: int | None) -> None:
    pass


async def spool_body(
    headers: Mapping[str, str],
    receive: Receive,
    path: Path,
    max_bytes: int,
    *,
    idle_timeout_s: float,
    on_bytes: OnBytes = _silent,
) -> int:
    """Write the body to `path`; returns its bytes.

    Raises RequestError (400 where it is shorter than it said, 408, 413, 503 without space), ClientGoneError.
    """
    told_bytes = _content_length(headers)
    if told_bytes is not None and told_bytes > max_bytes:
        raise body_too_large(max_bytes)
    file = await asyncio.to_thread(path.open, "wb")
    try:
        num_bytes = await _copy(
            receive, file, max_bytes, idle_timeout_s, lambda count: on_bytes(count, told_bytes)
        )
    finally:
        await asyncio.to_thread(file.close)
    if told_bytes is not None and num_bytes != told_bytes:
        message = f"the body ended after {num_bytes} of {told_bytes} bytes; nothing was changed"
        raise invalid("content-length", message, code="body_cut_short")
    return num_bytes


def _content_length(headers: Mapping[str, str]) -> int | None:
    """None: it is sent in chunks."""
    text = headers.get("content-length")
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal()):
        raise invalid("content-length", "`content-length` must be a number of bytes")
    return int(text[:20])


async def _copy(
    receive: Receive,
    file: BinaryIO,
    max_bytes: int,
    idle_timeout_s: float,
    on_bytes: Callable[[int], None],
) -> int:
    buffer = bytearray()
    num_bytes, has_more = 0, True
    while has_more:
        try:
            async with asyncio.timeout(idle_timeout_s):
                message = await receive()
        except TimeoutError:
            text = f"no byte of the body for {idle_timeout_s:g} s, after {num_bytes}; nothing was changed"
            raise RequestError(408, text, code="request_timeout") from None
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        chunk = message.get("body", b"")
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise body_too_large(max_bytes)
        buffer += chunk
        has_more = message.get("more_body", False)
        if len(buffer) >= BUFFER_BYTES or not has_more:
            await _write(file, bytes(buffer))
            buffer.clear()
            on_bytes(num_bytes)
    return num_bytes


async def _write(file: BinaryIO, data: bytes) -> None:
    try:
        await asyncio.to_thread(file.write, data)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"no space is left for the upload in the router's catalogue folder: {error.strerror}"
        raise unavailable(message, code="no_space", retry_after_s=60.0) from None
