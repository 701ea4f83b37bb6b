"""What a prefill request must be before it costs anything."""

import grpc

from cluster.messages import PrefillRequest, Record

MAX_ID_CHARS = 256
MAX_ADDRESS_CHARS = 512


class PrefillRefusedError(Exception):
    """A request that is not computed: the status and message its caller gets."""

    def __init__(self, status: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.status = status


class PrefillLimits(Record, frozen=True, kw_only=True):
    layout_fingerprint: str
    vocab_size: int
    max_context_tokens: int
    total_kv_tokens: int

    @property
    def max_prompt_tokens(self) -> int:
        return min(self.max_context_tokens, self.total_kv_tokens)


def check_request(request: PrefillRequest, limits: PrefillLimits, now_unix_ns: int) -> None:
    """Raises PrefillRefusedError naming the field and what would be right; handled by the servicer."""
    _check_text("request_id", request.request_id, MAX_ID_CHARS)
    _check_text("handoff_id", request.handoff_id, MAX_ID_CHARS)
    _check_text("target.grpc_address", request.target.grpc_address, MAX_ADDRESS_CHARS)
    _check_layout(request, limits)
    _check_tokens(request, limits)
    if request.deadline_unix_ns is not None and request.deadline_unix_ns <= now_unix_ns:
        raise PrefillRefusedError(grpc.StatusCode.DEADLINE_EXCEEDED, "deadline_unix_ns has passed")


def _check_text(field: str, value: str, max_chars: int) -> None:
    if not 1 <= len(value) <= max_chars:
        raise _invalid(f"{field} must have 1 to {max_chars} characters, has {len(value)}")


def _check_layout(request: PrefillRequest, limits: PrefillLimits) -> None:
    if request.layout_fingerprint != limits.layout_fingerprint:
        raise PrefillRefusedError(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"layout_fingerprint: asked for {request.layout_fingerprint!r}, "
            f"this worker computes {limits.layout_fingerprint!r}",
        )


def _check_tokens(request: PrefillRequest, limits: PrefillLimits) -> None:
    num_tokens = len(request.prompt_token_ids)
    if not 1 <= num_tokens <= limits.max_prompt_tokens:
        raise _invalid(f"prompt_token_ids must have 1 to {limits.max_prompt_tokens} tokens, has {num_tokens}")
    # The wire's type is unsigned.
    largest = max(request.prompt_token_ids)
    if largest >= limits.vocab_size:
        raise _invalid(f"prompt_token_ids must be below {limits.vocab_size}, one is {largest}")
    if request.first_token >= num_tokens:
        raise _invalid(f"first_token must be in [0, {num_tokens}), is {request.first_token}")


def _invalid(message: str) -> PrefillRefusedError:
    return PrefillRefusedError(grpc.StatusCode.INVALID_ARGUMENT, message)
