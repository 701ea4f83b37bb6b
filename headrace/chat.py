"""A conversation with the cluster in the terminal: streams, and says how fast it was."""

import contextlib
import json
import secrets
import time
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec

_TIMEOUT_S = 600.0
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class ChatError(Exception):
    """The request failed; the message is the server's. Handled by the command line."""


class ChatOptions(msgspec.Struct, frozen=True, kw_only=True):
    http_url: str
    model: str
    max_tokens: int
    temperature: float
    seed: int | None
    system: str | None
    session_id: str


class Delta(msgspec.Struct, frozen=True):
    """A piece of the answer, safe to print: without control characters."""

    text: str


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer and how it came."""

    text: str
    finish_reason: str
    completion_tokens: int
    prompt_tokens: int
    cached_tokens: int
    accepted_tokens: int = 0
    """Of those that the worker drafted; 0 also where the server does not tell."""
    rejected_tokens: int = 0
    ttft_s: float
    duration_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """Of the tokens after the first; None where there was no second."""
        span_s = self.duration_s - self.ttft_s
        return (self.completion_tokens - 1) / span_s if self.completion_tokens > 1 and span_s > 0 else None

    def summary(self) -> str:
        rate = f", {self.tokens_per_s:.1f} tok/s" if self.tokens_per_s else ""
        cached = f" ({self.cached_tokens} cached)" if self.cached_tokens else ""
        return (
            f"TTFT {self.ttft_s * 1e3:.0f} ms{rate}, {self.completion_tokens} tokens, "
            f"prompt {self.prompt_tokens}{cached}, {self.finish_reason}"
        )


def printable(text: str) -> str:
    """Without control characters, which would command the terminal."""
    return text.translate(_CONTROL)


def new_session_id() -> str:
    return f"chat-{secrets.token_hex(6)}"


class Conversation:
    """Keeps the messages; one session id, so the workers keep its KV too. Not for several threads."""

    def __init__(self, options: ChatOptions, client: httpx.Client | None = None) -> None:
        self._options = options
        self._client = client or httpx.Client(base_url=options.http_url, timeout=_TIMEOUT_S)
        self._messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        system = self._options.system
        self._messages = [{"role": "system", "content": system}] if system else []

    def close(self) -> None:
        self._client.close()

    def send(self, text: str) -> Iterator[Delta | Reply]:
        """Streams the answer; the last item is its Reply.

        Raises ChatError. Left early (or on an error), the conversation is as it was before the call.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        started_s = time.perf_counter()
        first_s: float | None = None
        answer: list[str] = []
        finish_reason, usage = "", dict[str, int]()
        for chunk in self._chunks(self._body(messages)):
            for choice in chunk.get("choices") or ():
                finish_reason = choice.get("finish_reason") or finish_reason
                if content := choice.get("delta", {}).get("content"):
                    first_s = first_s or time.perf_counter()
                    answer.append(content)
                    yield Delta(printable(content))
            usage = _usage(chunk) or usage
        ended_s = time.perf_counter()
        if not finish_reason:
            raise ChatError("the connection ended before the answer did")
        self._messages = [*messages, {"role": "assistant", "content": "".join(answer)}]
        yield Reply(
            text="".join(answer),
            finish_reason=finish_reason,
            completion_tokens=usage.get("completion_tokens", 0),
            prompt_tokens=usage.get("prompt_tokens", 0),
            cached_tokens=usage.get("cached_tokens", 0),
            accepted_tokens=usage.get("accepted_tokens", 0),
            rejected_tokens=usage.get("rejected_tokens", 0),
            ttft_s=(first_s or ended_s) - started_s,
            duration_s=ended_s - started_s,
        )

    def _body(self, messages: list[dict[str, str]]) -> dict[str, object]:
        options = self._options
        return {
            "model": options.model,
            "messages": messages,
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({} if options.seed is None else {"seed": options.seed}),
        }

    def _chunks(self, body: dict[str, object]) -> Iterator[dict[str, Any]]:
        headers = {"x-session-id": self._options.session_id}
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
                if response.status_code != 200:
                    raise ChatError(_error_message(response))
                for line in response.iter_lines():
                    data = line.removeprefix("data: ")
                    if data == line or data == "[DONE]":
                        continue
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise ChatError(str(chunk["error"].get("message", chunk["error"])))
                    yield chunk
        except httpx.HTTPError as error:
            raise ChatError(f"{self._options.http_url}: {error}") from None


def _usage(chunk: dict[str, Any]) -> dict[str, int] | None:
    usage = chunk.get("usage")
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details") or {}
    drafts = usage.get("completion_tokens_details") or {}
    return {
        "prompt_tokens": usage.get("prompt_tokens", 0),
        "completion_tokens": usage.get("completion_tokens", 0),
        "cached_tokens": details.get("cached_tokens", 0),
        "accepted_tokens": drafts.get("accepted_prediction_tokens", 0),
        "rejected_tokens": drafts.get("rejected_prediction_tokens", 0),
    }


def _error_message(response: httpx.Response) -> str:
    text = response.read().decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(text)["error"]["message"])
    return f"{response.status_code}: {text[:500]}"
