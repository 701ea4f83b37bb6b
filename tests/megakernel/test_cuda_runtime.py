"""The CUDA runtime's own logic over a device that only remembers, and over emulated kernels."""

import threading

import msgspec
import numpy as np
import pytest

from megakernel.cuda_arguments import EXTRA_COUNTERS, Failure
from megakernel.cuda_counters import split_arrivals_at
from megakernel.cuda_device import CudaError
from megakernel.cuda_runtime import CudaRuntime
from megakernel.emulation import build_emulation
from megakernel.float_formats import bf16_bits, round_to_bf16
from megakernel.head import reduce_rows
from megakernel.model.rope import rope_frequencies
from megakernel.step import StepError
from megakernel.vm import Vm
from megakernel.vm_state import NO_PARENT, Arithmetic, kv_for
from tests.megakernel.compilers import needs_compiler
from tests.megakernel.cuda_models import compiled_model, generated_of, programs_of, without_signal
from tests.megakernel.fake_cuda import FakeDriver, emulated
from tests.megakernel.native_steps import BLOCK, Group, chain, int32, rows_of, vm_step
from tests.tiny_model import LLAMA3_SCALING, tiny_weights

NUM_BLOCKS = 12
BUCKETS = (1, 4, 8)
VOCAB = 170
TREE = [NO_PARENT, 0, 0, 1]
LAUNCH_FAILED = CudaError("cuStreamSynchronize", "CUDA_ERROR_LAUNCH_FAILED")


