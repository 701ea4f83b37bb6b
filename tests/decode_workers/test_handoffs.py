"""Hand-offs into an engine, the test playing the receiver and the prefill worker."""

import pytest

from cluster.config import DecodeConfig
from cluster.ids import HandoffId, RequestId
from cluster.messages import FinishReason, GenerateRequest, HandoffFailed, Reserved
from cluster.timeline import Stage
from cluster.transfer import HandoffError, KvChunk
from tests.decode_workers.support import EngineRig, drawn, expected_tokens, greedy, request_of, wire_kv

PROMPT = list(range(20, 34))
SAMPLING = greedy(6, ignore_eos=True)
A, KV_1, KV_2 = RequestId("a"), HandoffId("kv-1"), HandoffId("kv-2")


def handed_off(prompt: list[int] = PROMPT, **changes: object) -> GenerateRequest:
    return request_of("a", prompt, SAMPLING, handoff_id=KV_1, **changes)


def push(rig: EngineRig, handoff_id: HandoffId, prompt: list[int] = PROMPT) -> None:
    """Write the KV asked for, in two chunks."""
    first, count = rig.handoffs.expected[handoff_id]
    sink = rig.handoffs.sinks[handoff_id]
    half = first + count // 2
    for start, end in ((first, half), (half, first + count)):
        if end > start:
            data = memoryview(wire_kv(prompt[:end], start))
            sink.write(KvChunk(layer=0, first_token=start, num_tokens=end - start, data=data))


def num_receiving(rig: EngineRig) -> float | None:
    return rig.engine.metrics.registry.get_sample_value("headrace_handoffs_receiving")


def test_tokens_follow_a_committed_handoff() -> None:
    rig = EngineRig()
    rig.submit(handed_off())
    assert rig.step() == [Reserved(request_id=A, handoff_id=KV_1, first_token=0)]
    assert rig.handoffs.expected[KV_1] == (0, 13)
    push(rig, KV_1)
    rig.run()
    assert rig.tokens("a") == []
    assert num_receiving(rig) == 1
    rig.handoffs.sinks[KV_1].commit(13)
    rig.run()
    assert num_receiving(rig) == 0
    assert rig.tokens("a") == expected_tokens(PROMPT, SAMPLING)
    assert sum(batch.num_rows for batch in rig.executor.batches) == 6, "the prompt's last token and five more"
    stamps = rig.finished("a").stamps_ns
    assert stamps[Stage.RESERVED.value] <= stamps[Stage.HANDOFF_COMMITTED.value]
    registry = rig.engine.metrics.registry
    assert registry.get_sample_value("headrace_handoffs_received_total", {"outcome": "committed"}) == 1
    assert registry.get_sample_value("headrace_handoff_received_bytes_total") == 13 * 8


def test_only_what_is_not_cached_is_asked_for() -> None:
    rig = EngineRig()
    rig.submit(request_of("first", PROMPT[:10], greedy(1)))
    rig.run()
    rig.submit(handed_off())
    assert Reserved(request_id=A, handoff_id=KV_1, first_token=10) in rig.step()
    assert rig.handoffs.expected[KV_1] == (10, 3)
    push(rig, KV_1)
    rig.handoffs.sinks[KV_1].commit(3)
    rig.run()
    assert rig.tokens("a") == expected_tokens(PROMPT, SAMPLING)
    assert rig.finished("a").usage.cached_tokens == 10


def test_a_wholly_cached_prompt_waits_for_nothing() -> None:
    rig = EngineRig()
    rig.submit(request_of("first", PROMPT, SAMPLING))
    rig.run()
    rig.submit(handed_off())
    rig.run()
    assert Reserved(request_id=A, handoff_id=KV_1, first_token=13) in rig.of("a")
    assert rig.tokens("a") == expected_tokens(PROMPT, SAMPLING)
    assert KV_1 not in rig.handoffs.expected


def test_a_short_handoff_is_completed_here() -> None:
    rig = EngineRig()
    rig.submit(handed_off())
    rig.step()
    push(rig, KV_1)
    rig.handoffs.sinks[KV_1].commit(9)
    rig.run()
    assert rig.tokens("a") == expected_tokens(PROMPT, SAMPLING)
    assert sum(batch.num_rows for batch in rig.executor.batches) == 4 + 6


def test_replay_after_a_failover_with_a_handoff() -> None:
    truth = expected_tokens(PROMPT, SAMPLING)
    rig = EngineRig()
    rig.submit(handed_off(emitted_token_ids=tuple(truth[:4])))
    rig.step()
    push(rig, KV_1)
    rig.handoffs.sinks[KV_1].commit(13)
    rig.run()
    assert rig.tokens("a") == truth[4:]


