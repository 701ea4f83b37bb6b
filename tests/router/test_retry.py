import pytest

from cluster.ids import Epoch, RequestId, WorkerId
from cluster.messages import (
    PROTOCOL_VERSION,
    FailureCode,
    SequenceFailed,
    WorkerAddress,
    WorkerRecord,
    WorkerStatus,
)
from router.retry import another_prefill_worker, as_request_error, should_place_again


def failure(code=FailureCode.UNAVAILABLE, *, is_retryable=True):
    return SequenceFailed(request_id=RequestId("r"), code=code, message="m", is_retryable=is_retryable)


def prefill(worker_id, *, queued=0, layout="l", accepting=True, total=1000, protocol=PROTOCOL_VERSION):
    return WorkerRecord(
        address=WorkerAddress(worker_id=WorkerId(worker_id), epoch=Epoch(1), grpc_address="h:1", host_id="h"),
        role="prefill",
        model="m",
        protocol_version=protocol,
        layout_fingerprint=layout,
        block_size_tokens=16,
        status=WorkerStatus(queued_tokens=queued, total_kv_tokens=total, is_accepting=accepting),
    )


@pytest.mark.parametrize(
    ("sequence_failed", "num_placements", "remaining_s", "expected"),
    [
        (failure(), 1, 1.0, True),
        (failure(), 2, 1.0, True),
        (failure(), 3, 1.0, False),
        (failure(), 1, 0.0, False),
        (failure(is_retryable=False), 1, 1.0, False),
    ],
)
def test_bounded_by_tries_and_deadline(sequence_failed, num_placements, remaining_s, expected):
    assert should_place_again(sequence_failed, num_placements, remaining_s) is expected


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (FailureCode.INVALID, 400),
        (FailureCode.OVERLOADED, 429),
        (FailureCode.UNAVAILABLE, 503),
        (FailureCode.INTERNAL, 503),
        (FailureCode.VERSION_SKEW, 503),
    ],
)
def test_every_failure_is_an_error_a_user_can_act_on(code, status):
    error = as_request_error(failure(code))
    assert error.status == status
    assert (error.retry_after_s is not None) == (status in (429, 503))


def test_the_least_loaded_able_worker_is_next():
    workers = [
        prefill("busy", queued=50),
        prefill("tried"),
        prefill("other-layout", layout="x"),
        prefill("closed", accepting=False),
        prefill("small", total=10),
        prefill("skewed", protocol=PROTOCOL_VERSION + 1),
        prefill("idle", queued=1),
    ]

    def next_one(*tried):
        found = another_prefill_worker(workers, layout_fingerprint="l", num_tokens=100, tried=tried)
        return found and found.address.worker_id

    assert next_one("tried") == "idle"
    assert next_one("tried", "idle") == "busy"
    assert next_one("tried", "idle", "busy") is None