@pytest.fixture(scope="module")
def weights():
    return tiny_weights(1, "qwen3", hidden_size=64, num_heads=4, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def compiled(weights):
    return compiled_model(weights, programs_of(weights, BUCKETS))


@pytest.fixture
def driver():
    return FakeDriver()


@pytest.fixture
def runtime(compiled, driver):
    with CudaRuntime(compiled, NUM_BLOCKS, BLOCK, driver=driver) as opened:
        driver.calls.clear()
        yield opened


def single(position: int = 0, **options):
    return rows_of(Group(tokens=[7], parents=[NO_PARENT], context=position, table=[4, 2]), **options)


def tree(**options):
    return rows_of(
        Group(tokens=[5, 6, 7, 8], parents=TREE, context=20, table=[3, 7]),
        Group(tokens=[11], parents=[NO_PARENT], context=0, table=[2]),
        **options,
    )


def asking(rows, **changes):
    return msgspec.structs.replace(rows, **changes)


def test_weights_and_turns_are_there_before_the_first_step(weights, compiled, driver, runtime):
    packed = np.zeros(compiled.layout.num_bytes, dtype=np.uint8)
    compiled.fill_weights(packed)
    held = driver.bytes_at(runtime.weights_address, len(packed))
    np.testing.assert_array_equal(held, packed)
    runtime.step(single())
    (_, arguments) = driver.launches[-1]
    half = weights.shape.head_dim // 2
    turns = driver.array_at(arguments.turns, weights.shape.max_context_tokens * half * 2, np.float32)
    angles = np.arange(weights.shape.max_context_tokens)[:, None] * rope_frequencies(weights.shape)
    expected = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    np.testing.assert_array_equal(turns.reshape(-1, half, 2), expected)


def test_a_step_is_one_copy_there_one_launch_and_copies_back(runtime, driver):
    runtime.step(single())
    assert driver.calls == ["to_device", "launch", "to_host", "to_host"]
    driver.calls.clear()
    runtime.step(tree(needs_logits=[False] * 5))
    assert driver.calls == ["to_device", "launch", "to_host"]


def test_the_smallest_bucket_that_holds_the_rows_is_launched_and_counts_its_own_steps(runtime, driver):
    for rows in (single(), single(1), tree(), single(2), tree()):
        runtime.step(rows)
    launched = [(name, arguments.epoch) for name, arguments in driver.launches]
    expected = [("step_rows1", 0), ("step_rows1", 1), ("step_rows8", 0), ("step_rows1", 2), ("step_rows8", 1)]
    assert launched == expected


def test_the_kernel_finds_every_table_and_number(compiled, driver, runtime):
    seen = {}

    def look(driver, kernel, arguments):
        for name in ("token_ids", "positions", "slots", "context_lengths", "table_rows", "row_flags"):
            seen[name] = driver.array_at(getattr(arguments, name), 5).tolist()
        starts = driver.array_at(arguments.path_starts, 6)
        seen["path_slots"] = driver.array_at(arguments.path_slots, starts[-1]).tolist()
        seen["tables"] = driver.array_at(arguments.block_tables, 2 * arguments.max_blocks).tolist()
        seen["spans"] = driver.array_at(arguments.needed_spans, 1, np.uint32).tolist()
        seen["counters"] = driver.array_at(arguments.counters, compiled.num_counters + EXTRA_COUNTERS)
        seen["numbers"] = (
            arguments.num_rows,
            arguments.max_blocks,
            arguments.block_size_tokens,
            arguments.top_k,
            arguments.run.num_steps,
        )
        seen["limits"] = (arguments.num_slots, arguments.timeout_ns)
        assert arguments.failure in driver.host_memory

    driver.kernel = look
    rows = asking(tree(), needs_best=np.array([True, False, False, False, False]), top_k=2)
    runtime.step(rows)
    for name in ("token_ids", "positions", "slots"):
        assert seen[name] == getattr(rows, name).tolist()
    assert seen["context_lengths"] == [20] * 4 + [0]
    assert seen["table_rows"] == [0] * 4 + [1]
    assert seen["row_flags"] == [3, 1, 1, 1, 1]
    slots = rows.slots.tolist()
    paths = ([0], [0, 1], [0, 2], [0, 1, 3], [4])
    assert seen["path_slots"] == [slots[row] for path in paths for row in path]
    assert seen["tables"] == [3, 7, 2, -1]
    assert seen["spans"] == [0b111111]
    assert seen["numbers"] == (5, 2, BLOCK, 2, 1)
    assert seen["limits"] == (NUM_BLOCKS * BLOCK + BUCKETS[-1], 10_000_000_000)
    assert not seen["counters"].any()


def put_results(driver, kernel, arguments):
    """Each number says whose it is: rows in hundreds."""
    rows, top_k = arguments.num_rows, arguments.top_k
    logits = driver.array_at(arguments.logits, rows * VOCAB, np.float32).reshape(rows, VOCAB)
    logits[...] = np.arange(rows)[:, None] * 1000 + np.arange(VOCAB)
    stats = driver.array_at(arguments.stats, rows * 18, np.float32).reshape(rows, 18)
    stats[...] = np.arange(rows)[:, None] * 100 + np.arange(18)
    values = driver.array_at(arguments.values, rows * (2 + top_k), np.float32).reshape(rows, -1)
    values[...] = np.arange(rows)[:, None] * 100 + np.arange(2 + top_k)
    tokens = driver.array_at(arguments.tokens, rows * (1 + top_k)).reshape(rows, -1)
    tokens[...] = np.arange(rows)[:, None] * 100 + 50 + np.arange(1 + top_k)
    starts = driver.array_at(arguments.allowed_starts, rows + 1)
    if starts[-1]:
        allowed = driver.array_at(arguments.allowed_logits, starts[-1], np.float32)
        allowed[...] = driver.array_at(arguments.allowed_token_ids, starts[-1]) + 0.5


def test_results_are_of_the_rows_that_asked(runtime, driver):
    driver.kernel = put_results
    rows = asking(
        tree(needs_logits=[True, False, True, True, True]),
        needs_best=np.array([False, True, False, False, True]),
        top_k=3,
        needs_log_sums=True,
        allowed_starts=int32([0, 0, 0, 2, 2, 3]),
        allowed_token_ids=int32([4, 40, 9]),
    )
    output = runtime.step(rows)
    assert output.logits[:, 0].tolist() == [0, 3000]
    assert output.logits[1, -1] == 3000 + VOCAB - 1
    assert output.allowed_logits.tolist() == [4.5, 40.5, 9.5]
    found = output.reductions
    assert found.maxima.tolist() == [100, 400]
    assert found.log_sums.tolist() == [101, 401]
    assert found.top_logits.tolist() == [[102, 103, 104], [402, 403, 404]]
    assert found.token_ids.tolist() == [150, 450]
    assert found.top_token_ids.tolist() == [[151, 152, 153], [451, 452, 453]]


def test_log_sums_that_nobody_asked_for_are_no_numbers(runtime, driver):
    driver.kernel = put_results
    output = runtime.step(asking(single(), needs_best=np.array([True])))
    assert np.isnan(output.reductions.log_sums).all()
    assert output.reductions.maxima.tolist() == [0]


def test_stats_are_of_the_rows_over_the_whole_vocabulary(runtime, driver):
    driver.kernel = put_results
    rows = asking(
        tree(needs_logits=[True, False, True, False, False]),
        needs_best=np.array([False, False, False, False, True]),
        allowed_starts=int32([0, 0, 1, 1]),
        allowed_token_ids=int32([4]),
    )
    stats = np.zeros((2, 6, 3), dtype=np.float32)
    runtime.step(rows, stats=stats)
    assert stats[:, 0, 0].tolist() == [0, 400]
    assert stats[1, 5, 2] == 417


def test_results_are_the_callers_own(runtime, driver):
    driver.kernel = put_results
    first = runtime.step(single())
    kept = first.logits.copy()
    driver.kernel = lambda driver, kernel, arguments: driver.array_at(
        arguments.logits, VOCAB, np.float32
    ).fill(-1)
    runtime.step(single(1))
    np.testing.assert_array_equal(first.logits, kept)


def test_many_allowed_tokens_need_more_room(weights, driver):
    big = tiny_weights(2, hidden_size=64, num_heads=4, vocab_size=40_000, num_layers=1)
    compiled = compiled_model(big, programs_of(big, (1,)))
    driver.kernel = lambda driver, kernel, arguments: driver.array_at(
        arguments.allowed_logits, 40_000, np.float32
    ).__setitem__(slice(None), driver.array_at(arguments.allowed_token_ids, 40_000))
    with CudaRuntime(compiled, NUM_BLOCKS, BLOCK, driver=driver) as runtime:
        rows = asking(
            single(), allowed_starts=int32([0, 40_000]), allowed_token_ids=np.arange(40_000, dtype=np.int32)
        )
        assert runtime.step(rows).allowed_logits.tolist() == list(range(40_000))
        held = len(driver.memory)
        runtime.step(rows)
        assert len(driver.memory) == held


def test_a_refused_step_launches_nothing(runtime, driver):
    with pytest.raises(StepError, match="token 170 is not in a vocabulary"):
        runtime.step(asking(single(), token_ids=int32([VOCAB])))
    assert driver.launches == []
    runtime.step(single())


def wire(rng, shape, tokens):
    return rng.integers(0, 255, 2 * 2 * tokens * shape.num_kv_heads * shape.head_dim, dtype=np.uint8)


def test_kv_goes_to_its_layer_and_slot_keys_first(weights, driver, runtime):
    shape, rng = weights.shape, np.random.default_rng(0)
    slots = int32([5, 6, 7, 40, 3])
    data = wire(rng, shape, 5)
    runtime.write_kv(1, slots, data.tobytes())
    assert driver.calls == ["to_device"] * 3
    assert bytes(runtime.read_kv(1, slots)) == data.tobytes()
    runtime.step(single())
    arguments = driver.launches[-1][1]
    width = 2 * shape.num_kv_heads * shape.head_dim
    pool = driver.array_at(arguments.kv, 2 * arguments.num_slots * width, np.float16).reshape(2, -1, width)
    keys, values = data.view(np.float16).reshape(2, 5, -1)
    assert pool[1, 40].tobytes() == keys[3].tobytes() + values[3].tobytes()
    assert not pool[0].any()
    assert np.flatnonzero(pool[1].any(axis=1)).tolist() == [3, 5, 6, 7, 40]


def test_no_kv_is_no_copy(driver, runtime):
    runtime.write_kv(0, int32([]), b"")
    assert bytes(runtime.read_kv(0, int32([]))) == b""
    runtime.copy_slots(int32([]), int32([]))
    assert driver.calls == []


def test_slots_are_read_before_they_are_written(weights, driver, runtime):
    rng = np.random.default_rng(1)
    slots = int32([10, 11, 12, 13])
    layers = [wire(rng, weights.shape, 4).tobytes() for _ in range(2)]
    for layer, data in enumerate(layers):
        runtime.write_kv(layer, slots, data)
    driver.calls.clear()
    runtime.copy_slots(int32([10, 11, 12]), int32([11, 12, 13]))
    assert driver.calls == ["lines"] * 2
    for layer, data in enumerate(layers):
        before = np.frombuffer(data, dtype=np.uint8).reshape(2, 4, -1)
        after = np.frombuffer(runtime.read_kv(layer, slots), dtype=np.uint8).reshape(2, 4, -1)
        np.testing.assert_array_equal(after, before[:, [0, 0, 1, 2]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda it: it.write_kv(0, int32([1]), b"12"),
            ValueError,
            "1 tokens of one layer are 128 bytes, not 2",
        ),
        (lambda it: it.write_kv(0, int32([192]), bytes(128)), StepError, "a slot is not in the pool"),
        (lambda it: it.read_kv(2, int32([1])), StepError, "no such layer"),
        (lambda it: it.copy_slots(int32([-1]), int32([1])), StepError, "a slot is not in the pool"),
        (lambda it: it.copy_slots(int32([0]), int32([1, 2])), ValueError, "1 slots cannot be copied to 2"),
    ],
)
def test_slots_and_bytes_that_do_not_fit_are_refused(runtime, call, error, message):
    with pytest.raises(error, match=message):
        call(runtime)


