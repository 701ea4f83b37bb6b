"""Several steps in one launch, emulated, against one step a launch."""

import random

import msgspec
import pytest

from megakernel.build import INCLUDE_FOLDER
from megakernel.cuda_arguments import LAST_STEP
from megakernel.cuda_runtime import CudaRuntime
from megakernel.emulation import build_emulation
from megakernel.emulation_errors import EmulationError
from megakernel.step import StepError
from tests.hardware.multi_step import bits
from tests.megakernel.compilers import needs_compiler
from tests.megakernel.cuda_models import compiled_model, generated_of, programs_of
from tests.megakernel.fake_cuda import FakeDriver, emulated
from tests.megakernel.multi_steps import (
    Asked,
    all_steps,
    by_host,
    draw_asked,
    emitted,
    fill_kv,
    kv_of,
    mistaken,
    run_of,
    with_drafts,
)
from tests.megakernel.native_steps import BLOCK, int32
from tests.tiny_model import tiny_weights

NUM_BLOCKS = 12
BUCKETS = (1, 4, 8)
VOCAB = 170
SINGLE = Asked(pending=7, context=5, table=[4, 2], max_new_tokens=20)


@pytest.fixture(scope="module")
def model():
    """Compiled, and emulated."""
    weights = tiny_weights(1, "qwen3", hidden_size=64, num_heads=4, vocab_size=VOCAB)
    programs = programs_of(weights, BUCKETS)
    generated = generated_of(weights, programs)
    return compiled_model(weights, programs, generated), build_emulation(generated.source)


def opened(model, seed=0) -> CudaRuntime:
    compiled, emulation = model
    driver = FakeDriver(emulated(emulation, seed=seed))
    return CudaRuntime(compiled, NUM_BLOCKS, BLOCK, driver=driver)


@needs_compiler
@pytest.mark.parametrize("seed", range(24))
def test_steps_in_one_launch_are_the_steps_of_many(model, seed):
    check_run(model, seed)


def check_runs(model, seeds):
    for seed in seeds:
        check_run(model, seed)


