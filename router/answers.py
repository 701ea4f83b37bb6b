"""The two OpenAI routes as data: how a body becomes prompts, and events become chunks or one answer."""

from collections.abc import Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar, cast

import msgspec

from cluster.messages import EmittedToken
from cluster.text import Tokenizer
from router.admission import Limits, check_token_ids, prompts_of, same_or_only
from router.asks import SamplingAsk
from router.chat_template import ChatMessage
from router.chunks import AnswerHead, ChatChunks, ChunkWriter, CompletionChunks
from router.errors import invalid
from router.logprobs import ChatLogprobWriter, CompletionLogprobWriter
from router.openai_answers import (
    ChatAnswerMessage,
    ChatChoice,
    ChatCompletionBody,
    CompletionBody,
    CompletionChoice,
    FinishReasonText,
    HeadraceFacts,
    UsageBody,
)
from router.openai_api import (
    MUST_BE_FALSE,
    ChatCompletionRequest,
    CommonFields,
    CompletionRequest,
    Message,
)
from router.request_body import BodyDecoder
from router.sequence import SequenceEnded, SequenceEvent, TextEmitted
from router.tokenizer import PromptEncoder

R = TypeVar("R", bound=CommonFields)


class CollectedChoice:
    """One choice of an answer that is not streamed, as it grows."""

    __slots__ = ("ended", "texts", "tokens")

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.tokens: list[EmittedToken] = []
        self.ended: SequenceEnded | None = None

    def add(self, event: SequenceEvent) -> None:
        self.texts.append(event.text)
        if isinstance(event, TextEmitted):
            self.tokens += event.tokens
        else:
            self.ended = event

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def finish_reason(self) -> FinishReasonText:
        assert self.ended is not None, "an answer is built when every choice has ended"
        return cast(FinishReasonText, self.ended.reason.value)


class Api(Protocol, Generic[R]):
    """One route. Raises RequestError on whatever is wrong with a body."""

    route: str
    """Its name in metrics."""
    decoder: BodyDecoder[R]
    id_prefix: str
    param: str
    """The field prompts come from."""

    async def prompts(self, request: R) -> list[list[int]]: ...

    def wanted(self, request: R) -> SamplingAsk: ...

    def chunks(self, request: R, answer_id: str, created: int, num_choices: int) -> ChunkWriter: ...

    def body(
        self,
        request: R,
        answer_id: str,
        created: int,
        choices: Sequence[CollectedChoice],
        usage: UsageBody,
        facts: HeadraceFacts | None,
    ) -> msgspec.Struct: ...


class CompletionsApi:
    route = "completions"
    decoder = BodyDecoder(CompletionRequest)
    id_prefix = "cmpl-"
    param = "prompt"

    def __init__(self, encoder: PromptEncoder, limits: Limits) -> None:
        self._encoder = encoder
        self._limits = limits

    async def prompts(self, request: CompletionRequest) -> list[list[int]]:
        token_ids: list[list[int]] = []
        for prompt in prompts_of(request.prompt):
            if isinstance(prompt, str):
                token_ids.append(await self._encoder.text(prompt))
            else:
                check_token_ids(prompt, self._limits, self.param)
                token_ids.append(prompt)
        return token_ids

    def wanted(self, request: CompletionRequest) -> SamplingAsk:
        if request.best_of is not None and request.best_of != (request.n or 1):
            raise invalid("best_of", f"`best_of` must equal `n` ({request.n or 1}): it is not implemented")
        return common_wanted(request, max_tokens=request.max_tokens, num_logprobs=request.logprobs)

    def chunks(
        self, request: CompletionRequest, answer_id: str, created: int, num_choices: int
    ) -> ChunkWriter:
        head = AnswerHead(id=answer_id, object="text_completion", created=created, model=request.model)
        return CompletionChunks(
            head,
            num_choices,
            include_usage=wants_usage(request),
            logprobs_of=self._logprobs_of(request),
        )

    def body(
        self,
        request: CompletionRequest,
        answer_id: str,
        created: int,
        choices: Sequence[CollectedChoice],
        usage: UsageBody,
        facts: HeadraceFacts | None,
    ) -> CompletionBody:
        tokenizer = self._logprobs_of(request)
        return CompletionBody(
            id=answer_id,
            object="text_completion",
            created=created,
            model=request.model,
            choices=[
                CompletionChoice(
                    index=index,
                    text=choice.text,
                    logprobs=CompletionLogprobWriter(tokenizer).body(choice.tokens) if tokenizer else None,
                    finish_reason=choice.finish_reason,
                )
                for index, choice in enumerate(choices)
            ],
            usage=usage,
            headrace=facts or msgspec.UNSET,
        )

    def _logprobs_of(self, request: CompletionRequest) -> Tokenizer | None:
        return None if request.logprobs is None else self._encoder.tokenizer


