"""Several steps without the host: what comes out of the engine is what single steps give."""

import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import DecodeConfig
from cluster.ids import HandoffId, RequestId
from cluster.messages import (
    DecodeEvent,
    EmittedToken,
    FailureCode,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    SequenceFailed,
    SequenceFinished,
    StepCost,
    TokensEmitted,
)
from cluster.transfer import KvChunk
from decode_workers.draft_tree import NO_DRAFT
from decode_workers.verdicts import Verdict, judge_accepted
from megakernel.multi_step import MAX_STOP_TOKENS, StepTokens, without_top
from tests.decode_workers.draft_support import EqualShares
from tests.decode_workers.multi_step_support import MultiHashExecutor, asked_steps, without_stamps
from tests.decode_workers.support import (
    EngineRig,
    HashExecutor,
    drawn,
    expected_tokens,
    greedy,
    request_of,
    wire_kv,
)
from tests.decode_workers.test_scheduler import sequence_of

ENDLESS = greedy(40, ignore_eos=True)
A = RequestId("a")
EIGHT = DecodeConfig(max_steps_per_launch=8)


def rig_of(executor: HashExecutor | None = None, config: DecodeConfig = EIGHT) -> EngineRig:
    return EngineRig(executor or MultiHashExecutor(), config)


def tokens_a_call(rig: EngineRig, num_calls: int) -> list[int]:
    """How many tokens each call of `step` tells of."""
    return [
        sum(len(event.tokens) for event in rig.step() if isinstance(event, TokensEmitted))
        for _ in range(num_calls)
    ]


@pytest.mark.parametrize("num_ahead", [0, 1, 3, 64])
@pytest.mark.parametrize(
    "sampling", [greedy(12, ignore_eos=True), greedy(5), greedy(20, num_logprobs=0), greedy(1)]
)
def test_tokens_are_those_of_single_steps(num_ahead: int, sampling: SamplingParams) -> None:
    prompts = {f"r{i}": list(range(i, i + 1 + 5 * i)) for i in range(4)}
    streams = []
    for executor in (MultiHashExecutor(100, num_ahead=lambda: num_ahead), HashExecutor(100)):
        rig = rig_of(executor)
        for request_id, prompt in prompts.items():
            rig.submit(request_of(request_id, prompt, sampling))
        rig.run()
        for request_id, prompt in prompts.items():
            assert rig.tokens(request_id) == expected_tokens(prompt, sampling)
        assert rig.used_tokens == 0
        streams.append([without_stamps(event) for event in rig.events])
        if isinstance(executor, MultiHashExecutor):
            assert bool(executor.asked) == (sampling.max_tokens > 2)
    assert streams[0] == streams[1]


def test_each_call_tells_of_one_step_and_counts_it() -> None:
    rig = rig_of(MultiHashExecutor(num_ahead=lambda: 5))
    rig.submit(request_of("a", [1], ENDLESS))
    assert tokens_a_call(rig, 40) == [1] * 40
    assert asked_steps(rig.executor) == [8] * 5
    metrics = rig.engine.metrics.registry
    assert metrics.get_sample_value("headrace_decode_steps_total") == 40
    assert metrics.get_sample_value("headrace_decode_rows_total") == 40
    assert metrics.get_sample_value("headrace_decode_step_seconds_count") == 40


def test_a_prompt_runs_in_plain_steps_first() -> None:
    rig = rig_of(config=DecodeConfig(max_rows_per_step=4, max_steps_per_launch=8))
    rig.submit(request_of("a", range(10), greedy(9, ignore_eos=True)))
    rig.run()
    assert [batch.num_rows for batch in rig.executor.batches] == [4, 4, 2] + [1] * 8
    assert asked_steps(rig.executor) == [8]


@pytest.mark.parametrize(
    ("change", "runs"),
    [
        ({}, True),
        ({"sampling": drawn(20, ignore_eos=True)}, False),
        ({"sampling": greedy(20, num_logprobs=1)}, False),
        ({"sampling": greedy(20, num_logprobs=0)}, True),
        ({"sampling": greedy(20, stop_token_ids=tuple(range(MAX_STOP_TOKENS + 1)))}, False),
    ],
)
def test_one_sequence_that_needs_the_host_is_enough(change: dict[str, object], runs: bool) -> None:
    rig = rig_of()
    rig.submit(request_of("a", [1], ENDLESS), request_of("b", [2], **change))  # type: ignore[arg-type]
    rig.step()
    assert bool(rig.executor.asked) is runs


