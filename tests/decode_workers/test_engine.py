"""The engine over an executor whose tokens depend on every slot of KV being right."""

import random
from collections.abc import Sequence as SequenceOf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import DecodeConfig
from cluster.messages import (
    FailureCode,
    FinishReason,
    SamplingParams,
    SequenceFailed,
    TokensEmitted,
)
from cluster.timeline import Stage
from decode_workers.draft_tree import DraftTree
from decode_workers.engine import Drafter
from decode_workers.sequence import Sequence
from decode_workers.step_batch import NO_PARENT
from tests.decode_workers.draft_support import EqualShares
from tests.decode_workers.support import (
    EOS,
    MAX_CONTEXT_TOKENS,
    TOKENIZER,
    EngineRig,
    HashExecutor,
    drawn,
    expected_tokens,
    greedy,
    request_of,
)

SAMPLINGS = [
    greedy(12, ignore_eos=True),
    drawn(12, ignore_eos=True),
    drawn(12, ignore_eos=True, top_k=5, top_p=0.9, min_p=0.02),
    greedy(5),
    drawn(1),
]


def prompts(count: int, seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randrange(1, 30))] for _ in range(count)]


def scripted_drafter(seed: int, accuracy: float, sampling: SamplingParams) -> Drafter:
    """Trees with the right tokens in them as often as `accuracy` says, anywhere among wrong ones."""
    rng = random.Random(seed)

    def draft(sequence: Sequence, max_nodes: int) -> DraftTree:
        truth = expected_tokens(sequence.tokens[: sequence.num_prompt], sampling)[sequence.next_index :]
        token_ids: list[int] = []
        parents: list[int] = []
        right: list[int] = [NO_PARENT]
        for _ in range(rng.randint(0, min(max_nodes, 9))):
            if rng.random() < accuracy and len(right) <= len(truth):
                parents.append(right[-1])
                token_ids.append(truth[len(right) - 1])
                right.append(len(token_ids) - 1)
            else:
                parents.append(rng.choice([NO_PARENT, *range(len(token_ids))]))
                token_ids.append(rng.randrange(256))
        return DraftTree(token_ids=tuple(token_ids), parents=tuple(parents))

    return EqualShares(draft)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_alone_gives_the_rules_tokens(sampling: SamplingParams) -> None:
    for prompt in prompts(6):
        rig = EngineRig()
        rig.submit(request_of("a", prompt, sampling))
        rig.run()
        assert rig.tokens("a") == expected_tokens(prompt, sampling)
        assert rig.finished("a").usage.prompt_tokens == len(prompt)
        assert rig.finished("a").usage.completion_tokens == len(rig.tokens("a"))
        assert rig.used_tokens == 0


@pytest.mark.parametrize("max_rows", [1, 3, 64])
@pytest.mark.parametrize("num_blocks", [24, 200])
def test_company_changes_nothing(max_rows: int, num_blocks: int) -> None:
    # max_rows below the number of sequences: they take turns; few blocks: some wait for others to end.
    rig = EngineRig(
        HashExecutor(num_blocks=num_blocks), DecodeConfig(max_rows_per_step=max_rows, max_running_sequences=7)
    )
    asked = {f"r{i}": (prompt, SAMPLINGS[i % 5]) for i, prompt in enumerate(prompts(12))}
    for request_id, (prompt, sampling) in asked.items():
        rig.submit(request_of(request_id, prompt, sampling))
        rig.step()
    rig.run()
    for request_id, (prompt, sampling) in asked.items():
        assert rig.tokens(request_id) == expected_tokens(prompt, sampling), request_id
    assert all(batch.num_rows <= max_rows for batch in rig.executor.batches)
    assert rig.used_tokens == 0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), accuracy=st.sampled_from([0.0, 0.5, 0.9, 1.0]), which=st.integers(0, 4))
def test_drafts_change_the_number_of_steps_but_no_token(seed: int, accuracy: float, which: int) -> None:
    sampling = SAMPLINGS[which]
    rig = EngineRig(HashExecutor(num_blocks=60), drafter=scripted_drafter(seed, accuracy, sampling))
    asked = {f"r{i}": prompt for i, prompt in enumerate(prompts(3, seed))}
    for request_id, prompt in asked.items():
        rig.submit(request_of(request_id, prompt, sampling))
    rig.run()
    for request_id, prompt in asked.items():
        assert rig.tokens(request_id) == expected_tokens(prompt, sampling)
    # What the drafted run left in the prefix cache must be sound too: the next turn builds on it.
    follow_up = [*asked["r0"], *rig.tokens("r0")][: MAX_CONTEXT_TOKENS - 20]
    rig.submit(request_of("next", follow_up, sampling))
    rig.run()
    assert rig.tokens("next") == expected_tokens(follow_up, sampling)


