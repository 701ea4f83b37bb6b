"""A load generator lean enough to share two cores with what it measures.

One keep-alive HTTP/1.1 connection a client, raw asyncio protocol, no parsing beyond what the
figures need: when the first text arrived, that the stream ended, and the usage it reported.
"""

import asyncio
import json
import re
import time
from dataclasses import dataclass, field

_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
_FIRST_TEXT = re.compile(rb'"text":\s*"[^"]')
_END_OF_BODY = b"\r\n0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class StreamResult:
    sent_at_s: float
    first_text_at_s: float
    ended_at_s: float
    completion_tokens: int
    body: bytes


class StreamError(Exception):
    """A response that was not a complete stream; the message holds its head."""


@dataclass(slots=True)
class _Exchange:
    done: asyncio.Future[None]
    received: bytearray = field(default_factory=bytearray)
    first_text_at_s: float = 0.0


class SseConnection(asyncio.Protocol):
    """One connection; `stream` sends a request and waits for its whole streamed answer."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._exchange: _Exchange | None = None

    @classmethod
    async def open(cls, host: str, port: int) -> "SseConnection":
        _, connection = await asyncio.get_running_loop().create_connection(cls, host, port)
        return connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        exchange.received += data
        if not exchange.first_text_at_s and _FIRST_TEXT.search(exchange.received):
            exchange.first_text_at_s = time.perf_counter()
        if exchange.received.endswith(_END_OF_BODY) and not exchange.done.done():
            exchange.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._exchange is not None and not self._exchange.done.done():
            head = bytes(self._exchange.received[:500]).decode(errors="replace")
            self._exchange.done.set_exception(StreamError(f"connection lost ({exc}); received: {head!r}"))

    async def stream(self, request: bytes, timeout_s: float = 60.0) -> StreamResult:
        """Raises StreamError where the answer is no complete stream with usage."""
        assert self._transport is not None
        self._exchange = _Exchange(asyncio.get_running_loop().create_future())
        sent_at_s = time.perf_counter()
        self._transport.write(request)
        async with asyncio.timeout(timeout_s):
            await self._exchange.done
        ended_at_s = time.perf_counter()
        exchange, self._exchange = self._exchange, None
        usage = _USAGE.search(exchange.received)
        if usage is None or not exchange.received.startswith(b"HTTP/1.1 200"):
            raise StreamError(bytes(exchange.received[:500]).decode(errors="replace"))
        return StreamResult(
            sent_at_s=sent_at_s,
            first_text_at_s=exchange.first_text_at_s,
            ended_at_s=ended_at_s,
            completion_tokens=int(usage.group(1)),
            body=bytes(exchange.received),
        )

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def completion_request(
    host: str, port: int, model: str, prompt: str, max_tokens: int, *, timeline: bool = False
) -> bytes:
    """A streamed `/v1/completions` request as it goes over the wire."""
    body = json.dumps(
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
    )
    if timeline:
        head += "x-headrace-timeline: 1\r\n"
    return head.encode() + b"\r\n" + body