@pytest.mark.parametrize("limits", [(1, 64), (8, 1)])
def test_config_and_executor_can_turn_it_off(limits: tuple[int, int]) -> None:
    executor = MultiHashExecutor(max_steps_per_launch=limits[1])
    rig = rig_of(executor, DecodeConfig(max_steps_per_launch=limits[0]))
    rig.submit(request_of("a", [1], ENDLESS))
    rig.run()
    assert executor.asked == []


def test_a_drafter_keeps_the_host() -> None:
    rig = EngineRig(MultiHashExecutor(), EIGHT, drafter=EqualShares(lambda _sequence, _most: NO_DRAFT))
    rig.submit(request_of("a", [1], ENDLESS))
    rig.run()
    assert rig.executor.asked == []


def test_who_arrives_ends_the_run_after_the_steps_begun() -> None:
    rig = rig_of(MultiHashExecutor(num_ahead=lambda: 2))
    rig.submit(request_of("a", [1], ENDLESS))
    rig.step()
    rig.submit(request_of("b", [2], greedy(4, ignore_eos=True)))
    assert tokens_a_call(rig, 4) == [1, 1, 2, 2], "two steps had begun"
    rig.run()
    assert rig.tokens("a") == expected_tokens([1], ENDLESS)
    assert rig.tokens("b") == expected_tokens([2], greedy(4, ignore_eos=True))


def test_a_call_that_waits_ends_the_run_or_keeps_it_from_beginning() -> None:
    rig = rig_of()
    rig.submit(request_of("a", [1], ENDLESS))
    rig.inbox.post(lambda: None)
    rig.engine.step()
    assert rig.executor.asked == []
    rig.inbox.drain()
    rig.engine.step()
    run = rig.executor.run_under_way
    rig.inbox.post(lambda: None)
    rig.engine.step()
    assert run is not None
    assert run.has_stopped


def test_a_run_is_short_beside_a_hand_off_and_ends_when_it_comes() -> None:
    rig = rig_of()
    prompt = list(range(9))
    rig.submit(request_of("a", [1], ENDLESS), request_of("b", prompt, handoff_id=HandoffId("kv")))
    rig.step()
    assert asked_steps(rig.executor) == [2]
    sink = rig.handoffs.sinks[HandoffId("kv")]
    sink.write(KvChunk(layer=0, first_token=0, num_tokens=8, data=memoryview(wire_kv(prompt[:8], 0))))
    sink.commit(8)
    rig.step()
    assert rig.tokens("b") == expected_tokens(prompt, greedy())[:1], (
        "not before the run's end, and then at once"
    )
    rig.run()
    assert rig.tokens("b") == expected_tokens(prompt, greedy(ignore_eos=True))


@pytest.mark.parametrize("num_ahead", [0, 4])
def test_blocks_of_who_leaves_a_run_are_kept_until_its_end(num_ahead: int) -> None:
    rig = rig_of(MultiHashExecutor(num_ahead=lambda: num_ahead))
    rig.submit(request_of("a", [1], ENDLESS), request_of("b", [2], ENDLESS))
    rig.step()
    used = rig.used_tokens
    rig.engine.roster.cancel(A)
    assert (rig.used_tokens, rig.engine.metrics.running._value.get()) == (used, 2)
    rig.step()
    assert rig.reason("a") is FinishReason.CANCELLED
    assert len(rig.tokens("a")) == 1, "what the device emits after it left is dropped"
    rig.submit(request_of("c", [1, *rig.tokens("a")], ENDLESS))  # builds on what it left in the cache
    rig.run()
    assert rig.tokens("b") == expected_tokens([2], ENDLESS)
    assert rig.tokens("c") == expected_tokens([1, *rig.tokens("a")], ENDLESS)
    assert rig.used_tokens == 0