def test_right_drafts_save_steps() -> None:
    sampling = greedy(12, ignore_eos=True)

    def chain(sequence: Sequence, max_nodes: int) -> DraftTree:
        truth = expected_tokens([1, 2, 3], sampling)[sequence.next_index :][:3]
        return DraftTree(token_ids=tuple(truth), parents=tuple(range(-1, len(truth) - 1)))

    rig = EngineRig(drafter=EqualShares(chain))
    rig.submit(request_of("a", [1, 2, 3], sampling))
    rig.run()
    assert rig.tokens("a") == expected_tokens([1, 2, 3], sampling)
    assert len(rig.executor.batches) == 12 / 4  # three drafted and the bonus token a step, the first included


def test_a_session_reuses_full_blocks_and_the_tail() -> None:
    rig = EngineRig()
    prompt = list(range(10))
    rig.submit(request_of("a", prompt, greedy(6, ignore_eos=True)))
    rig.run()
    follow_up = [*prompt, *rig.tokens("a"), 77, 78]
    rig.submit(request_of("b", follow_up, greedy(6, ignore_eos=True)))
    rows_before = sum(batch.num_rows for batch in rig.executor.batches)
    rig.run()
    assert rig.tokens("b") == expected_tokens(follow_up, greedy(6, ignore_eos=True))
    # 10 + 6 tokens, the last of which never ran: 15 cached, in 3 blocks and a tail of 3.
    assert rig.finished("b").usage.cached_tokens == 15
    assert sum(batch.num_rows for batch in rig.executor.batches) - rows_before == 3 + 5


def test_copying_a_tail_leaves_the_original_intact() -> None:
    rig = EngineRig()
    prompt = list(range(10))
    rig.submit(request_of("a", prompt, greedy(1)))
    rig.run()
    for request_id, last in (("b", 99), ("c", 98)):
        rig.submit(request_of(request_id, [*prompt[:9], last], greedy(3, ignore_eos=True)))
        rig.run()
        assert rig.tokens(request_id) == expected_tokens([*prompt[:9], last], greedy(3, ignore_eos=True))
        assert rig.finished(request_id).usage.cached_tokens == 9


def test_a_running_prompt_is_shared_before_its_sequence_ends() -> None:
    rig = EngineRig()
    prompt = list(range(9))
    rig.submit(request_of("a", prompt, greedy(30, ignore_eos=True)))
    rig.step()
    rig.submit(request_of("b", prompt, greedy(4, ignore_eos=True)))
    rig.run()
    assert rig.finished("b").usage.cached_tokens == 8
    assert rig.tokens("b") == expected_tokens(prompt, greedy(4, ignore_eos=True))


def test_tenants_share_nothing() -> None:
    rig = EngineRig()
    rig.submit(request_of("a", range(12), tenant="one"))
    rig.run()
    rig.submit(request_of("b", range(12), tenant="two"))
    rig.run()
    assert rig.finished("b").usage.cached_tokens == 0


@pytest.mark.parametrize("sampling", SAMPLINGS[:3])
def test_replay_goes_on_where_the_lost_worker_was(sampling: SamplingParams) -> None:
    prompt = [5, 6, 7, 8, 9]
    whole = EngineRig()
    whole.submit(request_of("a", prompt, sampling))
    whole.run()
    tokens = whole.tokens("a")
    for cut in range(1, len(tokens) + 1):
        rig = EngineRig()
        rig.submit(request_of("a", prompt, sampling, emitted_token_ids=tuple(tokens[:cut])))
        rig.run()
        assert rig.tokens("a") == tokens[cut:]
        assert rig.text("a") == whole.text("a")[len(_text_after(whole, cut)) :]
        assert rig.finished("a").usage == whole.finished("a").usage


def _text_after(rig: EngineRig, num_tokens: int) -> str:
    """Text that the first tokens had released, event by event."""
    events = [event for event in rig.of("a") if isinstance(event, TokensEmitted)]
    return "".join(event.text for event in events if event.first_index < num_tokens)


