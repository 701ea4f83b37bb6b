"""One completion's text, and when it ends: everything decided token by token, in order."""

from cluster.messages import FinishReason, SamplingParams
from cluster.text import IncrementalDetokenizer, Tokenizer
from decode_workers.stop import StopMatcher


class Completion:
    """Turns tokens into released text, and says why to stop.

    A pure function of the tokens pushed: replaying them after a failover brings it to the same state.
    """

    __slots__ = (
        "_detokenizer",
        "_max_tokens",
        "_stops",
        "finish_reason",
        "num_tokens",
        "stop_match",
        "stop_token_ids",
    )

    def __init__(
        self, tokenizer: Tokenizer, sampling: SamplingParams, eos_token_ids: tuple[int, ...], max_tokens: int
    ) -> None:
        """`max_tokens`: the request's limit or the room left in the context, whichever is less."""
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stops = StopMatcher(sampling.stop) if sampling.stop else None
        eos = () if sampling.ignore_eos else eos_token_ids
        self.stop_token_ids = frozenset((*sampling.stop_token_ids, *eos))
        """The first of these ends it."""
        self._max_tokens = max_tokens
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.stop_match: str | None = None

    @property
    def num_left(self) -> int:
        """Tokens after which it has ended, if nothing ends it before."""
        return self._max_tokens - self.num_tokens

    def push(self, token_id: int) -> str:
        """The text that this token releases; sets `finish_reason` where it is the last.

        A stop token has no text; text that completes a stop string ends before it.
        """
        assert self.finish_reason is None, "a token after the end"
        self.num_tokens += 1
        if token_id in self.stop_token_ids:
            self.finish_reason = FinishReason.STOP
            return ""
        text = self._detokenizer.push(token_id)
        if self._stops is not None and text:
            text = self._release(self._stops, text)
        if self.finish_reason is None and self.num_tokens >= self._max_tokens:
            self.finish_reason = FinishReason.LENGTH
        return text

    def finish(self, reason: FinishReason) -> str:
        """Text held back until now. `finish_reason` may become STOP: a cut-off character may complete one."""
        self.finish_reason = reason
        if self.stop_match is not None:
            return ""
        text = self._detokenizer.flush()
        if self._stops is not None:
            text = self._release(self._stops, text) if text else ""
            text += self._stops.flush()
        return text

    def _release(self, stops: StopMatcher, text: str) -> str:
        output = stops.push(text)
        if output.match is not None:
            self.stop_match = output.match
            self.finish_reason = FinishReason.STOP
        return output.text