def test_a_stop_string_ends_a_sequence_that_the_device_goes_on_with() -> None:
    whole = rig_of()
    whole.submit(request_of("a", [7], ENDLESS))
    whole.run()
    stop = next(symbol for symbol in whole.text("a")[3:] if symbol.isascii())
    rig = rig_of(MultiHashExecutor(num_ahead=lambda: 8))
    rig.submit(request_of("a", [7], greedy(40, ignore_eos=True, stop=(stop,))))
    rig.run()
    assert rig.finished("a").stop_match == stop
    assert rig.finished("a").usage.completion_tokens == len(rig.tokens("a")) < 40
    assert rig.used_tokens == 0


def test_a_deadline_ends_a_sequence_in_the_midst_of_a_run() -> None:
    rig = rig_of(MultiHashExecutor(num_ahead=lambda: 8))
    deadline = rig.clock.now_ns + 1000
    rig.submit(request_of("a", [1], ENDLESS, deadline_unix_ns=deadline), request_of("b", [2], ENDLESS))
    rig.step()
    rig.step()
    rig.clock.now_ns = deadline
    rig.step()
    assert (rig.reason("a"), len(rig.tokens("a"))) == (FinishReason.DEADLINE, 2)
    assert len(rig.tokens("b")) == 3
    rig.run()
    assert rig.used_tokens == 0


def test_no_run_is_planned_past_a_deadline() -> None:
    rig = rig_of()
    rig.executor.measure = lambda: (StepCost(rows=1, ms=2.0), StepCost(rows=64, ms=2.0))  # type: ignore[method-assign]
    assert [cost.ms for cost in rig.engine.measure()] == [2.0, 2.0]
    rig.submit(request_of("a", [1], ENDLESS, deadline_unix_ns=rig.clock.now_ns + 11_000_000))
    rig.step()
    assert asked_steps(rig.executor) == [5]


def fail_at(executor: HashExecutor, number: int) -> None:
    def fail(_batch: object, _logits: object) -> None:
        if len(executor.batches) == number:
            raise MemoryError("no room")

    executor.spoil = fail


@pytest.mark.parametrize("num_ahead", [0, 2, 8])
def test_a_step_that_fails_in_a_run_fails_its_sequences_for_a_retry(num_ahead: int) -> None:
    rig = rig_of(MultiHashExecutor(num_ahead=lambda: num_ahead))
    fail_at(rig.executor, 4)
    rig.submit(request_of("a", [1], ENDLESS), request_of("b", [2], greedy(2, ignore_eos=True)))
    rig.run()
    assert (rig.failed("a").code, rig.failed("a").is_retryable) == (FailureCode.INTERNAL, True)
    assert "no room" in rig.failed("a").message
    assert rig.tokens("a") == expected_tokens([1], ENDLESS)[:3]
    assert rig.reason("b") is FinishReason.LENGTH
    assert rig.engine.num_failed_steps == 1
    assert rig.used_tokens == 0
    rig.submit(request_of("c", [3], ENDLESS))
    rig.run()
    assert rig.tokens("c") == expected_tokens([3], ENDLESS)
    assert rig.engine.num_failed_steps == 0


def test_a_run_that_is_refused_fails_its_sequences() -> None:
    rig = rig_of()

    def refuse(_run: object) -> None:
        raise ValueError("not like this")

    rig.executor.start = refuse  # type: ignore[method-assign, assignment]
    rig.submit(request_of("a", [1], ENDLESS))
    rig.run()
    assert "not like this" in rig.failed("a").message
    assert rig.used_tokens == 0


@pytest.mark.parametrize("sampling", [ENDLESS, greedy(40, num_logprobs=0)])
def test_bad_logits_fail_their_sequence_alone(sampling: SamplingParams) -> None:
    executor = MultiHashExecutor(num_ahead=lambda: 3)

    def spoil(_batch: object, logits: np.ndarray) -> None:
        if len(executor.batches) == 3:
            logits[0, 17] = np.nan

    executor.spoil = spoil
    rig = rig_of(executor)
    rig.submit(request_of("bad", [1], sampling), request_of("good", [2], ENDLESS))
    rig.run()
    assert (rig.failed("bad").code, rig.failed("bad").is_retryable) == (FailureCode.INTERNAL, False)
    assert "token 17" in rig.failed("bad").message
    assert rig.tokens("bad") == expected_tokens([1], ENDLESS)[:2]
    assert rig.tokens("good") == expected_tokens([2], ENDLESS)
    assert rig.used_tokens == 0