def test_replay_past_the_end_is_refused() -> None:
    rig = EngineRig()
    rig.submit(request_of("a", [1, 2], greedy(5), emitted_token_ids=(EOS, 3)))
    rig.run()
    assert rig.failed("a").code is FailureCode.INVALID


def test_eos_ends_and_ignore_eos_does_not() -> None:
    def only_eos(_batch: object, logits: np.ndarray) -> None:
        logits[:, EOS] = 100.0

    executor = HashExecutor()
    executor.spoil = only_eos
    rig = EngineRig(executor)
    rig.submit(request_of("a", [1], greedy(5)), request_of("b", [2], greedy(5, ignore_eos=True)))
    rig.run()
    assert (rig.reason("a"), rig.tokens("a"), rig.text("a")) == (FinishReason.STOP, [EOS], "")
    assert (rig.reason("b"), rig.tokens("b")) == (FinishReason.LENGTH, [EOS] * 5)


def _say(text: str) -> HashExecutor:
    """An executor whose completions are `text`, for a prompt of one token."""
    tokens = TOKENIZER.encode(text, allow_special=False)
    executor = HashExecutor()

    def force(batch: object, logits: np.ndarray) -> None:
        position = int(batch.positions[-1])  # type: ignore[attr-defined]
        logits[:] = 0
        logits[:, tokens[position] if position < len(tokens) else EOS] = 100.0

    executor.spoil = force
    return executor


def test_stop_strings_across_tokens_never_show() -> None:
    rig = EngineRig(_say("hello STOP world"))
    rig.submit(request_of("a", [1], greedy(30, stop=("STOP", "wor"))))
    rig.run()
    assert (rig.text("a"), rig.reason("a")) == ("hello ", FinishReason.STOP)
    assert rig.finished("a").stop_match == "STOP"
    assert rig.finished("a").usage.completion_tokens == len("hello STOP")


def test_a_false_start_of_a_stop_string_is_released() -> None:
    rig = EngineRig(_say("a STO STOX STO"))
    rig.submit(request_of("a", [1], greedy(30, stop=("STOP",))))
    rig.run()
    assert (rig.text("a"), rig.finished("a").stop_match) == ("a STO STOX STO", None)
    assert rig.finished("a").text == "STO"


def test_stop_tokens_have_no_text() -> None:
    rig = EngineRig(_say("abc"))
    stop_token = TOKENIZER.encode("c", allow_special=False)[0]
    rig.submit(request_of("a", [1], greedy(30, stop_token_ids=(stop_token,))))
    rig.run()
    assert (rig.text("a"), rig.reason("a")) == ("ab", FinishReason.STOP)
    assert rig.finished("a").usage.completion_tokens == 3


def test_a_cut_character_is_flushed() -> None:
    rig = EngineRig(_say("xé"))
    rig.submit(request_of("a", [1], greedy(2)))
    rig.run()
    assert (rig.text("a"), rig.finished("a").text, rig.reason("a")) == ("x�", "�", FinishReason.LENGTH)


def test_logprobs_come_with_every_token() -> None:
    rig = EngineRig()
    rig.submit(
        request_of("a", [1, 2], drawn(6, ignore_eos=True, num_logprobs=3)),
        request_of("b", [1, 2], greedy(6, ignore_eos=True, num_logprobs=0)),
        request_of("c", [1, 2], greedy(6, ignore_eos=True)),
    )
    rig.run()
    emitted = {
        key: [t for e in rig.of(key) if isinstance(e, TokensEmitted) for t in e.tokens] for key in "abc"
    }
    for token in emitted["a"]:
        assert token.logprob is not None
        assert len(token.top_logprobs) == 3
        assert [t.logprob for t in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )
    assert all(token.logprob is not None and not token.top_logprobs for token in emitted["b"])
    assert all(token.logprob is None for token in emitted["c"])
    assert [t.token_id for t in emitted["b"]] == [t.token_id for t in emitted["c"]]


