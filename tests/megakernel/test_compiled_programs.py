"""What the compiler makes: proved by the validator, and right by the PyTorch oracle when the VM runs it."""

import random
from collections import Counter

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.cpu_limits import MAX_ROWS
from megakernel.graph import usual_formats
from megakernel.hazards import find_hazard
from megakernel.machine import Machine, load_machine
from megakernel.model.load import PACKAGED_MODEL, open_model
from megakernel.pipeline import compile_program
from megakernel.plan import OpPlan, Plan
from megakernel.program import PageRole, Program
from megakernel.reference import reference_logits
from megakernel.schedule_error import Hazard, ScheduleError
from megakernel.shapes import SHAPES
from megakernel.validate import validate
from megakernel.vm import Vm
from megakernel.vm_state import NO_PARENT, kv_for
from tests.megakernel.compiler_cases import cpu_machine
from tests.megakernel.mutations import MUTATIONS
from tests.megakernel.vm_steps import BLOCK_SIZE, Rows, Sequence, step_of
from tests.tiny_model import TinyWeights, tiny_weights

MACHINE = Machine(
    name="test",
    kind="cpu",
    num_workers=3,
    scratch_bytes=1 << 20,
    page_bytes=4096,
    bandwidth_gb_s=10.0,
    worker_bandwidth_gb_s=5.0,
    load_latency_us=1.0,
    sync_us=1.0,
    macs_per_us={"F32": 1000.0},
    instruction_us=0.1,
)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
SPLIT_PLAN = Plan(
    ops={
        "embed": OpPlan(tile_columns=32),
        "qkv": OpPlan(tile_columns=32),
        "attention": OpPlan(tile_columns=1),
        "o": OpPlan(tile_columns=16, num_k_tiles=2),
        "gate_up": OpPlan(tile_columns=32, num_k_tiles=2),
        "down": OpPlan(tile_columns=32, num_k_tiles=3),
        "head": OpPlan(tile_columns=256),
    },
    prefetch_instructions=2,
)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def compiled(weights, workers=3, bucket=1, plan=None) -> tuple[Program, Machine]:
    machine = msgspec.structs.replace(MACHINE, num_workers=workers)
    program = compile_program(
        weights.shape, "test", machine, bucket, plan, split_tokens=16, formats=weights.formats
    )
    return program, machine


def logits_of(program: Program, weights: TinyWeights, tokens: list[int], chunk: int) -> np.ndarray:
    kv = kv_for(program, 40 * BLOCK_SIZE, block_size=BLOCK_SIZE)
    sequence = Sequence(np.random.default_rng(0).permutation(40))
    results = sequence.extend(Vm(program, weights, kv), tokens, chunk, seed=1)
    return np.concatenate([result.logits for result in results])


@given(
    architecture=st.sampled_from(["llama", "qwen2", "qwen3"]),
    heads=st.sampled_from([(2, 1), (4, 4), (6, 2)]),
    hidden=st.sampled_from([32, 64, 96]),
    inner=st.sampled_from([32, 96]),
    vocab=st.sampled_from([160, 257, 300]),
    is_tied=st.booleans(),
    workers=st.integers(1, 5),
    bucket=st.sampled_from([1, 4, 8]),
)
@settings(max_examples=12, deadline=None)
def test_every_shape_compiles_to_a_proved_and_right_program(
    architecture, heads, hidden, inner, vocab, is_tied, workers, bucket
):
    weights = tiny_weights(
        7,
        architecture,
        num_layers=1,
        hidden_size=hidden,
        intermediate_size=inner,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        vocab_size=vocab,
        max_context_tokens=64,
        has_tied_head=is_tied,
    )
    program, machine = compiled(weights, workers, bucket)
    validate(program, machine, weights.formats)
    tokens = np.random.default_rng(1).integers(0, vocab, 20).tolist()
    np.testing.assert_allclose(
        logits_of(program, weights, tokens, bucket), reference_logits(weights, tokens), **TOLERANCE
    )


@pytest.mark.parametrize(
    ("plan", "sizes"),
    [
        (None, [(1, 1), (2, 1), (3, 4), (8, 8)]),
        (SPLIT_PLAN, [(1, 1), (3, 1), (2, 4), (5, 8)]),
    ],
    ids=["default plan", "K-split"],
)
def test_a_row_has_the_same_bits_in_every_bucket_and_on_any_number_of_workers(plan, sizes):
    weights = tiny_weights(8, "qwen3", hidden_size=64, max_context_tokens=64)
    tokens = np.random.default_rng(2).integers(0, 160, 16).tolist()
    expected = None
    for workers, bucket in sizes:
        program, machine = compiled(weights, workers, bucket, plan)
        validate(program, machine, weights.formats)
        logits = logits_of(program, weights, tokens, bucket)
        expected = logits if expected is None else expected
        np.testing.assert_array_equal(logits, expected)


def test_the_widest_bucket_of_the_cpu_is_proved_and_right():
    weights = tiny_weights(8, "qwen3", num_layers=1, hidden_size=64, max_context_tokens=160)
    program, machine = compiled(weights, workers=2, bucket=MAX_ROWS)
    validate(program, machine, weights.formats)
    tokens = np.random.default_rng(2).integers(0, 160, 150).tolist()
    np.testing.assert_allclose(
        logits_of(program, weights, tokens, MAX_ROWS), reference_logits(weights, tokens), **TOLERANCE
    )