@pytest.mark.parametrize("fails", [False, True])
def test_who_closes_the_engine_waits_for_the_steps_begun(fails: bool) -> None:
    rig = rig_of(MultiHashExecutor(num_ahead=lambda: 3))
    rig.submit(request_of("a", [1], ENDLESS))
    rig.step()
    rig.engine.roster.fail_all(FailureCode.UNAVAILABLE, "the worker is stopping")
    assert rig.used_tokens > 0
    if fails:
        fail_at(rig.executor, len(rig.executor.batches) + 1)
    assert rig.engine.has_work
    rig.engine.end_run()
    assert rig.executor.run_under_way is None
    assert rig.used_tokens == 0
    rig.engine.kv.check()
    rig.engine.end_run()


# Many requests at once: single steps, and runs, from one script of what happens when.

Script = list[Callable[[EngineRig], object]]


class Requests:
    """Random ones, prefixes shared, all ways to end; most of them greedy."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._stems = [[rng.randrange(256) for _ in range(rng.randrange(1, 14))] for _ in range(2)]
        self._num_made = 0

    def make(self, now_ns: int) -> GenerateRequest:
        rng = self._rng
        sampling = greedy(
            rng.randrange(1, 26),
            stop_token_ids=tuple(rng.sample(range(256), rng.choice([0, 0, 12]))),
            stop=tuple(chr(97 + at) for at in range(rng.choice([0, 0, 26]))),
            num_logprobs=rng.choice([None] * 8 + [0] * 4 + [2]),
            temperature=rng.choice([0.0] * 15 + [0.8]),
        )
        self._num_made += 1
        prompt = rng.choice(self._stems)[: rng.randrange(1, 20)] + [
            rng.randrange(256) for _ in range(rng.randrange(3))
        ]
        return request_of(
            f"r{self._num_made}",
            prompt,
            sampling,
            deadline_unix_ns=rng.choice([None, None, None, now_ns + rng.randrange(1, 30) * 1_000_000]),
            handoff_id=HandoffId(f"kv{self._num_made}") if rng.random() < 0.15 and len(prompt) > 1 else None,
        )


def script_of(rng: random.Random) -> Script:
    """A call of `step` is a millisecond of the clock's."""
    requests, script, now_ns = Requests(rng), [], EngineRig().clock.now_ns
    made: list[GenerateRequest] = []
    for _ in range(rng.randrange(5, 60)):
        roll = rng.random()
        if roll < 0.25:
            made.append(requests.make(now_ns))
            script.append(partial(_submit, made[-1]))
        elif roll < 0.32 and made:
            script.append(partial(_cancel, rng.choice(made)))
        elif roll < 0.42 and made:
            script.append(partial(_bring_kv, rng.choice(made), rng.random() < 0.7))
        else:
            now_ns += 1_000_000
            script.append(_step)
    return script


def _step(rig: EngineRig) -> None:
    rig.clock.now_ns += 1_000_000
    rig.step()


def _submit(request: GenerateRequest, rig: EngineRig) -> None:
    rig.inbox.post(partial(rig.engine.roster.submit, request))


def _cancel(request: GenerateRequest, rig: EngineRig) -> None:
    rig.inbox.post(partial(rig.engine.roster.cancel, request.request_id))


def _bring_kv(request: GenerateRequest, comes: bool, rig: EngineRig) -> None:
    """Or say that it will not."""
    handoff_id = request.handoff_id
    sink = rig.handoffs.sinks.pop(handoff_id, None) if handoff_id is not None else None
    if sink is None or handoff_id in rig.handoffs.cancelled:
        return
    if not comes:
        rig.inbox.post(partial(rig.engine.roster.prefill_locally, request.request_id))
        return
    first, count = rig.handoffs.expected[handoff_id]
    end = first + count
    data = memoryview(wire_kv(request.prompt_token_ids[:end], first))
    sink.write(KvChunk(layer=0, first_token=first, num_tokens=count, data=data))
    sink.commit(count)


def play(script: Script, executor: HashExecutor, config: DecodeConfig) -> EngineRig:
    rig = EngineRig(executor, config)
    for act in script:
        act(rig)
    for _ in range(2000):
        _step(rig)
        for request_id in list(rig.engine.roster._awaiting):
            rig.inbox.post(partial(rig.engine.roster.prefill_locally, request_id))
        if not rig.engine.has_work and not len(rig.inbox):
            break
    assert rig.engine.roster.num_live == 0
    assert rig.used_tokens == 0
    return rig


