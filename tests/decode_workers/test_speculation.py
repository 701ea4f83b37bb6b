"""The serving drafter in the engine: never another token, logprob or ending than without it."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import DecodeConfig
from cluster.messages import EmittedToken, FinishReason, SamplingParams, TokensEmitted
from decode_workers.draft_tree import DraftTree
from decode_workers.sampler import gumbel
from decode_workers.sequence import Sequence
from decode_workers.step_batch import NO_PARENT, Float32Array, StepBatch
from decode_workers.verify import verify
from tests.decode_workers.draft_support import HeldPhrases, RandomRows, Serving, phrases_of, ref_of
from tests.decode_workers.support import (
    EOS,
    MAX_CONTEXT_TOKENS,
    TOKENIZER,
    EngineRig,
    HashExecutor,
    drawn,
    greedy,
    request_of,
)

SAMPLINGS = [
    greedy(40, ignore_eos=True, num_logprobs=2),
    drawn(40, ignore_eos=True, num_logprobs=2),
    drawn(40, ignore_eos=True, top_k=3, num_logprobs=0),
    greedy(17),
    drawn(2),
    drawn(1),
]


def chatty(seed: int = 0) -> HashExecutor:
    """An executor whose text is much the same again and again, and never quite foreseeable.

    Beside its hash, which any wrong KV changes, a row's logits favour what follows its token in a cycle.
    """
    executor = HashExecutor(num_blocks=400)
    following = np.random.default_rng(seed).permutation(256)

    def favour(batch: StepBatch, logits: Float32Array) -> None:
        rows = np.flatnonzero(
            batch.needs_logits | (batch.needs_best if batch.needs_best is not None else False)
        )
        for place, row in enumerate(rows):
            logits[place, following[int(batch.token_ids[row]) % 8] % 8] += 13.0

    executor.spoil = favour
    return executor


def asked(count: int, seed: int) -> dict[str, tuple[list[int], SamplingParams]]:
    rng = random.Random(seed)
    return {
        f"r{i}": ([rng.randrange(8) for _ in range(rng.randrange(1, 40))], rng.choice(SAMPLINGS))
        for i in range(count)
    }


def emitted(rig: EngineRig, request_id: str) -> list[EmittedToken]:
    return [token for e in rig.of(request_id) if isinstance(e, TokensEmitted) for token in e.tokens]


def outcome(rig: EngineRig, request_id: str) -> tuple[object, ...]:
    end = rig.finished(request_id)
    return (
        emitted(rig, request_id),
        rig.text(request_id),
        end.reason,
        end.stop_match,
        end.usage.completion_tokens,
    )


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(4, 64))
def test_drafts_change_nothing_alone_or_in_company(seed: int, at_once: int, max_rows: int) -> None:
    requests = asked(5, seed)
    plain = EngineRig(chatty(seed))
    for request_id, (prompt, sampling) in requests.items():
        plain.submit(request_of(request_id, prompt, sampling))
        plain.run()
    dice = random.Random(seed)
    # Parts of what will be said, with other ends too; let go and opened again along the way.
    said = [[*prompt, *plain.tokens(request_id)] for request_id, (prompt, _) in requests.items()]
    parts = [text[at : at + dice.randint(2, 12)] for text in said for at in range(0, len(text), 5)]
    parts += [[*part[: len(part) // 2], dice.randrange(256)] for part in parts]
    phrases = HeldPhrases(lambda: dice.random() < 0.7, some=phrases_of(parts), other=phrases_of(parts[::2]))
    drafter = RandomRows(seed, phrases)
    config = DecodeConfig(max_rows_per_step=max_rows, max_running_sequences=at_once)
    rig = EngineRig(chatty(seed), config, drafter)
    for request_id, (prompt, sampling) in requests.items():
        name = dice.choice(("some", "other", "none such", None))
        rig.submit(
            request_of(
                request_id,
                prompt,
                sampling,
                campaign="c",
                speculate=request_id != "r3",
                phrases=None if name is None else ref_of(name),
            )
        )
    rig.run()
    for request_id in requests:
        assert outcome(rig, request_id) == outcome(plain, request_id), request_id
    assert rig.used_tokens == 0


def test_foreseeable_text_takes_fewer_steps_and_is_counted() -> None:
    drafter = Serving()
    rig = EngineRig(chatty(), drafter=drafter)
    plain = EngineRig(chatty())
    for one in (plain, rig):
        one.submit(request_of("a", [1, 2, 3], greedy(60, ignore_eos=True)))
        one.run()
    assert rig.tokens("a") == plain.tokens("a")
    assert len(rig.executor.batches) < len(plain.executor.batches) / 2
    sample_of = rig.engine.metrics.registry.get_sample_value
    trees = sample_of("headrace_spec_decode_num_drafts_total")
    assert trees
    assert sample_of("headrace_spec_decode_num_draft_tokens_total") == drafter.num_drafted
    accepted = sample_of("headrace_spec_decode_num_accepted_tokens_total")
    assert sample_of("headrace_spec_decode_acceptance_length_sum") == (accepted or 0) + trees
    assert (
        sum(batch.num_rows for batch in rig.executor.batches)
        == len(rig.executor.batches) + 2 + drafter.num_drafted
    )


def test_random_text_gets_no_rows() -> None:
    drafter = Serving(table=None)
    rig = EngineRig(HashExecutor(num_blocks=400), drafter=drafter)
    for i in range(10):
        rig.submit(request_of(f"r{i}", [i], drawn(40, ignore_eos=True, seed=i)))
        rig.run()
    assert drafter.num_drafted <= 20, "of 400 steps"


def test_a_campaigns_earlier_outputs_are_drafted_for_its_tenant_alone() -> None:
    drafter = Serving()
    rig = EngineRig(HashExecutor(num_blocks=400), drafter=drafter)
    prompt = list(range(20))

    def drafted(request_id: str, **changes: object) -> int:
        before = drafter.num_drafted
        rig.submit(request_of(request_id, prompt, greedy(30, ignore_eos=True), **changes))
        rig.run()
        return drafter.num_drafted - before

    assert drafted("first", tenant="t", campaign="c") <= 3
    steps = len(rig.executor.batches)
    assert drafted("again", tenant="t", campaign="c") >= 20
    assert len(rig.executor.batches) - steps < 12
    assert drafted("unasked", tenant="t", campaign="c", speculate=False) == 0
    assert drafted("elsewhere", tenant="t", campaign="d") <= 3
    assert drafted("stranger", tenant="u", campaign="c") <= 3


def test_phrases_that_a_request_names_are_drafted_for_it() -> None:
    plain = EngineRig()
    plain.submit(request_of("a", [5, 6], greedy(30, ignore_eos=True)))
    plain.run()
    phrases = HeldPhrases(said=phrases_of([plain.tokens("a")]), unsaid=phrases_of([[1, 2, 3]]))

    def num_steps(**changes: object) -> int:
        rig = EngineRig(drafter=Serving(phrases))
        rig.submit(request_of("a", [5, 6], greedy(30, ignore_eos=True), **changes))
        rig.run()
        assert rig.tokens("a") == plain.tokens("a")
        return len(rig.executor.batches)

    assert num_steps(phrases=ref_of("said")) < 10
    assert num_steps(phrases=ref_of("said"), speculate=False) == 30
    for others in (ref_of("unsaid"), ref_of("not open"), None):
        assert num_steps(phrases=others) > 25


def test_phrases_that_come_late_are_drafted_from_then_on() -> None:
    plain = EngineRig()
    plain.submit(request_of("a", [5, 6], greedy(60, ignore_eos=True)))
    plain.run()
    rig = EngineRig()
    phrases = HeldPhrases(lambda: len(rig.executor.batches) >= 25, said=phrases_of([plain.tokens("a")[20:]]))
    rig = EngineRig(drafter=Serving(phrases))
    rig.submit(request_of("a", [5, 6], greedy(60, ignore_eos=True), phrases=ref_of("said")))
    rig.run()
    assert rig.tokens("a") == plain.tokens("a")
    assert 25 < len(rig.executor.batches) < 40


def test_a_prompts_end_may_begin_a_phrase() -> None:
    plain = EngineRig()
    plain.submit(request_of("a", [5, 6, 7], greedy(12, ignore_eos=True)))
    plain.run()
    phrases = HeldPhrases(said=phrases_of([[5, 6, 7, *plain.tokens("a")]]))
    rig = EngineRig(drafter=Serving(phrases))
    rig.submit(request_of("a", [5, 6, 7], greedy(12, ignore_eos=True), phrases=ref_of("said")))
    rig.run()
    assert rig.tokens("a") == plain.tokens("a")
    assert len(rig.executor.batches) < 4


def test_phrases_are_wanted_for_requests_that_are_drafted_for() -> None:
    phrases = HeldPhrases()
    drafter = Serving(phrases)
    drafter.expect(request_of("a", [1], tenant="t", phrases=ref_of("one")))
    drafter.expect(request_of("b", [1], tenant="t", phrases=ref_of("two"), speculate=False))
    drafter.expect(request_of("c", [1], tenant="t"))
    assert phrases.wanted == [("one", "t")]
    Serving().expect(request_of("d", [1], phrases=ref_of("one")))


@pytest.mark.parametrize(
    ("sampling", "reason", "text"),
    [
        (greedy(40, stop=("lo w",)), FinishReason.STOP, "hel"),
        (
            greedy(40, stop_token_ids=(TOKENIZER.encode("w", allow_special=False)[0],)),
            FinishReason.STOP,
            "hello ",
        ),
        (greedy(13), FinishReason.LENGTH, "hello world, "),
        (greedy(40), FinishReason.STOP, "hello world, hello world"),
    ],
)
def test_an_end_inside_an_accepted_path_is_kept(
    sampling: SamplingParams, reason: FinishReason, text: str
) -> None:
    said = TOKENIZER.encode("hello world, hello world", allow_special=False)

    def rig_of(drafter: Serving | None) -> EngineRig:
        executor = HashExecutor(num_blocks=400)

        def force(batch: StepBatch, logits: Float32Array) -> None:
            needs = batch.needs_best if batch.needs_best is not None else batch.needs_logits
            for place, position in enumerate(batch.positions[needs].tolist()):
                logits[place] = 0
                logits[place, said[position] if position < len(said) else EOS] = 100.0

        executor.spoil = force
        return EngineRig(executor, drafter=drafter)

    phrases = HeldPhrases(said=phrases_of([[*said, EOS, EOS]], end_token=EOS + 1))
    plain, rig = rig_of(None), rig_of(Serving(phrases))
    for one in (plain, rig):
        one.submit(request_of("a", [1], sampling, phrases=ref_of("said")))
        one.run()
    assert outcome(rig, "a") == outcome(plain, "a")
    assert (rig.reason("a"), rig.text("a")) == (reason, text)
    assert len(rig.executor.batches) < len(plain.executor.batches)
    tree_rows = max(batch.num_rows for batch in rig.executor.batches)
    assert tree_rows <= MAX_CONTEXT_TOKENS


def test_a_replay_goes_on_with_drafts() -> None:
    whole = EngineRig(chatty())
    whole.submit(request_of("a", [1, 2], greedy(40, ignore_eos=True)))
    whole.run()
    tokens = whole.tokens("a")
    rig = EngineRig(chatty(), drafter=Serving())
    rig.submit(request_of("a", [1, 2], greedy(40, ignore_eos=True), emitted_token_ids=tuple(tokens[:15])))
    rig.run()
    assert rig.tokens("a") == tokens[15:]


def test_the_same_requests_get_the_same_drafts() -> None:
    def rows() -> list[list[int]]:
        rig = EngineRig(chatty(), DecodeConfig(max_running_sequences=3), Serving())
        for request_id, (prompt, sampling) in asked(8, 3).items():
            rig.submit(request_of(request_id, prompt, sampling, campaign="c"))
        rig.run()
        return [batch.token_ids.tolist() for batch in rig.executor.batches]

    assert rows() == rows()


def test_acceptance_has_the_distribution_of_plain_sampling() -> None:
    """Chi-square over what a step with a tree emits first, and second where it accepted, in 10^5 draws.

    The tree holds the second likeliest token and one below it, so that following, leaving and ending a path
    all count. A draw's noise is the sampler's own, of as many tokens of one wide vocabulary.
    """
    num_draws = 100_000
    logits = np.array([[1.0, 0.6, 0.1, -0.5, -2.0], [0.2, 1.1, -0.3, 0.4, 0.0]], dtype=np.float32)
    tree = DraftTree(token_ids=(1, 3), parents=(NO_PARENT, 0))
    noise = [gumbel(7, index, np.arange(5 * num_draws)).reshape(-1, 5) for index in range(2)]
    drawn_tokens = [(row / 0.9 + own).argmax(axis=1).tolist() for row, own in zip(logits, noise, strict=True)]
    counts: Counter[tuple[int, ...]] = Counter()
    for tokens in zip(*drawn_tokens, strict=True):
        accepted = verify(tree, lambda node, own=tokens: own[min(node + 1, 1)])
        counts[accepted.token_ids[:2]] += 1
    first, second = (np.exp(row / 0.9) / np.exp(row / 0.9).sum() for row in logits.astype(np.float64))
    num_seen = counts.total()
    chi_square = 0.0
    for token in range(5):
        if token == 1:
            cells = [(counts[1, after], first[1] * second[after]) for after in range(5)]
        else:
            cells = [(counts[(token,)], first[token])]
        chi_square += sum((seen - num_seen * p) ** 2 / (num_seen * p) for seen, p in cells)
    assert chi_square < 26.1, "8 degrees of freedom: one in a thousand by chance"


def test_a_sequences_drafts_end_with_it() -> None:
    rig = EngineRig(chatty(), drafter=Serving())
    rig.submit(request_of("a", [1, 2], greedy(5, ignore_eos=True)))
    rig.step()
    sequence = next(iter(rig.engine.roster.running.values()))
    assert isinstance(sequence, Sequence)
    assert sequence.drafts is not None
    rig.engine.roster.cancel(sequence.request.request_id)
    rig.run()
    assert rig.reason("a") is FinishReason.CANCELLED
