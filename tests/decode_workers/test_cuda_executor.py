"""The engine over the CUDA runtime, its kernels emulated: single steps, and several in one launch."""

from functools import partial

import msgspec
import pytest

from cluster.config import DecodeConfig
from cluster.messages import FinishReason, GenerateRequest, SamplingParams, SequenceFinished, TokensEmitted
from decode_workers.executor import MultiStepExecutor
from decode_workers.megakernel_executor import MegaKernelExecutor
from megakernel.build import BuildError, find_compiler
from megakernel.cuda_runtime import CudaRuntime
from megakernel.emulation import build_emulation
from megakernel.multi_step import MAX_STEPS
from tests.decode_workers.support import VOCAB_SIZE, EngineRig, greedy, request_of
from tests.megakernel.cuda_models import compiled_model, generated_of, programs_of
from tests.megakernel.fake_cuda import FakeDriver, emulated
from tests.tiny_model import tiny_weights

BLOCK = 16
NUM_BLOCKS = 24
BUCKETS = (1, 4, 8)

try:
    find_compiler()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def model():
    weights = tiny_weights(1, "qwen3", hidden_size=64, num_heads=4, vocab_size=VOCAB_SIZE)
    programs = programs_of(weights, BUCKETS)
    generated = generated_of(weights, programs)
    return compiled_model(weights, programs, generated), build_emulation(generated.source)


@pytest.fixture
def driver(model):
    return FakeDriver(emulated(model[1]))


@pytest.fixture
def executor(model, driver):
    made = MegaKernelExecutor(model[0], "tiny", NUM_BLOCKS, BLOCK, opener=partial(CudaRuntime, driver=driver))
    yield made
    made.close()
    assert driver.is_closed


def rig_of(executor: MegaKernelExecutor, most_steps: int) -> EngineRig:
    return EngineRig(executor, DecodeConfig(max_steps_per_launch=most_steps))  # type: ignore[arg-type]


def told(executor: MegaKernelExecutor, most_steps: int, *requests: GenerateRequest) -> dict[str, object]:
    """Of each request, one arriving every other step: tokens, with what is told of them, text and end."""
    rig = rig_of(executor, most_steps)
    for request in requests:
        rig.submit(request)
        rig.step()
        rig.step()
    rig.run()
    assert rig.used_tokens == 0
    return {
        str(event.request_id): (
            [
                token
                for one in rig.of(event.request_id)
                if isinstance(one, TokensEmitted)
                for token in one.tokens
            ],
            rig.text(event.request_id),
            (event.reason, event.usage.completion_tokens),
        )
        for event in rig.events
        if isinstance(event, SequenceFinished)
    }


def test_it_runs_several_steps_and_has_a_step_table(executor, driver):
    assert isinstance(executor, MultiStepExecutor)
    assert executor.max_steps_per_launch == MAX_STEPS
    assert executor.layout.dtype == "float16"
    driver.kernel = lambda driver, kernel, arguments: None
    driver.launches.clear()
    costs = executor.measure()
    assert [cost.rows for cost in costs] == list(BUCKETS)
    assert {name for name, _ in driver.launches} == {f"step_rows{rows}" for rows in BUCKETS}


@pytest.mark.parametrize("sampling", [greedy(21, ignore_eos=True), greedy(13, num_logprobs=0), greedy(9)])
def test_steps_in_one_launch_give_what_single_steps_give(executor, driver, sampling: SamplingParams):
    requests = [
        request_of("a", range(40, 52), sampling),
        request_of("b", [9], greedy(12, ignore_eos=True)),
        request_of("c", range(40, 60), sampling),  # shares a prefix with the first
    ]
    single = told(executor, 1, *requests)
    launched = len(driver.launches)
    multi = told(executor, 8, *requests)
    assert multi == single
    assert len(multi) == 3
    assert max(arguments.run.num_steps for _, arguments in driver.launches[launched:]) == 8


def test_a_run_may_end_just_behind_a_block(executor, driver):
    one, two = (
        request_of("a", range(BLOCK), greedy(2, ignore_eos=True)),
        request_of("b", [9, 7], greedy(2, ignore_eos=True)),
    )
    found = []
    for most_steps in (1, 8):
        rig = rig_of(executor, most_steps)
        for request in (one, two):  # their prompts first, so that both are there when the run begins
            rig.submit(
                msgspec.structs.replace(request, request_id=f"{request.request_id}0", sampling=greedy(1))
            )
        rig.run()
        rig.submit(one, two)
        rig.run()
        found.append((rig.tokens("a"), rig.tokens("b")))
    assert driver.launches[-1][1].run.num_steps == 2
    assert found[0] == found[1]


def test_stop_tokens_end_a_sequence_on_the_device(executor, driver):
    plain = rig_of(executor, 1)
    plain.submit(request_of("a", [1, 2, 3], greedy(12, ignore_eos=True)))
    plain.run()
    stop = plain.tokens("a")[4]
    rig = rig_of(executor, 8)
    rig.submit(request_of("a", [1, 2, 3], greedy(12, ignore_eos=True, stop_token_ids=(stop,))))
    rig.run()
    assert rig.reason("a") is FinishReason.STOP
    assert rig.tokens("a") == plain.tokens("a")[: plain.tokens("a").index(stop) + 1]


def test_a_kernel_that_fails_in_a_run_fails_its_sequences(executor, driver):
    rig = rig_of(executor, 8)
    rig.submit(request_of("a", [1], greedy(20, ignore_eos=True)))
    driver.kernel = lambda driver, kernel, arguments: None
    rig.run()
    assert rig.failed("a").is_retryable
    assert "ended before its last step" in rig.failed("a").message
    assert rig.used_tokens == 0


def test_the_opener_has_the_last_word(model):
    opened: list[object] = []
    bare = msgspec.structs.replace(model[0], fill_weights=None)

    def opener(compiled, num_blocks, block_size_tokens):
        opened.append((num_blocks, block_size_tokens))
        return CudaRuntime(compiled, num_blocks, block_size_tokens, driver=FakeDriver())

    MegaKernelExecutor(bare, "tiny", NUM_BLOCKS, BLOCK, opener=opener).close()
    assert opened == [(NUM_BLOCKS + 16 + 1, BLOCK)], "with blocks to measure on"