def test_kv_may_be_written_beside_a_step(runtime, driver):
    """The writer's stream is its own: a step that is under way does not carry its copies out."""

    def write(driver, kernel, arguments):
        thread = threading.Thread(target=runtime.write_kv, args=(0, int32([30]), bytes(range(128))))
        thread.start()
        thread.join()

    driver.kernel = write
    runtime.step(single())
    assert bytes(runtime.read_kv(0, int32([30]))) == bytes(range(128))


def test_buffers_between_ops_can_be_looked_at(compiled, runtime, driver):
    """Floats, and what is stored in 16 bits."""
    width = next(buffer.columns for buffer in compiled.programs[1].buffers if buffer.name == "mlp")

    def fill(driver, kernel, arguments):
        start = arguments.activations + compiled.buffer_offsets["hidden"]
        driver.array_at(start, 8 * 64, np.float32)[...] = np.arange(8 * 64)
        start = arguments.activations + compiled.buffer_offsets["mlp"]
        driver.array_at(start, 4 * width, np.uint16)[...] = bf16_bits(np.arange(4 * width, dtype=np.float32))

    driver.kernel = fill
    runtime.step(rows_of(Group(tokens=[1, 2, 3], parents=chain(3), context=0, table=[1])))
    for bucket, last in ((4, 255), (8, 511)):
        held = runtime.buffer("hidden", bucket)
        assert held.shape == (bucket, 64)
        assert held[-1, 63] == last
    mlp = runtime.buffer("mlp", 4)
    np.testing.assert_array_equal(mlp.reshape(-1), round_to_bf16(np.arange(mlp.size, dtype=np.float32)))