def streams(rig: EngineRig) -> dict[str, list[DecodeEvent]]:
    """By request."""
    found: dict[str, list[DecodeEvent]] = {}
    for event in rig.events:
        found.setdefault(event.request_id, []).append(without_stamps(event))  # type: ignore[arg-type]
    return found


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 10**9), num_blocks=st.sampled_from([14, 30, 200]), most=st.sampled_from([2, 8]))
def test_runs_that_stop_at_once_give_the_same_events_call_by_call(
    seed: int, num_blocks: int, most: int
) -> None:
    script = script_of(random.Random(seed))
    plain = play(script, HashExecutor(num_blocks), DecodeConfig(max_running_sequences=5))
    config = DecodeConfig(max_running_sequences=5, max_steps_per_launch=most)
    multi = play(script, MultiHashExecutor(num_blocks), config)
    assert list(map(without_stamps, multi.events)) == list(map(without_stamps, plain.events))
    assert len(multi.executor.batches) == len(plain.executor.batches)


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 10**9), num_blocks=st.sampled_from([14, 30, 200]), fails=st.booleans())
def test_runs_ahead_of_the_host_give_each_request_its_tokens(seed: int, num_blocks: int, fails: bool) -> None:
    rng = random.Random(seed)
    script = script_of(rng)
    plain = streams(play(script, HashExecutor(num_blocks), DecodeConfig(max_running_sequences=5)))
    executor = MultiHashExecutor(num_blocks, num_ahead=lambda: rng.randrange(6))
    if fails:
        fail_at(executor, rng.randrange(1, 40))
    multi = play(script, executor, DecodeConfig(max_running_sequences=5))
    assert set(streams(multi)) == set(plain)
    for request_id, expected in plain.items():
        found = streams(multi)[request_id]
        if isinstance(found[-1], SequenceFailed):
            assert fails
            continue
        assert isinstance(found[-1], SequenceFinished)
        assert isinstance(expected[-1], SequenceFinished)
        tokens, whole = emitted(found), emitted(expected)
        shorter = min(len(tokens), len(whole))
        assert tokens[:shorter] == whole[:shorter]
        assert found[-1].usage.completion_tokens == len(tokens)
        cut = {FinishReason.CANCELLED, FinishReason.DEADLINE}
        if not cut & {found[-1].reason, expected[-1].reason}:
            assert (found[-1].reason, found[-1].text, found[-1].stop_match) == (
                expected[-1].reason,
                expected[-1].text,
                expected[-1].stop_match,
            )
            assert len(tokens) == len(whole)
            assert text_of(found) == text_of(expected)


def emitted(events: list[DecodeEvent]) -> list[object]:
    return [token for event in events if isinstance(event, TokensEmitted) for token in event.tokens]


def text_of(events: list[DecodeEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TokensEmitted))


def test_several_tokens_a_step_are_judged_together() -> None:
    """As drafts on a device have it."""
    told = StepTokens(
        counts=np.array([2, 0, 1, 2], dtype=np.int32),
        reductions=without_top(
            np.array([5, 6, 0, 0, 0, 0, 7, 0, 0, 8, 9, 0], dtype=np.int32),
            np.array([1, 1, 9, 9, 9, 9, 3, 9, 9, 1, np.inf, 9], dtype=np.float32),
            np.array([2, 2, 9, 9, 9, 9, 5, 9, 9, 2, 2, 9], dtype=np.float32),
        ),
    )
    sequences = [sequence_of(i, 3, committed=2) for i in range(4)]
    sequences[2] = sequence_of(2, 3, committed=2, sampling=greedy(num_logprobs=0))
    first, second, third, fourth = judge_accepted(sequences, told)
    assert first == Verdict(tokens=(EmittedToken(token_id=5), EmittedToken(token_id=6)))
    assert second is None
    assert third == Verdict(tokens=(EmittedToken(token_id=7, logprob=-2.0),))
    assert fourth is not None
    assert (fourth.tokens, fourth.fault) == ((), "logit of token 9 is inf: no token can be chosen")