def test_a_failed_handoff_keeps_its_reservation_for_a_retry() -> None:
    rig = EngineRig()
    rig.submit(handed_off())
    rig.step()
    used = rig.used_tokens
    assert num_receiving(rig) == 1
    rig.executor.kv[:] = 0xBAD  # whatever the broken hand-off left
    rig.handoffs.sinks[KV_1].abort(HandoffError("checksum_mismatch", "expected 1, got 2"))
    rig.step()
    failure = rig.events[-1]
    assert isinstance(failure, HandoffFailed)
    assert failure.handoff_id == KV_1
    assert "checksum_mismatch" in failure.message
    assert rig.used_tokens == used
    assert num_receiving(rig) == 0
    rig.engine.roster.retry_handoff(A, KV_2)
    assert rig.step() == [Reserved(request_id=A, handoff_id=KV_2, first_token=0)]
    push(rig, KV_2)
    rig.handoffs.sinks[KV_2].commit(13)
    rig.run()
    assert rig.tokens("a") == expected_tokens(PROMPT, SAMPLING)


@pytest.mark.parametrize("has_failed", [False, True])
def test_prefill_locally_replaces_a_handoff(has_failed: bool) -> None:
    rig = EngineRig()
    rig.submit(handed_off())
    rig.step()
    if has_failed:
        rig.handoffs.sinks[KV_1].abort(HandoffError("timeout", "silence"))
        rig.step()
    rig.engine.roster.prefill_locally(A)
    rig.run()
    assert rig.handoffs.cancelled == ([] if has_failed else [KV_1])
    assert rig.tokens("a") == expected_tokens(PROMPT, SAMPLING)


def test_patience_ends_in_local_prefill() -> None:
    rig = EngineRig(config=DecodeConfig(handoff_timeout_s=1.0))
    rig.submit(handed_off())
    rig.step()
    rig.clock.now_ns += 1_999_999_999
    rig.step()
    assert not rig.executor.batches
    rig.clock.now_ns += 1
    rig.run()
    assert rig.handoffs.cancelled == [KV_1]
    assert rig.tokens("a") == expected_tokens(PROMPT, SAMPLING)


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_an_end_while_waiting_withdraws_the_handoff_and_frees(how: str) -> None:
    rig = EngineRig()
    deadline = rig.clock.now_ns + 500
    rig.submit(handed_off(deadline_unix_ns=deadline))
    rig.step()
    assert num_receiving(rig) == 1
    if how == "cancel":
        rig.engine.roster.cancel(A)
    rig.clock.now_ns = deadline
    rig.run()
    assert rig.reason("a") is (FinishReason.CANCELLED if how == "cancel" else FinishReason.DEADLINE)
    assert rig.handoffs.cancelled == [KV_1]
    assert rig.used_tokens == 0
    assert num_receiving(rig) == 0


def test_a_commit_that_crosses_a_cancel_is_ignored() -> None:
    rig = EngineRig()
    rig.submit(handed_off())
    rig.step()
    rig.handoffs.sinks[KV_1].commit(13)
    rig.engine.roster.cancel(A)
    rig.run()
    rig.submit(request_of("b", PROMPT, drawn(6, ignore_eos=True)))
    rig.run()
    assert rig.tokens("b") == expected_tokens(PROMPT, drawn(6, ignore_eos=True))
    assert rig.reason("a") is FinishReason.CANCELLED


def test_commands_that_come_too_late_change_nothing() -> None:
    rig = EngineRig()
    rig.submit(handed_off())
    rig.step()
    rig.engine.roster.prefill_locally(A)
    rig.engine.roster.retry_handoff(A, KV_2)
    rig.engine.roster.prefill_locally(A)
    rig.run()
    rig.engine.roster.retry_handoff(A, KV_2)
    rig.engine.roster.cancel(A)
    assert rig.step() == []
    assert rig.tokens("a") == expected_tokens(PROMPT, SAMPLING)


def test_an_id_in_use_is_reported_as_a_failed_handoff() -> None:
    rig = EngineRig()
    rig.submit(handed_off(), request_of("b", [9, 8, 7], SAMPLING, handoff_id=KV_1))
    rig.step()
    failure = rig.of("b")[-1]
    assert isinstance(failure, HandoffFailed)
    rig.engine.roster.prefill_locally(RequestId("b"))
    rig.run()
    assert rig.tokens("b") == expected_tokens([9, 8, 7], SAMPLING)
