"""Server-sent events of a streamed answer, built from bytes that are the same in every chunk.

Only the text is encoded for each chunk: no object is built, nothing is copied but the bytes sent.
`openai_answers` has the same chunks as types, and tests hold the two together.
"""

from typing import Protocol

import msgspec

from cluster.messages import Record
from cluster.text import Tokenizer
from router.logprobs import ChatLogprobWriter, CompletionLogprobWriter
from router.openai_answers import HeadraceFacts, UsageBody
from router.sequence import SequenceEnded, TextEmitted

DONE = b"data: [DONE]\n\n"
_json = msgspec.json.Encoder().encode


class AnswerHead(Record, frozen=True, kw_only=True):
    """What every chunk and body of one answer begins with."""

    id: str
    object: str
    created: int
    model: str


class ChunkWriter(Protocol):
    """One request's chunks. Every method returns zero or more whole events."""

    def text(self, event: TextEmitted) -> bytes: ...

    def ended(self, event: SequenceEnded, facts: HeadraceFacts | None) -> bytes: ...

    def usage(self, usage: UsageBody, facts: HeadraceFacts | None) -> bytes: ...


def _start(head: AnswerHead) -> bytes:
    """Up to and including the opening of `choices`."""
    return b"data: " + _json(head)[:-1] + b',"choices":['


def _close(*, include_usage: bool) -> bytes:
    """From behind the choice on. OpenAI announces a usage chunk by `"usage":null` in all others."""
    return b'],"usage":null}\n\n' if include_usage else b"]}\n\n"


def _with_facts(event: bytes, facts: HeadraceFacts | None) -> bytes:
    """`event` with the extension in its last chunk's object."""
    return event if facts is None else event[:-3] + b',"headrace":' + _json(facts) + b"}\n\n"


def error_event(body: bytes) -> bytes:
    """Ends a stream that cannot go on; `body` is OpenAI's error object."""
    return b"data: " + body + b"\n\n"


class CompletionChunks:
    def __init__(
        self, head: AnswerHead, num_choices: int, *, include_usage: bool, logprobs_of: Tokenizer | None
    ) -> None:
        """`logprobs_of` None: no logprobs."""
        start = _start(head)
        self._usage_start = start
        self._starts = [start + b'{"index":%d,"text":' % choice for choice in range(num_choices)]
        self._close = _close(include_usage=include_usage)
        self._text_end = b',"logprobs":null,"finish_reason":null}' + self._close
        self._logprobs = [CompletionLogprobWriter(logprobs_of) for _ in range(num_choices) if logprobs_of]

    def text(self, event: TextEmitted) -> bytes:
        if self._logprobs:
            logprobs = _json(self._logprobs[event.choice].body(event.tokens))
            end = b',"logprobs":' + logprobs + b',"finish_reason":null}' + self._close
            return self._starts[event.choice] + _json(event.text) + end
        return self._starts[event.choice] + _json(event.text) + self._text_end if event.text else b""

    def ended(self, event: SequenceEnded, facts: HeadraceFacts | None) -> bytes:
        end = b',"logprobs":null,"finish_reason":"%s"}' % event.reason.encode() + self._close
        return _with_facts(self._starts[event.choice] + _json(event.text) + end, facts)

    def usage(self, usage: UsageBody, facts: HeadraceFacts | None) -> bytes:
        return _with_facts(self._usage_start + b'],"usage":' + _json(usage) + b"}\n\n", facts)


class ChatChunks:
    def __init__(
        self, head: AnswerHead, num_choices: int, *, include_usage: bool, logprobs_of: Tokenizer | None
    ) -> None:
        """`logprobs_of` None: no logprobs."""
        start = _start(head)
        close = self._close = _close(include_usage=include_usage)
        self._usage_start = start
        self._starts = [start + b'{"index":%d,"delta":' % choice for choice in range(num_choices)]
        self._text_end = b'},"logprobs":null,"finish_reason":null}' + close
        self._openings = [
            begin + b'{"role":"assistant","content":""' + self._text_end for begin in self._starts
        ]
        """Each choice's first chunk, gone once sent."""
        self._logprobs = ChatLogprobWriter(logprobs_of) if logprobs_of else None

    def text(self, event: TextEmitted) -> bytes:
        opening = self._opening(event.choice)
        if self._logprobs is not None:
            logprobs = _json(self._logprobs.body(event.tokens))
            end = b'},"logprobs":' + logprobs + b',"finish_reason":null}' + self._close
        elif event.text:
            end = self._text_end
        else:
            return opening
        return opening + self._starts[event.choice] + b'{"content":' + _json(event.text) + end

    def ended(self, event: SequenceEnded, facts: HeadraceFacts | None) -> bytes:
        start = self._starts[event.choice]
        tail = start + b'{"content":' + _json(event.text) + self._text_end if event.text else b""
        last = start + b'{},"logprobs":null,"finish_reason":"%s"}' % event.reason.encode() + self._close
        return self._opening(event.choice) + tail + _with_facts(last, facts)

    def usage(self, usage: UsageBody, facts: HeadraceFacts | None) -> bytes:
        return _with_facts(self._usage_start + b'],"usage":' + _json(usage) + b"}\n\n", facts)

    def _opening(self, choice: int) -> bytes:
        opening, self._openings[choice] = self._openings[choice], b""
        return opening