def check_run(model, seed):
    """A random run, beside plain steps of the same runtime."""
    rng = random.Random(seed)
    max_draft_tokens = rng.choice((0, 0, 1, 3, 7))
    num_sequences = rng.randint(1, BUCKETS[-1] // (1 + max_draft_tokens))
    asked = draw_asked(rng, min(num_sequences, NUM_BLOCKS // 2), vocab_size=VOCAB, num_blocks=NUM_BLOCKS)
    run = run_of(asked, rng.randint(2, 6), needs_log_sums=rng.random() < 0.5)
    with opened(model, seed) as runtime:
        fill_kv(runtime, asked, seed)
        texts = emitted(run, by_host(runtime, run))
        if rng.random() < 0.5:
            stop_tokens = tuple(text[-1] for text in texts if text)[:3]
            asked = [msgspec.structs.replace(one, stop_tokens=stop_tokens) for one in asked]
            run = run_of(asked, run.num_steps, needs_log_sums=run.needs_log_sums)
        if max_draft_tokens:
            known = [
                mistaken(rng, [one.pending, *text], VOCAB) for one, text in zip(asked, texts, strict=True)
            ]
            run = with_drafts(run, known, max_draft_tokens)
        expected = by_host(runtime, run)
        lengths = [one.context + len(text) for one, text in zip(asked, emitted(run, expected), strict=True)]
        expected_kv = kv_of(runtime, asked, lengths)
        fill_kv(runtime, asked, seed)
        found = all_steps(runtime.start(run))
        assert bits(found) == bits(expected)
        assert kv_of(runtime, asked, lengths) == expected_kv
        # The counters stand where the next launches expect them.
        again = all_steps(runtime.start(run))
        assert bits(again) == bits(expected)
        assert bits(by_host(runtime, run)) == bits(expected)


@needs_compiler
def test_drafts_that_are_right_take_fewer_steps(model):
    with opened(model) as runtime:
        fill_kv(runtime, [SINGLE], 0)
        plain = run_of([SINGLE], 12)
        (text,) = emitted(plain, by_host(runtime, plain))
        run = with_drafts(plain, [[SINGLE.pending, *text]], 3)
        steps = all_steps(runtime.start(run))
        assert emitted(run, steps)[0][:12] == text
        assert max(step.counts[0] for step in steps) == 4


@needs_compiler
def test_a_run_of_one_step_is_a_step(model):
    with opened(model) as runtime:
        fill_kv(runtime, [SINGLE], 0)
        run = run_of([SINGLE], 1)
        assert bits(all_steps(runtime.start(run))) == bits(by_host(runtime, run))


@needs_compiler
def test_a_run_that_is_stopped_ends_after_the_step_it_is_in(model):
    with opened(model) as runtime:
        fill_kv(runtime, [SINGLE], 0)
        run = runtime.start(run_of([SINGLE], 6))
        run.stop()
        assert [step.counts.tolist() for step in all_steps(run)] == [[1]]
        run.stop()
        assert run.next() is None
        assert len(by_host(runtime, run_of([SINGLE], 3))) == 3


def test_nothing_else_starts_during_a_run(model):
    compiled, _ = model
    with CudaRuntime(compiled, NUM_BLOCKS, BLOCK, driver=FakeDriver()) as runtime:
        runtime.start(run_of([SINGLE], 2))
        with pytest.raises(StepError, match="a run of several steps is under way"):
            runtime.start(run_of([SINGLE], 2))
        with pytest.raises(StepError, match="a run of several steps is under way"):
            runtime.copy_slots(int32([0]), int32([1]))
        runtime.write_kv(0, int32([70]), bytes(128))


def test_steps_are_read_as_they_are_told(model):
    compiled, _ = model
    driver = FakeDriver()
    with CudaRuntime(compiled, NUM_BLOCKS, BLOCK, driver=driver) as runtime:
        run = runtime.start(run_of([SINGLE], 4))
        arguments = driver.launches[-1][1]
        ring = driver.host_memory[arguments.run.ring].array.view("i4")
        word = driver.host_memory[arguments.run.told].array.view("u4")
        ring[:4], word[0] = (1, 33, 0, 0), 1
        assert run.next().reductions.token_ids.tolist() == [33]
        ring[4:8], ring[8:12], word[0] = (1, 34, 0, 0), (1, 35, 0, 0), 3 | LAST_STEP
        assert [step.reductions.token_ids.tolist() for step in all_steps(run)] == [[34], [35]]
        runtime.start(run_of([SINGLE], 2))
        assert driver.launches[-1][1].epoch == 3


def test_a_kernel_that_ends_too_early_is_an_error(model):
    compiled, _ = model
    with CudaRuntime(compiled, NUM_BLOCKS, BLOCK, driver=FakeDriver()) as runtime:
        run = runtime.start(run_of([SINGLE], 2))
        with pytest.raises(StepError, match="ended before its last step"):
            run.next()
        assert run.next() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "1 to 64 steps, not 0"),
        ({"num_steps": 65}, "1 to 64 steps, not 65"),
        ({"token_ids": int32([VOCAB])}, r"token 170 is not in \[0, 170\)"),
        ({"stop_token_ids": int32([-1]), "stop_starts": int32([0, 1])}, r"stop token -1 is not in"),
        ({"stop_starts": int32([0, 1])}, "stop_starts do not cover the 0 stop tokens"),
        ({"max_new_tokens": int32([0])}, "max_new_tokens 0 is not in"),
        ({"max_new_tokens": int32([9, 9])}, "2 max_new_tokens for 1 sequences"),
        ({"max_draft_tokens": 2}, "go together"),
        ({"max_draft_tokens": 8}, "at most 7 tokens, not 8"),
        ({"context_lengths": int32([30])}, "block table of 2 blocks needs 4"),
        ({"block_tables": int32([[1, NUM_BLOCKS]])}, "block 12 is not in a pool of 12"),
        ({"context_lengths": int32([100_000])}, "last position 100019 is not in"),
    ],
)
def test_what_must_not_run_is_refused(model, changes, message):
    compiled, _ = model
    with CudaRuntime(compiled, NUM_BLOCKS, BLOCK, driver=FakeDriver()) as runtime:
        with pytest.raises(StepError, match=message):
            runtime.start(msgspec.structs.replace(run_of([SINGLE], 4), **changes))
        runtime.start(run_of([SINGLE], 2))


def test_too_many_rows_are_refused(model):
    compiled, _ = model
    with CudaRuntime(compiled, NUM_BLOCKS, BLOCK, driver=FakeDriver()) as runtime:
        run = with_drafts(run_of([SINGLE] * 3, 4), [[1, 2, 3]], 2)
        with pytest.raises(StepError, match="3 sequences of 3 rows are 9: a step has 1 to 8"):
            runtime.start(run)


FAULTS = {
    "results that are not waited for": (
        "wait_word(w, run.results, (number + 1) * num_handing_out);",
        "",
    ),
    "results told before all of the block's are there": (
        "sync_consumers();\n    if (w.thread == 0 && w.sm < num_handing_out)",
        "if (w.thread == 0 && w.sm < num_handing_out)",
    ),
    "a step that begins without what was written for it": (
        "ptx::add_release(run.begun, is_last ? kLastStep : 1);",
        "ptx::store_system(run.begun, is_last ? number | kLastStep : number + 1);",
    ),
    "a draft that is taken a token too far": ("count < length &&", "count <= length &&"),
    "rows of no use in the slots of others": ("run.first_unused_slot + row;", "row;"),
}


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(model, tmp_path, fault):
    compiled, _ = model
    old, new = FAULTS[fault]
    header = (INCLUDE_FOLDER / "cuda" / "ops" / "advance.h").read_text(encoding="utf-8")
    assert header.count(old) == 1
    (tmp_path / "cuda" / "ops").mkdir(parents=True)
    (tmp_path / "cuda" / "ops" / "advance.h").write_text(header.replace(old, new), encoding="utf-8")
    weights = tiny_weights(1, "qwen3", hidden_size=64, num_heads=4, vocab_size=VOCAB)
    source = generated_of(weights, compiled.programs).source
    faulty = build_emulation(source, extra_flags=("-iquote", str(tmp_path)))
    with pytest.raises((AssertionError, StepError, EmulationError)):
        check_runs((compiled, faulty), range(20))