def test_launches_alone_are_timed_by_events(runtime, driver):
    assert runtime.launch_ms(single(), 3) == [1.0, 1.0, 1.0]
    assert [arguments.epoch for _, arguments in driver.launches] == [0, 1, 2]
    assert driver.calls == ["to_device", "record", *["launch", "record"] * 3]


def fails(**fields):
    """A kernel that reports and traps."""

    def kernel(driver, kernel, arguments):
        memory = driver.host_memory[arguments.failure].array
        said = Failure.from_buffer(memory)
        for name, value in fields.items():
            setattr(said, name, value)
        driver.next_error = LAUNCH_FAILED
        raise LAUNCH_FAILED

    return kernel


def awaited(program):
    """SM, index and wait of the last instruction that waits, and who signals what it waits for."""
    sm, index, one = next(
        (sm, index, one)
        for sm, path in reversed(list(enumerate(program.workers)))
        for index, one in reversed(list(enumerate(path)))
        if one.waits
    )
    return sm, index, one


def test_a_failure_names_where_and_what_was_waited_for(compiled, runtime, driver):
    runtime.step(tree())
    program = compiled.programs[2]
    sm, index, instruction = awaited(program)
    wait = instruction.waits[0]
    signals = [one for path in program.workers for one in path if one.signal == wait.counter]
    arrivals = len(signals)
    driver.kernel = fails(
        code=1,
        block=sm,
        warp=0,
        instruction=index,
        counter=compiled.first_counters[2] + wait.counter,
        expected=arrivals + wait.target,
        actual=arrivals + wait.target - 1,
    )
    with pytest.raises(StepError) as error:
        runtime.step(tree())
    said = str(error.value)
    assert said.startswith(f"step_rows8 gave up after 10 s: SM {sm}, warp 0, instruction {index} (")
    assert program.ops[instruction.op].name in said
    assert f"counter {wait.counter} had {wait.target - 1} of {wait.target} arrivals of this step" in said
    assert f"it gets {arrivals}, from SM" in said
    assert program.ops[signals[0].op].name in said


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"code": 2, "warp": 3, "expected": 5}, r"warp 3, .*: weight tile 5 of this SM has not landed"),
        (
            {"code": 3, "warp": 8, "expected": 40, "actual": 37},
            "warp 8, .* until this SM has ended 5 instructions; 37 of 40 arrivals",
        ),
        ({"code": 9, "instruction": 9999}, "after its last instruction.*failure code 9"),
    ],
)
def test_other_failures(runtime, driver, fields, message):
    driver.kernel = fails(**fields)
    with pytest.raises(StepError, match=message):
        runtime.step(single())


