"""Prompts to token ids: plain text, ids as they are, or messages through the model's chat template."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from cluster.model_card import ServedModel
from cluster.text import InvalidTextError, Tokenizer
from router.chat_template import ChatMessage, ChatTemplate, ChatTemplateError
from router.errors import invalid

T = TypeVar("T")

MAX_INLINE_CHARS = 8_192
"""Longer text is tokenized in a thread: about 4 ms that other requests' tokens need not wait for."""
# A token is rarely longer than its bytes; normalizers (NFC) shrink text at most threefold.
NORMALIZER_SHRINK = 3


class PromptEncoder:
    """Raises RequestError (400) that names `prompt` or `messages`."""

    def __init__(self, served: ServedModel) -> None:
        """Takes about 0.1 s. Raises UnsupportedTokenizerError, UnsupportedTemplateError."""
        card = served.card
        self.tokenizer = Tokenizer.of(served)
        self._add_bos = card.add_bos_token
        self._max_context_tokens = card.max_context_tokens
        special_texts = [self.tokenizer.token_text(token_id) for token_id in self.tokenizer.special_ids]
        self._template = (
            ChatTemplate(
                card.chat_template,
                bos_token=card.bos_token,
                eos_token=card.eos_token,
                special_texts=special_texts,
            )
            if card.chat_template
            else None
        )
        num_tokens = self.tokenizer.num_tokens
        self._longest_token_bytes = max(
            (len(self.tokenizer.token_bytes(token_id)) for token_id in range(num_tokens)), default=1
        )

    async def text(self, prompt: str, *, param: str = "prompt") -> list[int]:
        """A completion's prompt is all the caller's own: control tokens written out in it count as such."""
        self._check_length(param, len(prompt))
        return await self._run(param, len(prompt), lambda: self._encode([prompt], add_bos=self._add_bos))

    async def chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        template = self._template
        if template is None:
            message = "this model has no chat template; use /v1/completions"
            raise invalid("messages", message, code="no_chat_template")
        num_chars = sum(len(message.content) for message in messages)
        self._check_length("messages", num_chars)

        def render_and_encode() -> list[int]:
            try:
                return self._encode(template.render(messages), add_bos=False)
            except ChatTemplateError as error:
                raise invalid("messages", str(error), code="chat_template") from None

        return await self._run("messages", num_chars, render_and_encode)

    async def _run(self, param: str, num_chars: int, work: Callable[[], T]) -> T:
        try:
            return work() if num_chars <= MAX_INLINE_CHARS else await asyncio.to_thread(work)
        except InvalidTextError as error:
            raise invalid(param, f"`{param}`: {error}", code="invalid_value") from None

    def _encode(self, pieces: Sequence[str], *, add_bos: bool) -> list[int]:
        if not pieces:
            return []
        ids = self.tokenizer.encode(pieces[0], allow_special=True, add_bos=add_bos)
        for piece in pieces[1:]:
            ids += self.tokenizer.encode(piece, allow_special=True)
        return ids

    def _check_length(self, param: str, num_chars: int) -> None:
        """Refuse what cannot fit whatever its tokens are, before the seconds that tokenizing it takes."""
        at_least = num_chars // (self._longest_token_bytes * NORMALIZER_SHRINK)
        if at_least > self._max_context_tokens:
            raise invalid(
                param,
                f"`{param}` has {num_chars} characters, which are more than {at_least} tokens; "
                f"the model's limit is {self._max_context_tokens} for prompt and max_tokens together",
                code="context_length_exceeded",
            )
