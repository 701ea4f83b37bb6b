"""Tokens with their log probabilities, in the two shapes OpenAI gives them."""

from collections.abc import Sequence

from cluster.messages import EmittedToken
from cluster.text import Tokenizer
from router.openai_answers import ChatLogprobs, ChatTokenLogprob, ChatTopLogprob, CompletionLogprobs

LEAST_LOGPROB = -9999.0
"""OpenAI's stand-in for the logarithm of zero, which JSON cannot write."""


def finite(logprob: float | None) -> float:
    return LEAST_LOGPROB if logprob is None or not logprob > LEAST_LOGPROB else logprob


class CompletionLogprobWriter:
    """One choice's logprobs: `text_offset` counts on from call to call."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def body(self, tokens: Sequence[EmittedToken]) -> CompletionLogprobs:
        texts = [self._tokenizer.token_text(token.token_id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return CompletionLogprobs(
            tokens=texts,
            token_logprobs=[finite(token.logprob) for token in tokens],
            top_logprobs=[self._top(token) for token in tokens],
            text_offset=offsets,
        )

    def _top(self, token: EmittedToken) -> dict[str, float]:
        """The likeliest, and always the chosen one."""
        top = {self._tokenizer.token_text(t.token_id): finite(t.logprob) for t in token.top_logprobs}
        top.setdefault(self._tokenizer.token_text(token.token_id), finite(token.logprob))
        return top


class ChatLogprobWriter:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def body(self, tokens: Sequence[EmittedToken]) -> ChatLogprobs:
        return ChatLogprobs(content=[self._token(token) for token in tokens])

    def _token(self, token: EmittedToken) -> ChatTokenLogprob:
        return ChatTokenLogprob(
            token=self._tokenizer.token_text(token.token_id),
            logprob=finite(token.logprob),
            bytes=list(self._tokenizer.token_bytes(token.token_id)),
            top_logprobs=[
                ChatTopLogprob(
                    token=self._tokenizer.token_text(top.token_id),
                    logprob=finite(top.logprob),
                    bytes=list(self._tokenizer.token_bytes(top.token_id)),
                )
                for top in token.top_logprobs
            ],
        )
