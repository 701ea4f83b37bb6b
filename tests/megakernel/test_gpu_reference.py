"""What GPUs are held to, held to the repository's own oracles; and the hardware run's checks over emulated
kernels."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from benchmarks.gpu_memory import BLOCK_TOKENS, host_view, opened
from benchmarks.gpu_steps import NO_PARENT, Pool, chain, groups_of, key_slots, num_blocks_of, rows_of
from megakernel.artifact import lay_out_weights, pack_weights, packed_formats
from megakernel.codegen_cuda import generate_cuda
from megakernel.cuda_compiled import CompiledCuda, compiled_of
from megakernel.emulation import build_emulation
from megakernel.graph import uniform_formats
from megakernel.group_formats import GroupQuantizedWeights
from megakernel.head import reduce_rows
from megakernel.pack_cuda import PACKED_FORMATS, group_bytes, pack_linear, unpack
from megakernel.packing import PackedLinear
from megakernel.pipeline import compile_program
from megakernel.schedule import list_schedule
from megakernel.step import StepOutput
from megakernel.vm import Vm
from megakernel.vm_state import Arithmetic, VmStep, kv_for
from tests.hardware import correctness
from tests.hardware.correctness import Case, check_model, num_blocks_for
from tests.hardware.dequantize import matrix, tensors
from tests.hardware.reference import gap, reference_step
from tests.megakernel.compilers import needs_compiler
from tests.megakernel.emulated_model import toy_gpu
from tests.megakernel.fake_cuda import FakeDriver, emulated
from tests.megakernel.programs import Recipe, build_program
from tests.megakernel.test_vm_cuda import StoredAs, matrices
from tests.tiny_model import LLAMA3_SCALING, TinyWeights, tiny_weights

GROUP_FORMATS = ("W4G128", "W8G128")
FORMATS = ("Q4_0", "W4G128", "Q8_0", "W8G128", "BF16")
FAMILIES = {
    "llama": lambda: tiny_weights(1, "llama", hidden_size=64, rope_scaling=LLAMA3_SCALING),
    "qwen2": lambda: tiny_weights(3, "qwen2", hidden_size=96, num_heads=4, num_kv_heads=4, head_dim=32),
    "qwen3": lambda: tiny_weights(
        4, "qwen3", hidden_size=128, num_heads=4, head_dim=64, vocab_size=208, has_tied_head=False
    ),
}
TREE = (NO_PARENT, 0, 0, 1)
SEQUENCES = ((0, TREE), (21, chain(1)), (140, chain(3)))


def stored(family: str, format: str):
    weights: TinyWeights = FAMILIES[family]()
    if format in GROUP_FORMATS:
        return GroupQuantizedWeights(weights, dict.fromkeys(matrices(weights), format))
    return StoredAs(weights, dict.fromkeys(matrices(weights), format))


@pytest.mark.parametrize("in_features", [128, 192, 320])
@pytest.mark.parametrize("format", PACKED_FORMATS)
def test_random_bytes_are_the_numbers_that_the_packing_unpacks(format, in_features):
    data = np.random.default_rng(0).integers(0, 256, 3 * group_bytes(format, in_features), dtype=np.uint8)
    data.reshape(-1, 2)[:, 1] &= 0xBF  # no scale is infinite, none not a number
    packed = PackedLinear(format=format, in_features=in_features, out_features=48, data=data)
    found = matrix(torch.from_numpy(data), format, in_features)
    np.testing.assert_allclose(found.numpy(), unpack(packed), rtol=1e-6, atol=1e-30)


def test_column_groups_are_taken_in_parts(monkeypatch):
    weights = stored("qwen3", "Q8_0")
    packed = pack_linear([weights.raw("embed")])
    whole = matrix(torch.from_numpy(packed.data), "Q8_0", packed.in_features)
    monkeypatch.setattr("tests.hardware.dequantize._ONCE_COLUMN_GROUPS", 3)
    assert torch.equal(matrix(torch.from_numpy(packed.data), "Q8_0", packed.in_features), whole)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", FORMATS)
def test_tensors_of_packed_memory_are_the_models(family, format):
    weights = stored(family, format)
    layout = lay_out_weights(build_program(weights.shape, Recipe()), weights.formats, "cuda")
    packed = np.zeros(layout.num_bytes, np.uint8)
    pack_weights(layout, weights, packed)
    found = tensors(torch.from_numpy(packed), layout, weights.shape)
    assert found.keys() == weights.names
    for name, values in found.items():
        np.testing.assert_allclose(values.numpy(), weights.dense(name), rtol=1e-6, atol=1e-7, err_msg=name)


def vm_step(rows) -> VmStep:
    counts = np.diff(rows.sequence_starts)
    fields = ("token_ids", "positions", "slots", "parents", "context_lengths", "block_tables")
    return VmStep(
        sequences=np.repeat(np.arange(len(counts)), counts),
        **{name: getattr(rows, name).astype(np.int64) for name in fields},
    )


@pytest.mark.parametrize("format", ["Q4_0", "BF16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_computes_what_the_vm_does(family, format):
    weights = stored(family, format)
    shape = weights.shape
    num_blocks = sum(num_blocks_of(context, len(parents)) for context, parents in SEQUENCES)
    groups = groups_of(SEQUENCES, Pool(num_blocks), shape.vocab_size)
    rows = rows_of(groups)
    program = build_program(shape, Recipe(bucket=8))
    kv = kv_for(program, num_blocks * BLOCK_TOKENS, block_size=BLOCK_TOKENS, dtype=np.float16)
    rng = np.random.default_rng(1)
    for layer in kv.layers:
        layer[...] = rng.normal(0, 0.5, layer.shape)
    size = (shape.num_layers, num_blocks * BLOCK_TOKENS, 2, shape.num_kv_heads, shape.head_dim)
    pool = torch.from_numpy(np.stack(kv.layers)).view(size)
    expected = Vm(program, weights, kv, Arithmetic.CUDA).run(vm_step(rows))
    dense = {name: torch.from_numpy(weights.dense(name)).double() for name in weights.names}
    rounded, exact = (
        reference_step(shape, dense, rows, key_slots(groups), pool, is_rounded=is_rounded)
        for is_rounded in (True, False)
    )
    logits = torch.from_numpy(expected.logits)
    held = torch.from_numpy(np.stack([layer[rows.slots] for layer in kv.layers])).view(rounded.kv.shape)
    # A row is as good as equal unless one of its activations was rounded the other way: then it shows, in a
    # tiny model, as it must not hide in one that computes something else.
    off = [gap(found, wanted).typical for found, wanted in zip(logits, rounded.logits, strict=True)]
    assert sum(value < 1e-5 for value in off) >= len(off) // 2
    assert max(off) < 1e-2
    assert gap(held[0], rounded.kv[0]).largest < 1e-3
    assert 1e-3 < gap(logits, exact.logits).typical < 2e-2


def test_nothing_rounded_is_the_slow_oracle():
    from megakernel.reference import reference_logits

    weights = FAMILIES["qwen3"]()
    groups = groups_of(((0, chain(7)),), Pool(1), weights.shape.vocab_size)
    shape = weights.shape
    dense = {name: torch.from_numpy(weights.dense(name)).double() for name in weights.names}
    pool = torch.zeros((shape.num_layers, BLOCK_TOKENS, 2, shape.num_kv_heads, shape.head_dim)).half()
    found = reference_step(shape, dense, rows_of(groups), key_slots(groups), pool, is_rounded=False)
    np.testing.assert_allclose(found.logits, reference_logits(weights, groups[0].tokens), rtol=0, atol=2e-5)


# With kernels, emulated: the hardware run's own checks, over memory that it fills itself.


def compiled_for(shape, format: str, buckets) -> tuple[CompiledCuda, str]:
    formats = packed_formats(shape, uniform_formats(shape, format), "cuda")
    machine = toy_gpu()
    programs = [
        compile_program(
            shape, "toy", machine, bucket, list_schedule(shape, machine, bucket, formats), formats=formats
        )
        for bucket in buckets
    ]
    generated = generate_cuda(programs, formats)
    return compiled_of(programs, generated, shape, Path("no cubin"), None), generated.source


CASES = [Case("one row", ((130, chain(1)),)), Case("a tree and a chain", ((1, TREE), (20, chain(3))))]


EMULATED = [("qwen3", "W4G128"), ("qwen2", "Q8_0"), ("llama", "BF16")]


@needs_compiler
@pytest.mark.parametrize(("family", "format"), EMULATED)
def test_emulated_kernels_pass_the_hardware_run(family, format, monkeypatch):
    shape = FAMILIES[family]().shape
    # In sums of so few terms one activation rounded the other way weighs more.
    monkeypatch.setattr(correctness, "OP_BOUND", 2.0**-7)
    compiled, source = compiled_for(shape, format, (8,))
    driver = FakeDriver(emulated(build_emulation(source)))
    with opened(compiled, num_blocks_for(CASES), driver=driver, view=host_view) as runtime:
        found = check_model(runtime, CASES, host_view)
    assert found.problems == []
    assert found.worst["head"].typical < 1e-3


FAULTS = {
    "layers.1.o": "last layer's KV",
    "layers.1.down": "last layer's KV",
    "layers.1.k": "last layer's KV",
    "layers.1.q_norm": "queries",
    "layers.0.v": "first layer's KV",
    "layers.1.up": "MLP",
    "embed": "head",
}
"""Weights that kernels have otherwise, and where it shows first."""


@needs_compiler
def test_kernels_that_compute_something_else_are_found(monkeypatch):
    shape = msgspec.structs.replace(FAMILIES["qwen3"]().shape, has_tied_head=True)
    monkeypatch.setattr(correctness, "OP_BOUND", 2.0**-7)
    compiled, source = compiled_for(shape, "Q8_0", (8,))
    driver = FakeDriver(emulated(build_emulation(source)))
    for weight, place in FAULTS.items():

        def other(*arguments, weight=weight):
            found = tensors(*arguments)
            found[weight] = found[weight].roll(1, dims=0)
            return found

        monkeypatch.setattr(correctness, "tensors", other)
        with opened(compiled, num_blocks_for(CASES), driver=driver, view=host_view) as runtime:
            found = check_model(runtime, CASES[1:], host_view)
        assert any(place in problem for problem in found.problems), weight


def reduced(**changes):
    logits = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    reductions = msgspec.structs.replace(reduce_rows(logits, 4), **changes)
    return StepOutput(logits=logits, reductions=reductions, allowed_logits=logits[0, :0])


def test_wrong_reductions_are_found():
    right = reduced().reductions
    assert correctness.wrong_reductions(reduced(), 4) == []
    for name, message in (
        ("maxima", "the maximum is not"),
        ("token_ids", "the best tokens are"),
        ("log_sums", "log-sum-exp is off"),
        ("top_token_ids", "the top tokens are not"),
        ("top_logits", "the top tokens' logits"),
    ):
        wrong = getattr(right, name).copy()
        wrong.reshape(-1)[1] += 1
        (problem,) = correctness.wrong_reductions(reduced(**{name: wrong}), 4)
        assert problem.startswith(message)