def test_the_context_ends_a_completion() -> None:
    rig = EngineRig()
    prompt = list(range(MAX_CONTEXT_TOKENS - 3))
    rig.submit(request_of("a", prompt, greedy(50, ignore_eos=True)))
    rig.run()
    assert (len(rig.tokens("a")), rig.reason("a")) == (3, FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompt": []}, "prompt_token_ids"),
        ({"prompt": [0] * MAX_CONTEXT_TOKENS}, str(MAX_CONTEXT_TOKENS - 1)),
        ({"prompt": [257]}, "[0, 257)"),
        ({"sampling": greedy(0)}, "max_tokens"),
        ({"sampling": drawn(temperature=float("nan"))}, "temperature"),
        ({"sampling": drawn(temperature=-1.0)}, "temperature"),
        ({"sampling": drawn(top_p=0.0)}, "top_p"),
        ({"sampling": drawn(min_p=1.5)}, "min_p"),
        ({"sampling": drawn(num_logprobs=100_000)}, "num_logprobs"),
        ({"sampling": greedy(stop=("",))}, "stop"),
        ({"sampling": greedy(stop=("x",) * 1000)}, "stop"),
        ({"sampling": greedy(stop_token_ids=(9999,))}, "stop_token_ids"),
        ({"sampling": greedy(2), "emitted_token_ids": (1, 2, 3)}, "emitted"),
    ],
)
def test_impossible_requests_are_refused_by_name(changes: dict[str, object], named: str) -> None:
    rig = EngineRig()
    prompt = changes.pop("prompt", [1, 2])
    assert isinstance(prompt, list)
    rig.submit(request_of("a", prompt, **changes))  # type: ignore[arg-type]
    rig.run()
    assert rig.failed("a").code is FailureCode.INVALID
    assert not rig.failed("a").is_retryable
    assert named in rig.failed("a").message
    assert rig.used_tokens == 0


def test_what_can_never_fit_the_pool_names_its_size() -> None:
    rig = EngineRig(HashExecutor(num_blocks=5))
    rig.submit(
        request_of("a", range(10), greedy(50)), request_of("b", range(10), greedy(11, ignore_eos=True))
    )
    rig.run()
    assert rig.failed("a").code is FailureCode.INVALID
    assert "pool has 20" in rig.failed("a").message
    assert len(rig.tokens("b")) == 11


def test_the_whole_pool_is_usable_with_a_cached_tail() -> None:
    # Copying a cached tail must not hold the very block that is missing.
    rig = EngineRig(HashExecutor(num_blocks=5))
    for request_id in ("a", "b", "c"):
        rig.submit(request_of(request_id, range(10), greedy(11, ignore_eos=True)))
        rig.run()
        assert rig.tokens(request_id) == expected_tokens(range(10), greedy(11, ignore_eos=True))


def test_the_queue_is_bounded() -> None:
    rig = EngineRig(HashExecutor(num_blocks=8), DecodeConfig(max_queued_requests=2))
    for i in range(4):
        rig.submit(request_of(f"r{i}", [i], greedy(30)))
    rig.step()
    refused = [event for event in rig.events if isinstance(event, SequenceFailed)]
    assert [(event.code, event.is_retryable) for event in refused] == [(FailureCode.OVERLOADED, True)] * 2


def test_a_repeated_id_is_refused_and_the_first_goes_on() -> None:
    rig = EngineRig()
    rig.submit(request_of("a", [1], greedy(5, ignore_eos=True)), request_of("a", [2]))
    assert isinstance(rig.step()[0], SequenceFailed)
    rig.events.clear()
    rig.run()
    assert rig.reason("a") is FinishReason.LENGTH


def test_earliest_deadline_is_admitted_first() -> None:
    rig = EngineRig(config=DecodeConfig(max_running_sequences=1))
    now = rig.clock.now_ns
    rig.submit(request_of("running", [1], greedy(3, ignore_eos=True)))
    rig.step()
    rig.submit(
        request_of("none", [2]),
        request_of("late", [3], deadline_unix_ns=now + 9_000_000_000),
        request_of("soon", [4], deadline_unix_ns=now + 1_000_000_000),
        request_of("patient", [5], deadline_unix_ns=now + 60_000_000_000),
    )
    rig.run()
    ends = [event.request_id for event in rig.events if event.__class__.__name__ == "SequenceFinished"]
    assert ends == ["running", "soon", "late", "none", "patient"]


