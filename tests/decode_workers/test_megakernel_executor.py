import numpy as np
import pytest

from decode_workers.executor import MultiStepExecutor, StepExecutor
from decode_workers.megakernel_executor import MegaKernelExecutor
from decode_workers.step_batch import NO_PARENT, StepBatch
from decode_workers.torch_executor import TorchExecutor
from megakernel.build import BuildError, find_compiler
from megakernel.compiled import compile_here
from megakernel.machine import Machine
from megakernel.multi_step import MultiStep
from megakernel.pipeline import compile_program
from megakernel.reference import reference_generate, reference_logits
from prefill_workers.engine import PrefillJob
from prefill_workers.torch_engine import TorchPrefillEngine
from tests.decode_workers.head_asks import check_asks
from tests.tiny_model import tiny_weights

BLOCK = 16
NUM_BLOCKS = 12
BUCKETS = (1, 8, 64)
TWO_CORES = Machine(
    name="two cores",
    kind="cpu",
    num_workers=2,
    scratch_bytes=1 << 20,
    page_bytes=4096,
    bandwidth_gb_s=20.0,
    worker_bandwidth_gb_s=12.0,
    load_latency_us=0.2,
    sync_us=0.5,
    macs_per_us={"F32": 10_000.0},
    instruction_us=0.1,
)

try:
    find_compiler()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def executor(tmp_path_factory):
    weights = tiny_weights(1)
    programs = [
        compile_program(weights.shape, "model", TWO_CORES, bucket, formats=weights.formats)
        for bucket in BUCKETS
    ]
    folder = tmp_path_factory.mktemp("libraries")
    compiled = compile_here(programs, weights, kv_format="float32", library_folder=folder)
    made = MegaKernelExecutor(compiled, "model", NUM_BLOCKS, BLOCK)
    yield made
    made.close()


