"""The generated CUDA kernels under emulation: the VM's results, in any order of threads."""

import numpy as np
import pytest

from megakernel.emulation_errors import DeadlockError, InFlightError, RaceError, UninitialisedError
from megakernel.pipeline import compile_program
from megakernel.schedule import list_schedule
from megakernel.validate import validate
from megakernel.vm import Vm
from megakernel.vm_state import NO_PARENT, Arithmetic, kv_for
from tests.megakernel.emulated_model import EmulatedModel, toy_gpu
from tests.megakernel.test_vm_cuda import StoredAs
from tests.megakernel.vm_steps import BLOCK_SIZE, Rows, Sequence, chain, step_of
from tests.tiny_model import LLAMA3_SCALING, TinyWeights, tiny_weights

FORMATS = ("Q4_1", "Q4_0", "Q8_0", "BF16", "F16")
FAMILIES = {
    "llama": lambda: tiny_weights(1, "llama", hidden_size=64, rope_scaling=LLAMA3_SCALING),
    "qwen2": lambda: tiny_weights(3, "qwen2", hidden_size=96, num_heads=4, num_kv_heads=4, head_dim=32),
    "qwen3": lambda: tiny_weights(
        4, "qwen3", hidden_size=64, num_heads=4, head_dim=64, vocab_size=203, has_tied_head=False
    ),
}
CASES = [*(("qwen3", format) for format in FORMATS), ("llama", "Q4_1"), ("qwen2", "Q8_0")]
BUCKETS = (1, 4, 16)
NUM_BLOCKS = 80
TREE = [NO_PARENT, 0, 0, 1]
BULK = ("-DHEADRACE_BULK_COPY=1",)


def stored(family: str, format: str) -> StoredAs:
    weights: TinyWeights = FAMILIES[family]()
    matrices = [name for name in weights.names if weights.dense(name).ndim == 2]
    return StoredAs(weights, dict.fromkeys(matrices, format))


def programs_of(weights, machine=None, buckets=(16,)):
    machine = machine or toy_gpu()
    programs = []
    for bucket in buckets:
        plan = list_schedule(weights.shape, machine, bucket, weights.formats)
        program = compile_program(weights.shape, "toy", machine, bucket, plan, formats=weights.formats)
        validate(program)
        programs.append(program)
    return programs


def contexts(vm: Vm, lengths) -> list[Sequence]:
    """Sequences with committed tokens."""
    rng = np.random.default_rng(7)
    blocks = rng.permutation(NUM_BLOCKS).reshape(len(lengths), -1)
    sequences = [Sequence(own) for own in blocks]
    for sequence, length in zip(sequences, lengths, strict=True):
        sequence.extend(vm, rng.integers(0, 160, length).tolist(), 16)
    return sequences


def a_step(sequences) -> list[Rows]:
    """A tree, a single row and a chain."""
    return [
        Rows(sequences[0], [5, 6, 7, 8], TREE),
        Rows(sequences[1], [9], chain(1)),
        Rows(sequences[2], [10, 11, 12], chain(3)),
    ]


def assert_close(found, expected, name: str) -> None:
    """To what one activation rounded the other way to bfloat16 makes of it, in one layer after another."""
    scale = np.nanmax(np.abs(expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=scale * 2**-5, err_msg=name)


def check(weights, model: EmulatedModel, seeds) -> None:
    program = model.programs[16]
    kv = kv_for(program, NUM_BLOCKS * BLOCK_SIZE, block_size=BLOCK_SIZE, dtype=np.float16)
    vm = Vm(program, weights, kv, Arithmetic.CUDA)
    sequences = contexts(vm, (0, 21, 33, 5))
    step = step_of(a_step(sequences))
    before = [layer.copy() for layer in kv.layers]
    expected = vm.run(step)
    appended = [layer.copy() for layer in kv.layers]
    bits = None
    for seed in seeds:
        for layer, values in zip(kv.layers, before, strict=True):
            layer[...] = values
        buffers, (values, tokens), _ = model.run(program.bucket, kv, step, top_k=5, seed=seed)
        for name in ("hidden", "queries", "mlp", "logits"):
            assert_close(buffers[name], expected.buffers[name], name)
        for found, wanted in zip(kv.layers, appended, strict=True):
            assert_close(found.astype(np.float32), wanted.astype(np.float32), "kv")
        logits = buffers["logits"]
        assert (tokens[:, 0] == logits.argmax(axis=1)).all()
        assert (values[:, 0] == logits.max(axis=1)).all()
        order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        assert (tokens[:, 1:] == order).all()
        sums = np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
        np.testing.assert_allclose(values[:, 1], sums, rtol=1e-5)
        assert bits is None or bits == logits.tobytes()
        bits = logits.tobytes()


@pytest.mark.parametrize(("family", "format"), CASES)
def test_kernels_compute_what_the_vm_does(family, format):
    weights = stored(family, format)
    check(weights, EmulatedModel(programs_of(weights), weights), range(4))


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_interleavings_give_the_same_bits(family, format):
    weights = stored(family, format)
    check(weights, EmulatedModel(programs_of(weights), weights), range(50))


@pytest.mark.parametrize("format", ["Q4_1", "BF16"])
def test_bulk_copies(format):
    weights = stored("qwen2", format)
    model = EmulatedModel(programs_of(weights), weights, flags=BULK)
    check(weights, model, range(4))


def test_a_row_has_the_same_bits_alone_in_company_and_in_any_bucket():
    weights = stored("qwen3", "Q4_1")
    model = EmulatedModel(programs_of(weights, buckets=BUCKETS), weights)
    program = model.programs[16]
    kv = kv_for(program, NUM_BLOCKS * BLOCK_SIZE, block_size=BLOCK_SIZE, dtype=np.float16)
    sequences = contexts(Vm(program, weights, kv, Arithmetic.CUDA), (0, 21, 33, 5))
    groups = a_step(sequences)
    together, _, _ = model.run(16, kv, step_of(groups))
    alone, _, _ = model.run(1, kv, step_of([groups[1]]))
    tree, _, _ = model.run(4, kv, step_of([groups[0]]))
    assert (together["logits"][4] == alone["logits"][0]).all()
    assert (together["logits"][:4] == tree["logits"]).all()


FAULTS = {
    "a dropped wait": ("wait_counter(w, (1u + layer * 5u)", "if (false) wait_counter(w, 1u", RaceError),
    "weights loaded too early": (
        "w.instruction - 1u)",
        "w.instruction - (w.instruction < 4 ? w.instruction : 4))",
        InFlightError,
    ),
    "a dropped arrival": ("signal_counter(w, (2u + layer * 5u));", "", DeadlockError),
    "tiles one off": (
        "const uint32_t n0 = tile * 16;",
        "const uint32_t n0 = tile * 16 + 16;",
        UninitialisedError,
    ),
}
"""What is put in place of what, and how it shows."""


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault):
    right, wrong, error = FAULTS[fault]
    weights = stored("llama", "Q8_0")
    programs = programs_of(weights, toy_gpu(scratch_bytes=17_408 + 30 * 1024))

    def edit(source: str) -> str:
        assert right in source
        return source.replace(right, wrong)

    model = EmulatedModel(programs, weights, edit=edit)
    with pytest.raises(error):
        check(weights, model, range(30))