def test_a_deadline_ends_with_what_there_is() -> None:
    rig = EngineRig(config=DecodeConfig(max_running_sequences=1))
    deadline = rig.clock.now_ns + 1000
    rig.submit(
        request_of("a", [1], greedy(50, ignore_eos=True), deadline_unix_ns=deadline),
        request_of("queued", [2], deadline_unix_ns=deadline),
    )
    rig.step()
    rig.step()
    rig.clock.now_ns = deadline
    rig.step()
    assert (rig.reason("a"), len(rig.tokens("a"))) == (FinishReason.DEADLINE, 2)
    assert rig.finished("a").usage.completion_tokens == 2
    assert (rig.reason("queued"), rig.tokens("queued")) == (FinishReason.DEADLINE, [])
    assert rig.used_tokens == 0


@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_cancel_frees_blocks_and_keeps_the_cache(steps_before: int) -> None:
    rig = EngineRig(config=DecodeConfig(max_rows_per_step=4))
    rig.submit(request_of("a", range(10), greedy(20, ignore_eos=True)))
    for _ in range(steps_before):
        rig.step()
    rig.engine.roster.cancel(rig.of("a")[0].request_id if rig.of("a") else request_of("a", [1]).request_id)
    rig.run()
    assert rig.reason("a") is FinishReason.CANCELLED
    assert rig.used_tokens == 0
    used = rig.engine.metrics.registry.get_sample_value("headrace_kv_cache_used_tokens")
    assert used == 0
    rig.submit(request_of("b", range(10), greedy(4, ignore_eos=True)))
    rig.run()
    assert rig.tokens("b") == expected_tokens(range(10), greedy(4, ignore_eos=True))
    assert rig.finished("b").usage.cached_tokens == min(9, 4 * steps_before)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("sampling", [greedy(), drawn(), greedy(num_logprobs=2)])
def test_bad_logits_fail_their_sequence_alone(value: float, sampling: SamplingParams) -> None:
    executor = HashExecutor()

    def spoil(batch: object, logits: np.ndarray) -> None:
        if len(logits) == 2:
            logits[0, 17] = value

    executor.spoil = spoil
    rig = EngineRig(executor)
    rig.submit(request_of("bad", [1], sampling), request_of("good", [2], greedy(6, ignore_eos=True)))
    rig.run()
    assert rig.failed("bad").code is FailureCode.INTERNAL
    assert "token 17" in rig.failed("bad").message
    assert rig.tokens("good") == expected_tokens([2], greedy(6, ignore_eos=True))
    assert rig.used_tokens == 0


def test_a_failed_step_fails_its_sequences_for_a_retry_and_the_engine_goes_on() -> None:
    executor = HashExecutor()
    rig = EngineRig(executor)

    def fail(_batch: object, _logits: object) -> None:
        raise MemoryError("no room")

    executor.spoil = fail
    rig.submit(request_of("a", range(9)))
    rig.run()
    assert (rig.failed("a").code, rig.failed("a").is_retryable) == (FailureCode.INTERNAL, True)
    assert "no room" in rig.failed("a").message
    assert rig.engine.num_failed_steps == 1
    executor.spoil = None
    rig.submit(request_of("b", range(9), greedy(4, ignore_eos=True)))
    rig.run()
    assert rig.tokens("b") == expected_tokens(range(9), greedy(4, ignore_eos=True))
    assert rig.finished("b").usage.cached_tokens == 0
    assert rig.engine.num_failed_steps == 0


def test_the_timeline_is_in_order() -> None:
    rig = EngineRig()
    rig.submit(request_of("a", range(9)))
    rig.run()
    stamps = rig.finished("a").stamps_ns
    order: SequenceOf[Stage] = (
        Stage.DECODE_RECEIVED,
        Stage.RESERVED,
        Stage.FIRST_STEP_STARTED,
        Stage.FIRST_TOKEN,
        Stage.FINISHED,
    )
    values = [stamps[stage.value] for stage in order]
    assert values == sorted(values)


def test_status_counts_what_is_not_computed_yet() -> None:
    rig = EngineRig(config=DecodeConfig(max_rows_per_step=4, max_running_sequences=1))
    rig.submit(request_of("a", range(10)), request_of("b", range(7)))
    rig.step()
    status = rig.engine.roster.status(())
    assert (status.queued_requests, status.running_requests) == (1, 1)
    assert status.queued_tokens == 6 + 7
    assert status.total_kv_tokens == 32 * 4
    assert status.free_kv_tokens == status.total_kv_tokens - 20