def test_too_few_pages_for_a_tile_are_found():
    weights = tiny_weights(8, hidden_size=64, max_context_tokens=64)
    program, machine = compiled(weights)
    sequence = list(program.workers[0])
    index = next(i for i, one in enumerate(sequence) if one.pages[0].role is PageRole.WEIGHTS)
    sequence[index] = msgspec.structs.replace(sequence[index], pages=sequence[index].pages[1:])
    workers = (tuple(sequence), *program.workers[1:])
    with pytest.raises(ScheduleError, match=r"holds 0 weights pages of 4096 bytes, where") as caught:
        validate(msgspec.structs.replace(program, workers=workers), machine, weights.formats)
    assert caught.value.hazard is Hazard.SCRATCH


def test_no_harmful_mutant_of_a_compiled_program_is_accepted(capsys):
    weights = tiny_weights(9, "qwen2", num_layers=2, hidden_size=64, max_context_tokens=64)
    cases = []
    for workers, bucket, plan in ((2, 1, None), (3, 4, SPLIT_PLAN)):
        program, _ = compiled(weights, workers, bucket, plan)
        kv = kv_for(program, 8 * BLOCK_SIZE, block_size=BLOCK_SIZE)
        step = step_of([Rows(Sequence([3]), [4, 6, 3, 20][:bucket], [NO_PARENT, 0, 0, 2][:bucket])])
        cases.append((program, kv, step, Vm(program, weights, kv).run(step).buffers))
        assert find_hazard(program) is None
    rng, outcomes = random.Random(5), Counter()
    while outcomes.total() < 300:
        (program, kv, step, expected), mutation = rng.choice(cases), rng.choice(MUTATIONS)
        mutant = mutation(rng, program)
        if mutant is None:
            continue
        try:
            validate(mutant)
        except ScheduleError:
            outcomes["rejected"] += 1
            continue
        outcomes["accepted, harmless"] += 1
        assert find_hazard(mutant) is None, mutation.__name__
        for seed in range(2):
            buffers = Vm(mutant, weights, kv).run(step, seed=seed).buffers
            for name, buffer in expected.items():
                np.testing.assert_array_equal(buffers[name], buffer, err_msg=f"{mutation.__name__}: {name}")
    with capsys.disabled():
        print(f"\n  {outcomes.total()} mutants of compiled programs: {dict(outcomes)}; 0 harmful accepted")
    assert outcomes["rejected"] > 150


BUCKETS = (1, 2, 4, 8, 16, 32, 64)
MACHINES = ("l20", "l4", "rtx4090", "h100")


def prove_full_size(shape: str, machine: Machine, buckets: tuple[int, ...]) -> None:
    formats = usual_formats(SHAPES[shape])
    for bucket in buckets:
        program = compile_program(SHAPES[shape], "test", machine, bucket)
        assert validate(program, machine, formats).num_instructions > machine.num_workers


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("bucket", BUCKETS)
def test_every_packaged_model_is_proved_on_every_packaged_machine(shape, machine, bucket):
    prove_full_size(shape, load_machine(machine), (bucket,))


@pytest.mark.parametrize(
    ("shape", "machine", "bucket"),
    [("smollm2-135m", "l4", 64), ("smollm2-135m", "h100", 2), ("qwen2.5-1.5b", "l20", 16)],
)
def test_some_packaged_models_are_proved(shape, machine, bucket):
    prove_full_size(shape, load_machine(machine), (bucket,))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_packaged_models_are_proved_on_a_cpu(shape):
    for workers in (1, 8):
        prove_full_size(shape, cpu_machine(workers), (1, 64))


class FloatActivations:
    """A model's weights as they are, said to be float32: activations are then not quantized."""

    def __init__(self, weights) -> None:
        self.shape, self.names, self.dense = weights.shape, weights.names, weights.dense
        self.formats = dict.fromkeys(weights.names, "F32")


@pytest.mark.slow
def test_the_packaged_model_compiled_agrees_with_the_oracle():
    """Within float32 rounding on float activations; quantized ones keep the token and the shape of logits."""
    opened = open_model(PACKAGED_MODEL)
    weights, tokens = opened.weights, [504, 3575, 314, 260, 7]
    machine = msgspec.structs.replace(MACHINE, num_workers=2, macs_per_us={"Q4_1": 9e4, "Q8_0": 9e4})
    program = compile_program(weights.shape, opened.fingerprint, machine, 4, formats=weights.formats)
    validate(program, machine, weights.formats)
    expected = reference_logits(weights, tokens)
    exact = logits_of(program, FloatActivations(weights), tokens, 4)
    np.testing.assert_allclose(exact, expected, rtol=1e-3, atol=1e-3)
    quantized = logits_of(program, weights, tokens, 4)
    assert quantized[-1].argmax() == expected[-1].argmax()
    assert np.corrcoef(quantized[-1], expected[-1])[0, 1] > 0.995