class ChatApi:
    route = "chat"
    decoder = BodyDecoder(ChatCompletionRequest)
    id_prefix = "chatcmpl-"
    param = "messages"

    def __init__(self, encoder: PromptEncoder) -> None:
        self._encoder = encoder

    async def prompts(self, request: ChatCompletionRequest) -> list[list[int]]:
        return [await self._encoder.chat([chat_message(message) for message in request.messages])]

    def wanted(self, request: ChatCompletionRequest) -> SamplingAsk:
        if request.top_logprobs is not None and not request.logprobs:
            raise invalid("top_logprobs", "`top_logprobs` needs `logprobs` to be true")
        max_tokens = same_or_only(
            "max_completion_tokens", request.max_completion_tokens, "max_tokens", request.max_tokens
        )
        num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
        return common_wanted(request, max_tokens=max_tokens, num_logprobs=num_logprobs)

    def chunks(
        self, request: ChatCompletionRequest, answer_id: str, created: int, num_choices: int
    ) -> ChunkWriter:
        head = AnswerHead(id=answer_id, object="chat.completion.chunk", created=created, model=request.model)
        return ChatChunks(
            head,
            num_choices,
            include_usage=wants_usage(request),
            logprobs_of=self._encoder.tokenizer if request.logprobs else None,
        )

    def body(
        self,
        request: ChatCompletionRequest,
        answer_id: str,
        created: int,
        choices: Sequence[CollectedChoice],
        usage: UsageBody,
        facts: HeadraceFacts | None,
    ) -> ChatCompletionBody:
        logprobs = ChatLogprobWriter(self._encoder.tokenizer) if request.logprobs else None
        return ChatCompletionBody(
            id=answer_id,
            object="chat.completion",
            created=created,
            model=request.model,
            choices=[
                ChatChoice(
                    index=index,
                    message=ChatAnswerMessage(role="assistant", content=choice.text),
                    logprobs=logprobs.body(choice.tokens) if logprobs else None,
                    finish_reason=choice.finish_reason,
                )
                for index, choice in enumerate(choices)
            ],
            usage=usage,
            headrace=facts or msgspec.UNSET,
        )


def chat_message(message: Message) -> ChatMessage:
    """As templates know it: `developer` is OpenAI's newer name for `system`."""
    content = message.content
    text = content if isinstance(content, str) else "".join([part.text for part in content])
    return ChatMessage(role="system" if message.role == "developer" else message.role, content=text)


def common_wanted(request: CommonFields, *, max_tokens: int | None, num_logprobs: int | None) -> SamplingAsk:
    check_neutral(msgspec.structs.asdict(request))
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "`stream_options` needs `stream` to be true")
    if request.stream_options is not None and request.stream_options.include_obfuscation:
        raise not_implemented("stream_options.include_obfuscation")
    return SamplingAsk(
        max_tokens=max_tokens,
        num_choices=request.n,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        stop=request.stop,
        seed=request.seed,
        ignore_eos=request.ignore_eos,
        num_logprobs=num_logprobs,
        deadline_ms=request.deadline_ms,
        campaign=request.campaign,
        speculation=request.speculation,
        phrases=request.phrases,
    )


def check_neutral(fields: Mapping[str, Any]) -> None:
    for name in MUST_BE_FALSE:
        if fields.get(name):
            raise not_implemented(name)


def not_implemented(name: str) -> Exception:
    return invalid(name, f"`{name}` must be false: it is not implemented", code="not_implemented")


def wants_usage(request: CommonFields) -> bool:
    return bool(request.stream_options and request.stream_options.include_usage)
