"""The VM with CUDA's arithmetic: what is rounded, and that no more is."""

import msgspec
import numpy as np
import pytest
import torch

from megakernel.artifact import lay_out_weights, pack_weights
from megakernel.float_formats import round_to_bf16
from megakernel.group_formats import GroupQuantizedWeights
from megakernel.pack_cuda import group_bytes, unpack
from megakernel.packing import PackedLinear
from megakernel.program import Epilogue, Opcode, OpKind
from megakernel.reference import reference_logits
from megakernel.vm import Vm
from megakernel.vm_state import NO_PARENT, Arithmetic, OpWeights, kv_for
from tests.megakernel.programs import Recipe, build_program
from tests.megakernel.stored_weights import StoredAs
from tests.megakernel.vm_steps import BLOCK_SIZE, Rows, Sequence, chain, step_of
from tests.tiny_model import LLAMA3_SCALING, TinyWeights, tiny_weights

NUM_BLOCKS = 40
K_SPLIT = {"qkv": 2, "o": 3, "gate_up": 2, "down": 3, "head": 2}
MODELS = {
    "llama": lambda: tiny_weights(1, "llama", max_context_tokens=64),
    "llama3": lambda: tiny_weights(2, "llama", max_context_tokens=64, rope_scaling=LLAMA3_SCALING),
    "qwen2": lambda: tiny_weights(3, "qwen2", max_context_tokens=64, num_heads=4, num_kv_heads=4),
    "qwen3": lambda: tiny_weights(4, "qwen3", max_context_tokens=64, num_kv_heads=1, has_tied_head=False),
    "odd": lambda: tiny_weights(
        5, "qwen3", max_context_tokens=64, vocab_size=163, hidden_size=40, num_heads=2
    ),
}


def matrices(weights: TinyWeights) -> list[str]:
    return [name for name in weights.names if weights.dense(name).ndim == 2]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=MODELS)
def weights(request) -> TinyWeights:
    return MODELS[request.param]()


def vm_of(weights, recipe, arithmetic=Arithmetic.CUDA) -> Vm:
    program = build_program(weights.shape, recipe)
    kv = kv_for(program, NUM_BLOCKS * BLOCK_SIZE, block_size=BLOCK_SIZE, dtype=np.float16)
    return Vm(program, weights, kv, arithmetic)


def tokens_of(weights, count, seed=0) -> list[int]:
    return np.random.default_rng(seed).integers(0, weights.shape.vocab_size, count).tolist()


def blocks(seed=0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(NUM_BLOCKS)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(workers=1, bucket=8),
        Recipe(workers=3, bucket=8, barriers="pairs", k_tiles=K_SPLIT, attention_parts=3),
    ],
    ids=["one worker", "K-split"],
)
def test_rounded_activations_move_logits_no_further_than_rounded_weights(weights, recipe):
    vm, sequence, tokens = vm_of(weights, recipe), Sequence(blocks()), tokens_of(weights, 30)
    results = sequence.extend(vm, tokens[:27], 8, seed=1) + sequence.extend(vm, tokens[27:], 1)
    logits = np.concatenate([result.logits for result in results])
    as_packed = {
        name: round_to_bf16(weights.dense(name)) if name in matrices(weights) else weights.dense(name)
        for name in weights.names
    }
    exact, expected = (
        reference_logits(each, tokens) for each in (weights, TinyWeights(weights.shape, as_packed))
    )
    # Both are the same eight bits: what they do to the oracle's own logits is the scale.
    of_weights, of_activations = np.abs(expected - exact), np.abs(logits - expected)
    assert 0.1 * of_weights.mean() < of_activations.mean() < 1.5 * of_weights.mean()
    np.testing.assert_allclose(logits, expected, atol=0.03 * np.abs(expected).max())


