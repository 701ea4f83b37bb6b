"""What the router's gRPC services share: metadata, chat messages, and how an error is told."""

import math
from typing import Any

import grpc.aio

from cluster.wire import headrace_pb2 as pb
from router.admission import session_of
from router.chat_template import ChatMessage
from router.errors import RequestError, invalid
from router.openai_api import MAX_MESSAGES, Body, Role
from router.request_body import BodyDecoder

AnyContext = grpc.aio.ServicerContext[Any, Any]


class _Message(Body, frozen=True, kw_only=True):
    role: Role
    content: str


_message = BodyDecoder(_Message)


def chat_messages(chat: pb.ChatMessages) -> list[ChatMessage]:
    if not 1 <= len(chat.messages) <= MAX_MESSAGES:
        raise invalid("chat", f"`chat` must hold 1 to {MAX_MESSAGES} messages", code="invalid_value")
    checked = [_message.convert({"role": m.role, "content": m.content}) for m in chat.messages]
    return [
        ChatMessage(role="system" if m.role == "developer" else m.role, content=m.content) for m in checked
    ]


def session_metadata(session_id: str) -> dict[str, str]:
    """The request's own field wins over the metadata's; empty, it is not set."""
    checked = session_of(session_id or None, "session_id")
    return {} if checked is None else {"x-session-id": checked}


def metadata_of(context: AnyContext) -> dict[str, str]:
    return {str(key): value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


async def abort(context: AnyContext, error: RequestError) -> None:
    """Raises: nothing runs behind it."""
    trailers = [
        ("headrace-error-code", error.code),
        ("headrace-error-param", error.param),
        (
            "retry-after-ms",
            None if error.retry_after_s is None else str(math.ceil(error.retry_after_s * 1e3)),
        ),
    ]
    given = tuple((key, value) for key, value in trailers if value is not None)
    await context.abort(error.grpc_status, error.message, given)
