"""Whether a request can be served here at all; decided before it is queued."""

import math

from cluster.messages import GenerateRequest, Record, SamplingParams

MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 4096
MAX_STOP_TOKENS = 1024
MAX_TOP_LOGPROBS = 128
MAX_CAMPAIGN_CHARACTERS = 128


class RequestLimits(Record, frozen=True, kw_only=True):
    vocab_size: int
    max_context_tokens: int
    kv_pool_tokens: int


def completion_limit(request: GenerateRequest, limits: RequestLimits) -> int:
    """Tokens this completion may have: what was asked for, or the room that the context leaves."""
    room = limits.max_context_tokens - len(request.prompt_token_ids)
    return min(request.sampling.max_tokens, room)


def kv_tokens_needed(request: GenerateRequest, limits: RequestLimits) -> int:
    """KV slots of the whole sequence; its last token is never run, so it needs none."""
    return len(request.prompt_token_ids) + completion_limit(request, limits) - 1


def find_fault(request: GenerateRequest, limits: RequestLimits) -> str | None:
    """What makes the request impossible, with the range that would do; None where nothing does."""
    num_prompt, num_emitted = len(request.prompt_token_ids), len(request.emitted_token_ids)
    if not request.request_id:
        return "request_id is empty"
    if len(request.campaign) > MAX_CAMPAIGN_CHARACTERS:
        return f"campaign of {len(request.campaign)} characters: at most {MAX_CAMPAIGN_CHARACTERS}"
    if num_prompt == 0:
        return "prompt_token_ids is empty: at least 1 token"
    if num_prompt >= limits.max_context_tokens:
        return f"prompt of {num_prompt} tokens: at most {limits.max_context_tokens - 1}"
    if not _all_in_range((*request.prompt_token_ids, *request.emitted_token_ids), limits.vocab_size):
        return f"token ids must be in [0, {limits.vocab_size})"
    if num_emitted > completion_limit(request, limits):
        return f"{num_emitted} emitted tokens: at most {completion_limit(request, limits)}"
    needed = kv_tokens_needed(request, limits)
    if needed > limits.kv_pool_tokens:
        return (
            f"prompt of {num_prompt} tokens and max_tokens {request.sampling.max_tokens} need {needed} KV "
            f"slots: the pool has {limits.kv_pool_tokens}"
        )
    return _sampling_fault(request.sampling, limits)


def _sampling_fault(sampling: SamplingParams, limits: RequestLimits) -> str | None:
    if sampling.max_tokens < 1:
        return f"max_tokens {sampling.max_tokens}: at least 1"
    if not 0 <= sampling.seed < 1 << 64:
        return f"seed {sampling.seed}: in [0, 2^64)"
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        return f"temperature {sampling.temperature}: finite and at least 0"
    if not 0 < sampling.top_p <= 1:
        return f"top_p {sampling.top_p}: in (0, 1]"
    if not 0 <= sampling.min_p <= 1:
        return f"min_p {sampling.min_p}: in [0, 1]"
    if sampling.top_k < 0:
        return f"top_k {sampling.top_k}: at least 0"
    if sampling.num_logprobs is not None and not 0 <= sampling.num_logprobs <= MAX_TOP_LOGPROBS:
        return f"num_logprobs {sampling.num_logprobs}: in [0, {MAX_TOP_LOGPROBS}]"
    if len(sampling.stop) > MAX_STOP_STRINGS:
        return f"{len(sampling.stop)} stop strings: at most {MAX_STOP_STRINGS}"
    if not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in sampling.stop):
        return f"a stop string must have 1 to {MAX_STOP_CHARACTERS} characters"
    if len(sampling.stop_token_ids) > MAX_STOP_TOKENS:
        return f"{len(sampling.stop_token_ids)} stop tokens: at most {MAX_STOP_TOKENS}"
    if not _all_in_range(sampling.stop_token_ids, limits.vocab_size):
        return f"stop_token_ids must be in [0, {limits.vocab_size})"
    return None


def _all_in_range(token_ids: tuple[int, ...], vocab_size: int) -> bool:
    return not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size)
