"""Runs by plain steps: whatever is drafted, and wherever they stop, the tokens of one row a step."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.draft_automaton import ROOT, DraftAutomaton, build_automaton
from megakernel.multi_step import (
    MAX_DRAFT_TOKENS,
    MAX_STEPS,
    MAX_STOP_TOKENS,
    HostRun,
    MultiStep,
    without_top,
)
from megakernel.runtime import Runtime
from megakernel.step import StepError, StepOutput
from tests.megakernel.compilers import needs_compiler
from tests.megakernel.native_steps import BLOCK, Group, chain, int32, rows_of
from tests.megakernel.programs import Recipe, build_program
from tests.tiny_model import tiny_weights

VOCAB = 160
RECIPE = Recipe(workers=2, stats_span=64, k_tiles={"down": 3, "o": 2}, tile_columns={"gate_up": 64})
NUM_TOKENS = 24
"""Of each prompt's continuation."""
PROMPTS = tuple(tuple(np.random.default_rng(i).integers(0, VOCAB, 1 + 8 * i).tolist()) for i in range(4))
TABLES = tuple([3 * i + 2, 3 * i, 3 * i + 1] for i in range(4))


class Truth(msgspec.Struct, frozen=True):
    """What plain steps give after a prompt."""

    tokens: list[int]
    log_sums: list[float]


class Model:
    """A runtime whose pool has every prompt's KV but the last token's, and the truth."""

    def __init__(self, folder) -> None:
        weights = tiny_weights(1, "qwen3")
        programs = [
            build_program(weights.shape, msgspec.structs.replace(RECIPE, bucket=bucket))
            for bucket in (1, 8, 64)
        ]
        self.runtime = Runtime.of(programs, weights, 12, BLOCK, library_folder=folder, extra_flags=("-O1",))
        self.truths = [
            self._decode(list(prompt), table) for prompt, table in zip(PROMPTS, TABLES, strict=True)
        ]

    def _decode(self, prompt, table) -> Truth:
        if prompt[:-1]:
            group = Group(tokens=prompt[:-1], parents=chain(len(prompt) - 1), context=0, table=table)
            self.runtime.step(rows_of(group))
        tokens, log_sums, pending = [], [], prompt[-1]
        for index in range(NUM_TOKENS):
            group = Group(tokens=[pending], parents=chain(1), context=len(prompt) - 1 + index, table=table)
            asked = {"needs_best": np.array([True]), "needs_log_sums": True}
            found = self.runtime.step(msgspec.structs.replace(rows_of(group, needs_logits=[False]), **asked))
            pending = int(found.reductions.token_ids[0])
            tokens.append(pending)
            log_sums.append(float(found.reductions.log_sums[0]))
        return Truth(tokens, log_sums)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = Model(tmp_path_factory.mktemp("libraries"))
    yield made
    made.runtime.close()


def run_of(
    which: list[int],
    *,
    num_steps: int = MAX_STEPS,
    limits: list[int] | None = None,
    stops: list[list[int]] | None = None,
    drafts: DraftAutomaton | None = None,
    max_draft_tokens: int = 0,
    **changes: object,
) -> MultiStep:
    """Of some of the prompts."""
    stops = stops or [[] for _ in which]
    fields = {
        "num_steps": num_steps,
        "token_ids": int32([PROMPTS[i][-1] for i in which]),
        "context_lengths": int32([len(PROMPTS[i]) - 1 for i in which]),
        "block_tables": int32([TABLES[i] for i in which]),
        "max_new_tokens": int32(limits or [NUM_TOKENS] * len(which)),
        "stop_starts": int32(np.cumsum([0, *map(len, stops)])),
        "stop_token_ids": int32([token for own in stops for token in own]),
        "needs_log_sums": True,
        "drafts": drafts,
        "max_draft_tokens": max_draft_tokens,
        "draft_states": None
        if drafts is None
        else int32([drafts.follow_all(ROOT, PROMPTS[i]) for i in which]),
    }
    return MultiStep(**(fields | changes))


def told(run: MultiStep, started, stop_after: int | None = None) -> tuple[list[Truth], list[list[int]]]:
    """All that a run emitted, by sequence, and how many of each in each step; stopped after some."""
    found = [Truth([], []) for _ in range(run.num_sequences)]
    counts: list[list[int]] = []
    while True:
        if stop_after == len(counts):
            started.stop()
        step = started.next()
        if step is None:
            return found, counts
        counts.append(step.counts.tolist())
        for index, count in enumerate(counts[-1]):
            own = slice(index * run.rows_a_sequence, index * run.rows_a_sequence + count)
            found[index].tokens.extend(step.reductions.token_ids[own].tolist())
            found[index].log_sums.extend(step.reductions.log_sums[own].tolist())