def test_the_counter_that_ends_a_step_is_everybodys(compiled, runtime, driver):
    last = compiled.programs[0].num_counters
    driver.kernel = fails(code=1, counter=last, expected=3, actual=2, instruction=10_000)
    with pytest.raises(StepError, match=r"had 2 of 3 arrivals of this step; it gets 3, from every SM at its"):
        runtime.step(single())


def test_splits_that_do_not_come_are_named(compiled, runtime, driver):
    program = compiled.programs[2]
    counter = compiled.first_counters[2] + split_arrivals_at(program) + 1 * program.bucket + 5
    driver.kernel = fails(code=1, counter=counter, expected=4, actual=3)
    with pytest.raises(StepError, match="3 of 4 splits of row 5, KV head 1, were there"):
        runtime.step(tree())


def test_after_a_failure_nothing_runs_any_more(runtime, driver):
    driver.kernel = fails(code=2, warp=3)
    with pytest.raises(StepError, match="has not landed"):
        runtime.step(single())
    driver.next_error, driver.kernel = None, lambda *_: None
    launched = len(driver.launches)
    for call in (
        lambda: runtime.step(single()),
        lambda: runtime.launch_ms(single(), 1),
        lambda: runtime.copy_slots(int32([1]), int32([2])),
        lambda: runtime.write_kv(0, int32([1]), bytes(128)),
        lambda: runtime.read_kv(0, int32([1])),
    ):
        with pytest.raises(StepError, match="has not landed"):
            call()
    assert len(driver.launches) == launched


def test_an_error_without_a_report_is_told_as_it_came(runtime, driver):
    driver.next_error = CudaError("cuStreamSynchronize", "CUDA_ERROR_ILLEGAL_ADDRESS", "what it is")
    for _ in range(2):
        with pytest.raises(
            StepError, match="step_rows1 failed: cuStreamSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS, what it is"
        ):
            runtime.step(single())


def test_closed_is_closed(compiled, driver):
    runtime = CudaRuntime(compiled, NUM_BLOCKS, BLOCK, driver=driver)
    runtime.close()
    runtime.close()
    assert driver.is_closed
    with pytest.raises(StepError, match="closed"):
        runtime.step(single())


def test_what_goes_wrong_while_opening_gives_all_back(compiled, driver):
    def no_weights(out):
        raise OSError("no such file")

    broken = msgspec.structs.replace(compiled, fill_weights=no_weights)
    with pytest.raises(OSError, match="no such file"):
        CudaRuntime(broken, NUM_BLOCKS, BLOCK, driver=driver)
    assert driver.is_closed


def test_weights_may_be_left_to_others(compiled, driver):
    bare = msgspec.structs.replace(compiled, fill_weights=None)
    with CudaRuntime(bare, NUM_BLOCKS, BLOCK, driver=driver) as runtime:
        assert not driver.bytes_at(runtime.weights_address, compiled.layout.num_bytes).any()


# With kernels: as the emulator runs them, from the arguments that the runtime made.


MODELS = {
    "qwen3": lambda: tiny_weights(1, "qwen3", hidden_size=64, num_heads=4, vocab_size=VOCAB),
    "llama": lambda: tiny_weights(
        3,
        "llama",
        hidden_size=64,
        num_heads=4,
        vocab_size=VOCAB,
        rope_scaling=LLAMA3_SCALING,
        has_tied_head=False,
    ),
    "qwen2": lambda: tiny_weights(2, "qwen2", hidden_size=64, num_heads=4, vocab_size=VOCAB),
}


