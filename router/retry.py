"""What to do when a worker fails a request: pure decisions."""

from collections.abc import Collection, Iterable

from cluster.ids import WorkerId
from cluster.messages import PROTOCOL_VERSION, FailureCode, SequenceFailed, WorkerRecord
from router.errors import RequestError, invalid, overloaded, unavailable

MAX_PLACEMENTS = 3
"""Decode workers that one sequence is tried on, the first included."""
MAX_PREFILL_TRIES = 2
"""Prefill workers that one attempt is tried on; then the decode worker computes the prompt itself."""


def should_place_again(failure: SequenceFailed, num_placements: int, remaining_s: float) -> bool:
    return failure.is_retryable and num_placements < MAX_PLACEMENTS and remaining_s > 0


def refuses_for_good(failure: SequenceFailed) -> bool:
    """Whether the worker itself said no. A broken stream does not: it may stand again soon."""
    return failure.code is not FailureCode.UNAVAILABLE


def as_request_error(failure: SequenceFailed) -> RequestError:
    match failure.code:
        case FailureCode.INVALID:
            return invalid(None, failure.message)
        case FailureCode.OVERLOADED:
            return overloaded(failure.message)
        case FailureCode.VERSION_SKEW:
            return unavailable(failure.message, code="version_skew")
        case FailureCode.UNAVAILABLE | FailureCode.INTERNAL:
            return unavailable(failure.message, code="worker_failed")


def another_prefill_worker(
    workers: Iterable[WorkerRecord],
    *,
    layout_fingerprint: str,
    num_tokens: int,
    tried: Collection[WorkerId],
) -> WorkerRecord | None:
    """The least loaded worker that could compute `num_tokens` for a decode worker of that layout."""
    able = [
        worker
        for worker in workers
        if worker.status.is_accepting
        and worker.protocol_version == PROTOCOL_VERSION
        and worker.layout_fingerprint == layout_fingerprint
        and worker.status.total_kv_tokens >= num_tokens
        and worker.address.worker_id not in tried
    ]
    return min(able, key=lambda w: (w.status.queued_tokens, w.address.worker_id), default=None)