def test_a_row_has_the_same_bits_in_every_bucket_company_and_number_of_workers(weights):
    tokens = tokens_of(weights, 12)
    alone = vm_of(weights, Recipe(bucket=1, workers=1, k_tiles=K_SPLIT))
    results = Sequence(blocks()[:10]).extend(alone, tokens, 1)
    crowd = vm_of(weights, Recipe(bucket=8, workers=3, k_tiles=K_SPLIT, row_tiles=3, seed=4))
    other, mine = Sequence(blocks()[10:20]), Sequence(blocks()[20:30])
    other.extend(crowd, tokens_of(weights, 9, seed=8), 8, seed=1)
    mine.extend(crowd, tokens[:9], 5, seed=2)
    step = step_of(
        [Rows(other, [9, 9], chain(2)), Rows(mine, [1, *tokens[9:]], [NO_PARENT, NO_PARENT, 1, 2])]
    )
    together = crowd.run(step, seed=3).logits
    np.testing.assert_array_equal(together[3:], np.concatenate([result.logits for result in results[-3:]]))


def run_one(weights, recipe=None, arithmetic=Arithmetic.CUDA):
    vm = vm_of(weights, recipe or Recipe(bucket=2), arithmetic)
    return vm, Sequence(blocks()).extend(vm, tokens_of(weights, 2), 2)[0].buffers


def test_normed_rows_are_rounded_before_they_are_scaled():
    weights = MODELS["llama"]()
    _, buffers = run_one(weights)
    x = torch.from_numpy(buffers["hidden"])
    weighted = (x * torch.from_numpy(weights.dense("final_norm"))).to(torch.bfloat16).double()
    rstd = (x.double().square().mean(-1, keepdim=True) + weights.shape.rms_norm_eps).rsqrt().float()
    head = torch.from_numpy(weights.dense("embed")).to(torch.bfloat16).double()
    expected = (weighted @ head.T).float() * rstd
    np.testing.assert_allclose(buffers["logits"], expected.numpy(), rtol=1e-6, atol=1e-6)


def test_parts_of_k_are_scaled_each():
    weights = MODELS["qwen2"]()
    vm, buffers = run_one(weights, Recipe(bucket=2, k_tiles={"head": 2}))
    parts = buffers["head.parts"].reshape(2, 2, -1)
    whole = run_one(weights)[1]
    np.testing.assert_array_equal(buffers["logits"], parts[:, 0] + parts[:, 1])
    np.testing.assert_allclose(buffers["logits"], whole["logits"], rtol=1e-5, atol=1e-5)
    assert any(i.opcode is Opcode.REDUCE for path in vm.program.workers for i in path)


@pytest.mark.parametrize("format", ["F16", "BF16", "Q8_0", "Q4_1", "F32"])
def test_other_rows_are_rounded_as_the_ops_weights_are_packed(format):
    plain = tiny_weights(6, num_layers=1, intermediate_size=96, max_context_tokens=64)
    weights = StoredAs(plain, {} if format == "F32" else {"layers.0.down": format})
    vm = vm_of(weights, Recipe(bucket=2))
    step = step_of([Rows(Sequence([0]), [5, 6], chain(2))])
    before = vm.run(step, stop_after_op="layers.0.gate_up").buffers
    after = vm.run(step, stop_after_op="layers.0.down").buffers
    rounded = torch.from_numpy(before["mlp"]).to(torch.float16 if format == "F16" else torch.bfloat16)
    matrix = torch.from_numpy(weights.dense("layers.0.down"))
    if format == "F32":
        matrix = matrix.to(torch.bfloat16)
    expected = before["hidden"] + (rounded.double() @ matrix.double().T).float().numpy()
    np.testing.assert_allclose(after["hidden"], expected, rtol=1e-6, atol=1e-6)


def test_activations_beyond_float16_saturate():
    plain = tiny_weights(7, num_layers=1, max_context_tokens=64)
    tensors = plain._tensors | {"layers.0.up": plain.dense("layers.0.up") * np.float32(1e5)}
    weights = StoredAs(TinyWeights(plain.shape, tensors), {"layers.0.down": "F16"})
    _, buffers = run_one(weights)
    assert np.abs(buffers["mlp"]).max() > 65504
    clamped = torch.from_numpy(buffers["mlp"]).clamp(-65504, 65504).half().double()
    added = clamped @ torch.from_numpy(weights.dense("layers.0.down")).double().T
    largest = added.abs().max().item()
    np.testing.assert_allclose(buffers["hidden"], added.numpy(), atol=largest * 1e-4)