class Pair:
    """A model's runtime over emulated kernels, and the VM of the same program."""

    def __init__(self, name: str) -> None:
        self.weights = MODELS[name]()
        self.programs = programs_of(self.weights, BUCKETS)
        generated = generated_of(self.weights, self.programs)
        driver = FakeDriver(emulated(build_emulation(generated.source)))
        compiled = compiled_model(self.weights, self.programs, generated)
        self.runtime = CudaRuntime(compiled, NUM_BLOCKS, BLOCK, driver=driver)
        program = self.programs[-1]
        kv = kv_for(program, NUM_BLOCKS * BLOCK, block_size=BLOCK, dtype=np.float16)
        self.vm = Vm(program, self.weights, kv, Arithmetic.CUDA)

    def run(self, rows):
        return self.runtime.step(rows), self.vm.run(vm_step(rows))


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    made = Pair(request.param)
    yield made
    made.runtime.close()


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=2e-2 * np.abs(expected).max())


@needs_compiler
def test_emulated_steps_agree_with_the_vm(pair):
    """A prompt in chains, decode in every bucket, a tree, another sequence beside it."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, 40).tolist()
    table = [9, 1, 5]
    context = 0
    for size in (8, 8, 1, 3, 1, 8):
        group = Group(
            tokens=tokens[context : context + size], parents=chain(size), context=context, table=table
        )
        found, expected = pair.run(rows_of(group))
        close(found.logits, expected.logits)
        context += size
    rows = rows_of(
        Group(tokens=tokens[:4], parents=TREE, context=context, table=table),
        Group(tokens=[3, 4], parents=chain(2), context=0, table=[8]),
    )
    found, expected = pair.run(rows)
    close(found.logits, expected.logits)


@needs_compiler
def test_what_is_asked_of_emulated_heads_is_what_logits_say(pair):
    rows = rows_of(
        Group(tokens=[5, 6, 7], parents=chain(3), context=0, table=[2]),
        Group(tokens=[8], parents=[NO_PARENT], context=0, table=[3]),
    )
    whole = pair.runtime.step(rows).logits
    asked = asking(
        rows,
        needs_logits=np.array([False, True, True, True]),
        needs_best=np.array([True, False, True, False]),
        top_k=5,
        needs_log_sums=True,
        allowed_starts=int32([0, 0, 3, 5, 5]),
        allowed_token_ids=int32([1, 90, 169, 0, 33]),
    )
    found = pair.runtime.step(asked)
    expected = reduce_rows(whole[[0, 2]], 5)
    np.testing.assert_array_equal(found.reductions.maxima, expected.maxima)
    np.testing.assert_array_equal(found.reductions.token_ids, expected.token_ids)
    np.testing.assert_array_equal(found.reductions.top_token_ids, expected.top_token_ids)
    np.testing.assert_array_equal(found.reductions.top_logits, expected.top_logits)
    np.testing.assert_allclose(found.reductions.log_sums, expected.log_sums, rtol=1e-5)
    np.testing.assert_array_equal(found.logits, whole[[3]])
    gathered = np.concatenate([whole[1][[1, 90, 169]], whole[2][[0, 33]]])
    np.testing.assert_array_equal(found.allowed_logits, gathered)


@needs_compiler
def test_restricted_rows_alone_have_the_same_logits(pair):
    rows = single(needs_logits=[True])
    whole = pair.runtime.step(rows).logits[0]
    asked = asking(rows, allowed_starts=int32([0, 2]), allowed_token_ids=int32([2, 100]))
    np.testing.assert_array_equal(pair.runtime.step(asked).allowed_logits, whole[[2, 100]])


@needs_compiler
def test_a_counter_that_stays_short_is_reported(weights):
    program = without_signal(programs_of(weights, (1,))[0])
    generated = generated_of(weights, [program])
    driver = FakeDriver(emulated(build_emulation(generated.source), expires_waits=True))
    runtime = CudaRuntime(
        compiled_model(weights, [program], generated), NUM_BLOCKS, BLOCK, driver=driver, wait_limit_s=0.5
    )
    with pytest.raises(StepError, match=r"rows1 gave up after 0.5 s: SM \d, warp [08], .*[1-9]\d* arrivals"):
        runtime.step(single())
    with pytest.raises(StepError, match="gave up"):
        runtime.step(single())
    runtime.close()