def step(tokens, parents, context, table, needs_logits=None) -> StepBatch:
    """One sequence's rows, row i in the slot of position context + i."""
    positions: list[int] = []
    for parent in parents:
        positions.append(context if parent == NO_PARENT else positions[parent] + 1)
    slots = [table[at // BLOCK] * BLOCK + at % BLOCK for at in range(context, context + len(tokens))]
    return StepBatch(
        token_ids=np.array(tokens, dtype=np.int32),
        positions=np.array(positions, dtype=np.int32),
        slots=np.array(slots, dtype=np.int32),
        parents=np.array(parents, dtype=np.int32),
        sequence_starts=np.array([0, len(tokens)], dtype=np.int32),
        context_lengths=np.array([context], dtype=np.int32),
        block_tables=np.array([table], dtype=np.int32),
        needs_logits=np.array(needs_logits or [True] * len(tokens), dtype=np.bool_),
    )


def chain(count: int) -> list[int]:
    return [NO_PARENT, *range(count - 1)]


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 160, count).tolist()


def test_is_a_step_executor(executor):
    typed: StepExecutor = executor
    assert typed.num_blocks == NUM_BLOCKS
    assert typed.vocab_size == 160
    assert list(typed.buckets) == list(BUCKETS)
    assert typed.layout.dtype == "float32"
    assert typed.layout.bytes_per_token == 2 * 2 * 2 * 16 * 4


def test_a_cpu_runs_several_steps_but_wins_nothing_by_it(executor):
    typed: MultiStepExecutor = executor
    assert typed.max_steps_per_launch == 1
    prompt = random_tokens(5, seed=6)
    executor.run(step(prompt[:-1], chain(4), 0, [5, 6]))
    asked = MultiStep(
        num_steps=4,
        token_ids=np.array(prompt[-1:], dtype=np.int32),
        context_lengths=np.array([4], dtype=np.int32),
        block_tables=np.array([[5, 6]], dtype=np.int32),
        max_new_tokens=np.array([9], dtype=np.int32),
        stop_starts=np.array([0, 0], dtype=np.int32),
        stop_token_ids=np.array([], dtype=np.int32),
    )
    run = executor.start(asked)
    tokens = []
    while (told := run.next()) is not None:
        tokens.append(int(told.reductions.token_ids[0]))
    assert tokens == reference_generate(tiny_weights(1), prompt, 4)


def test_chain_rows_give_the_reference_logits(executor):
    tokens = random_tokens(30)
    result = executor.run(step(tokens, chain(30), 0, [9, 2]))
    assert result.rows.tolist() == list(range(30))
    assert result.rows.dtype == np.int32
    np.testing.assert_allclose(result.logits, reference_logits(tiny_weights(1), tokens), atol=2e-4)


def test_only_rows_that_need_logits_have_them(executor):
    tokens = random_tokens(10)
    every = executor.run(step(tokens, chain(10), 0, [0, 1]))
    some = executor.run(step(tokens, chain(10), 0, [0, 1], [False] * 8 + [True, True]))
    assert some.rows.tolist() == [8, 9]
    assert np.array_equal(some.logits, every.logits[8:])


def test_less_than_all_logits_may_be_asked_for(executor):
    check_asks(executor, step(random_tokens(7, 4), [NO_PARENT, 0, 0, NO_PARENT, 1, 4, 4], 0, [1, 2]))


def test_greedy_decode_is_the_references(executor):
    prompt, table = random_tokens(20, seed=3), [4, 1, 7]
    generated: list[int] = []
    pending, context = prompt, 0
    while len(generated) < 12:
        logits = executor.run(step(pending, chain(len(pending)), context, table)).logits
        context += len(pending)
        pending = [int(logits[-1].argmax())]
        generated += pending
    assert generated == reference_generate(tiny_weights(1), prompt, 12)


def test_kv_from_another_executor_continues_its_sequence(executor):
    """As a prefill worker hands it over: float32 on both ends, in wire order."""
    tokens, table = random_tokens(21, seed=4), [3, 8]
    other = TorchExecutor(tiny_weights(1), "model", NUM_BLOCKS, BLOCK, num_threads=1)
    other.run(step(tokens[:20], chain(20), 0, table))
    slots = np.array([table[at // BLOCK] * BLOCK + at % BLOCK for at in range(20)], dtype=np.int32)
    assert executor.layout.fingerprint == other.layout.fingerprint
    for layer in range(executor.layout.num_layers):
        cache = other._kv
        keys, values = (pool[layer][:, slots.tolist()].transpose(0, 1) for pool in (cache.keys, cache.values))
        wire = np.concatenate([keys.numpy().reshape(-1), values.numpy().reshape(-1)]).tobytes()
        executor.write_kv(layer, slots, memoryview(wire))
    logits = executor.run(step(tokens[20:], [NO_PARENT], 20, table)).logits
    np.testing.assert_allclose(logits[0], reference_logits(tiny_weights(1), tokens)[-1], atol=2e-4)


def test_float16_kv_of_a_torch_prefill_continues_its_sequence(tmp_path):
    """As `headrace up` has it where prefill runs in PyTorch: float32 arithmetic, float16 in the pool."""
    weights = tiny_weights(1)
    program = compile_program(weights.shape, "model", TWO_CORES, 32, formats=weights.formats)
    compiled = compile_here([program], weights, kv_format="float16", library_folder=tmp_path)
    tokens, table = random_tokens(21, seed=4), [3, 8]
    prefill = TorchPrefillEngine(
        weights, "model", NUM_BLOCKS, BLOCK, max_tokens_per_step=64, num_threads=1, kv_dtype="float16"
    )
    chunks = []
    job = PrefillJob(request_id="r", token_ids=tuple(tokens[:20]), first_token=0, tenant="")
    prefill.admit(job, chunks.append)
    prefill.step()
    executor = MegaKernelExecutor(compiled, "model", NUM_BLOCKS, BLOCK)
    assert executor.layout.fingerprint == prefill.layout.fingerprint
    slots = np.array([table[at // BLOCK] * BLOCK + at % BLOCK for at in range(20)], dtype=np.int32)
    for chunk in chunks:
        executor.write_kv(chunk.layer, slots[chunk.first_token :][: chunk.num_tokens], chunk.data)
    handed = executor.run(step(tokens[20:], [NO_PARENT], 20, table)).logits
    straight = executor.run(step(tokens, chain(21), 0, [5, 6])).logits[-1]
    executor.close()
    np.testing.assert_allclose(handed[0], straight, atol=5e-3)
    np.testing.assert_allclose(straight, reference_logits(weights, tokens)[-1], atol=2e-2)


def test_measure_touches_nobodys_blocks(executor):
    table = list(range(NUM_BLOCKS))
    tokens = random_tokens(NUM_BLOCKS * BLOCK - 1)
    for start in range(0, len(tokens), 64):
        part = tokens[start : start + 64]
        executor.run(step(part, chain(len(part)), start, table, [False] * len(part)))
    probe = step([3], [NO_PARENT], len(tokens), table)
    before = executor.run(probe).logits
    costs = executor.measure()
    assert [cost.rows for cost in costs] == list(BUCKETS)
    assert all(cost.ms > 0 for cost in costs)
    assert np.array_equal(executor.run(probe).logits, before)