def test_attention_reads_keys_and_values_as_float16():
    vm, buffers = run_one(MODELS["qwen3"]())
    kv = buffers["layers.0.kv"]
    np.testing.assert_array_equal(kv, kv.astype(np.float16).astype(np.float32))
    assert vm.kv.dtype == np.float16


def test_a_pool_of_another_type_is_refused():
    weights = MODELS["llama"]()
    program = build_program(weights.shape, Recipe())
    with pytest.raises(ValueError, match="a KV pool of float32: CUDA keeps K and V as float16"):
        Vm(program, weights, kv_for(program, 64), Arithmetic.CUDA)
    with pytest.raises(ValueError, match="float16"):
        Vm(program, OpWeights(weights, Arithmetic.CUDA), kv_for(program, 64))


def mixed_weights():
    """An op in every format, one in several, the embedding apart from the head."""
    plain = tiny_weights(
        8, hidden_size=128, intermediate_size=160, num_heads=4, vocab_size=163, has_tied_head=False
    )
    stored = {"layers.0.q": "Q8_0", "layers.0.o": "Q4_0", "layers.0.down": "F16", "embed": "Q8_0"}
    stored |= {"layers.0.gate": "Q4_1", "layers.0.up": "Q4_1", "layers.1.gate": "F16", "layers.1.up": "BF16"}
    groups = {"layers.1.down": "W4G128", "layers.1.o": "W8G128", "head": "W4G128"}
    return GroupQuantizedWeights(StoredAs(plain, stored), groups)


def test_matrices_are_those_that_are_packed():
    weights = mixed_weights()
    program = build_program(weights.shape, Recipe())
    layout = lay_out_weights(program, weights.formats, "cuda")
    packed = np.zeros(layout.num_bytes, np.uint8)
    pack_weights(layout, weights, packed)
    op_weights = OpWeights(weights, Arithmetic.CUDA)
    seen = set()
    for op in program.ops:
        if op.kind is OpKind.ATTENTION:
            continue
        if op.kind is OpKind.EMBED:
            segment, values = layout.at("embed"), op_weights.table(op)
        else:
            segment, matrix = layout.at(*op.weights), op_weights.matrix(op, program.swiglu_group)
            values = matrix.values
            assert matrix.packed_format == segment.format
        seen.add(segment.format)
        rows, in_features = values.shape
        data = packed[segment.offset : segment.offset + segment.num_bytes]
        columns = len(data) // group_bytes(segment.format, in_features) * 16
        whole = PackedLinear(format=segment.format, in_features=in_features, out_features=columns, data=data)
        np.testing.assert_array_equal(unpack(whole)[:rows], values, err_msg=op.name)
        assert op.epilogue is not Epilogue.SWIGLU or op.name in ("layers.0.gate_up", "layers.1.gate_up")
    assert seen == {"Q4_0", "Q4_1", "Q8_0", "W4G128", "W8G128", "BF16", "F16"}


def test_mixed_formats_give_the_logits_of_what_they_stand_for():
    weights = mixed_weights()
    tokens = tokens_of(weights, 6)
    vm = vm_of(weights, Recipe(bucket=8, k_tiles={"down": 2}))
    logits = Sequence(blocks()).extend(vm, tokens, 8)[0].logits
    expected = reference_logits(weights, tokens)
    assert np.abs(logits - expected).mean() < 0.02 * np.abs(expected).mean()


@pytest.mark.parametrize("k_tiles", [{}, {"qkv": 2}])
def test_heads_of_several_tiles_have_the_bits_of_whole_ones(weights, k_tiles):
    """Whichever tile is the last, in any order of workers."""
    whole = Recipe(workers=3, bucket=4, attention_parts=3, k_tiles=k_tiles)
    parts = msgspec.structs.replace(whole, tile_columns={"qkv": 4}, barriers="pairs")
    tokens = tokens_of(weights, 12)
    expected = Sequence(blocks()).extend(vm_of(weights, whole), tokens, 4)
    for seed in range(3):
        vm = vm_of(weights, parts)
        found = Sequence(blocks()).extend(vm, tokens, 4, seed=seed)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one.logits, other.logits)