def ended(truth: Truth, limit: int, stops: list[int]) -> int:
    """After how many tokens a sequence has."""
    return next((at + 1 for at, token in enumerate(truth.tokens[:limit]) if token in stops), limit)


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_tokens_and_log_sums_are_those_of_plain_steps(model, data):
    which = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
    truths = [model.truths[i] for i in which]
    limits = [data.draw(st.integers(1, NUM_TOKENS)) for _ in which]
    stops = [
        data.draw(st.lists(st.one_of(st.sampled_from(truth.tokens), st.integers(0, VOCAB - 1)), max_size=2))
        for truth in truths
    ]
    most = data.draw(st.integers(0, MAX_DRAFT_TOKENS))
    known = [[*PROMPTS[i], *model.truths[i].tokens] for i in which]
    starts = [data.draw(st.integers(0, len(text))) for text in known]
    noise = data.draw(st.lists(st.sampled_from(known[0]), max_size=20))
    drafts = build_automaton([*(text[at:] for text, at in zip(known, starts, strict=True)), noise], 4)
    run = run_of(
        which,
        num_steps=data.draw(st.integers(1, 30)),
        limits=limits,
        stops=stops,
        drafts=drafts if most else None,
        max_draft_tokens=most,
    )
    stop_after = data.draw(st.one_of(st.none(), st.integers(0, 10)))
    found, counts = told(run, model.runtime.start(run), stop_after)
    for index, truth in enumerate(truths):
        num_tokens = len(found[index].tokens)
        assert found[index].tokens == truth.tokens[:num_tokens]
        assert found[index].log_sums == truth.log_sums[:num_tokens]
        end = ended(truth, limits[index], stops[index])
        was_cut = len(counts) in (run.num_steps, stop_after)
        assert num_tokens == end or (was_cut and num_tokens < end)
        own = [step[index] for step in counts]
        assert all(count <= run.rows_a_sequence for count in own)
        assert 0 not in own[: own.index(0) if 0 in own else None], "a step without a token before the end"
        assert not any(own[own.index(0) :] if 0 in own else ())


@needs_compiler
def test_right_drafts_save_steps(model):
    texts = [[*prompt, *truth.tokens] for prompt, truth in zip(PROMPTS, model.truths, strict=True)]
    run = run_of([1, 2, 3], drafts=build_automaton(texts[1:], 16), max_draft_tokens=3)
    found, counts = told(run, model.runtime.start(run))
    assert [truth.tokens for truth in found] == [truth.tokens for truth in model.truths[1:]]
    assert len(counts) < NUM_TOKENS / 2


@needs_compiler
def test_a_stopped_run_goes_no_further(model):
    run = model.runtime.start(run_of([0, 1]))
    assert run.next() is not None
    run.stop()
    assert run.next() is None
    assert run.next() is None


@needs_compiler
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "1 to 64 steps, not 0"),
        ({"num_steps": MAX_STEPS + 1}, "not 65"),
        ({"max_draft_tokens": MAX_DRAFT_TOKENS + 1}, "at most 7 tokens, not 8"),
        ({"max_draft_tokens": 2}, "go together"),
        ({"draft_states": int32([0, 0])}, "go together"),
        ({"token_ids": int32([1, VOCAB])}, r"sequence 1: token 160 is not in \[0, 160\)"),
        ({"stop_starts": int32([0, 1, 1]), "stop_token_ids": int32([-1])}, "stop token -1"),
        ({"stop_starts": int32([0, 2, 1]), "stop_token_ids": int32([1])}, "do not cover the 1 stop tokens"),
        (
            {"stop_starts": int32([0, 0, 65]), "stop_token_ids": int32(range(MAX_STOP_TOKENS + 1))},
            "sequence 1 has 65 stop tokens: at most 64",
        ),
        ({"max_new_tokens": int32([1, 0])}, "sequence 1: max_new_tokens 0"),
        ({"max_new_tokens": int32([500, 513])}, "sequence 1: max_new_tokens 513"),
        ({"context_lengths": int32([0, 511]), "max_new_tokens": int32([1, 2])}, "last position 512"),
        ({"max_new_tokens": int32([1])}, "1 max_new_tokens for 2 sequences"),
        ({"token_ids": int32([])}, "0 sequences of 1 rows are 0: a step has 1 to 64"),
    ],
)
def test_what_must_not_run_is_refused(model, changes, message):
    with pytest.raises(StepError, match=message):
        model.runtime.start(run_of([0, 1], **changes))


@needs_compiler
def test_states_of_other_drafts_are_refused(model):
    drafts = build_automaton([[1, 2, 3]])
    with pytest.raises(StepError, match="sequence 0: draft state"):
        model.runtime.start(
            run_of([0], drafts=drafts, max_draft_tokens=1, draft_states=int32([drafts.num_states]))
        )


def steps_of(maxima: list[list[float]]):
    """A step that answers 5 to every row, with these logits, and fails where there are none."""
    left = iter(maxima)

    def step(rows):
        values = next(left, None)
        if values is None:
            raise StepError("broken")
        count = len(rows.token_ids)
        found = without_top(int32([5] * count), np.array(values, np.float32), np.zeros(count, np.float32))
        empty = np.empty(0, dtype=np.float32)
        return StepOutput(logits=empty, reductions=found, allowed_logits=empty)

    return step


def test_logits_that_are_not_finite_end_their_sequence_with_their_answer():
    run = run_of([0, 1], num_steps=3)
    found, counts = told(run, HostRun(steps_of([[1.0, 1.0], [np.inf, 1.0], [1.0]]), run, BLOCK))
    assert counts == [[1, 1], [1, 1], [0, 1]]
    assert [truth.tokens for truth in found] == [[5, 5], [5, 5, 5]]


def test_after_a_failure_there_is_nothing_more():
    run = HostRun(steps_of([[1.0]]), run_of([0]), BLOCK)
    assert run.next() is not None
    with pytest.raises(StepError, match="broken"):
        run.next()
    assert run.next() is None
