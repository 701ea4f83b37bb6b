"""The VM against the PyTorch oracle, in any interleaving, and rows that never depend on their company."""

import random

import msgspec
import numpy as np
import pytest
import torch

from megakernel.program import Wait
from megakernel.quantize import fake_quantize
from megakernel.reference import reference_logits
from megakernel.step import Rows as NativeRows
from megakernel.vm import Vm, VmStuckError
from megakernel.vm_bisect import run_bisect
from megakernel.vm_state import NO_PARENT, OpWeights, StepError, kv_for
from tests.forests import draw_forest
from tests.megakernel.native_steps import vm_step
from tests.megakernel.programs import Recipe, build_program
from tests.megakernel.vm_steps import BLOCK_SIZE, Rows, Sequence, chain, step_of
from tests.tiny_model import LLAMA3_SCALING, TinyWeights, tiny_weights

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
"""Both sides sum in float32 or better: what is left is rounding of what is stored between ops."""
FP16_TOLERANCE = {"rtol": 2e-2, "atol": 2e-2}
"""K and V keep 11 bits."""
K_SPLIT = {"qkv": 2, "o": 3, "gate_up": 2, "down": 3, "head": 2}
NUM_BLOCKS = 40

MODELS = {
    "llama": lambda: tiny_weights(1, "llama", max_context_tokens=64),
    "llama3": lambda: tiny_weights(2, "llama", max_context_tokens=64, rope_scaling=LLAMA3_SCALING),
    "qwen2": lambda: tiny_weights(3, "qwen2", max_context_tokens=64, num_heads=4, num_kv_heads=4),
    "qwen3": lambda: tiny_weights(4, "qwen3", max_context_tokens=64, num_kv_heads=1, has_tied_head=False),
    "odd": lambda: tiny_weights(
        5, "qwen3", max_context_tokens=64, vocab_size=163, hidden_size=40, num_heads=2
    ),
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=MODELS)
def weights(request) -> TinyWeights:
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def llama() -> TinyWeights:
    return MODELS["llama"]()


def vm_of(weights, recipe, dtype=np.float32, kv=None) -> Vm:
    program = build_program(weights.shape, recipe)
    kv = kv or kv_for(program, NUM_BLOCKS * BLOCK_SIZE, block_size=BLOCK_SIZE, dtype=dtype)
    return Vm(program, weights, kv)


def shuffled_blocks(seed=0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(NUM_BLOCKS)


def tokens_of(weights, count, seed=0) -> list[int]:
    return np.random.default_rng(seed).integers(0, weights.shape.vocab_size, count).tolist()


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(workers=1, bucket=8),
        Recipe(workers=3, bucket=8, barriers="pairs", k_tiles=K_SPLIT, attention_parts=3),
        Recipe(workers=4, bucket=8, barriers="running", row_tiles=2, seed=5),
    ],
    ids=["one worker", "K-split", "row tiles"],
)
def test_prefill_as_chains_and_decode_steps_match_the_oracle(weights, recipe):
    vm, sequence = vm_of(weights, recipe), Sequence(shuffled_blocks())
    tokens = tokens_of(weights, 40)
    results = sequence.extend(vm, tokens[:36], 8, seed=1) + sequence.extend(vm, tokens[36:], 1, seed=2)
    logits = np.concatenate([result.logits for result in results])
    np.testing.assert_allclose(logits, reference_logits(weights, tokens), **TOLERANCE)


def test_fp16_kv_matches_the_oracle_less_tightly(llama):
    vm, sequence = vm_of(llama, Recipe(bucket=8), np.float16), Sequence(shuffled_blocks())
    tokens = tokens_of(llama, 24)
    logits = np.concatenate([result.logits for result in sequence.extend(vm, tokens, 8)])
    np.testing.assert_allclose(logits, reference_logits(llama, tokens), **FP16_TOLERANCE)


def test_each_node_of_a_tree_sees_its_own_path(weights):
    vm, sequence = vm_of(weights, Recipe(bucket=8, workers=2)), Sequence(shuffled_blocks(1))
    prefix, nodes = tokens_of(weights, 20), tokens_of(weights, 7, seed=9)
    parents = [NO_PARENT, 0, 0, 1, 2, NO_PARENT, 5]
    sequence.extend(vm, prefix, 8)
    logits = vm.run(step_of([Rows(sequence, nodes, parents)]), seed=3).logits
    for row, parent in enumerate(parents):
        path = [nodes[row]]
        while parent != NO_PARENT:
            path.insert(0, nodes[parent])
            parent = parents[parent]
        np.testing.assert_allclose(logits[row], reference_logits(weights, prefix + path)[-1], **TOLERANCE)


def test_ancestors_may_be_rows_of_earlier_steps(llama):
    vm, rng = vm_of(llama, Recipe(bucket=16, workers=2)), random.Random(3)
    forest = draw_forest(
        rng,
        vocab_size=llama.shape.vocab_size,
        block_size=BLOCK_SIZE,
        num_blocks=vm.kv.num_slots // BLOCK_SIZE,
        most_nodes=14,
        contexts=(0, 3, 17),
    )
    for layer in vm.kv.layers:
        layer[...] = np.random.default_rng(4).standard_normal(layer.shape)
    found = []
    for parts in ([list(range(14))], forest.levels(), forest.random_chunks(rng, 5)):
        slots = forest.scattered_slots(rng, vm.kv.num_slots)
        logits = np.zeros((14, vm.program.geometry.vocab_size))
        for nodes in parts:
            logits[nodes] = vm.run(vm_step(NativeRows(**forest.fields(nodes, slots)))).logits
        found.append(logits)
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


def test_head_statistics_are_those_of_the_logits(weights):
    vm, sequence = vm_of(weights, Recipe(bucket=4, stats_span=64)), Sequence(shuffled_blocks())
    result = sequence.extend(vm, tokens_of(weights, 4), 4)[0]
    for row, logits in enumerate(result.logits):
        for span, start in enumerate(range(0, weights.shape.vocab_size, 64)):
            part = logits[start : start + 64]
            largest, column, log_sum = result.buffers["head_stats"][row, 3 * span : 3 * span + 3]
            assert largest == part.max()
            assert column == start + part.argmax()
            expected = torch.logsumexp(torch.from_numpy(part), 0).item()
            assert log_sum == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("barriers", ["op", "running", "pairs"])
def test_any_interleaving_gives_the_same_bits_in_every_buffer(llama, barriers):
    recipe = Recipe(workers=4, bucket=4, barriers=barriers, k_tiles=K_SPLIT, row_tiles=2)
    vm, sequence = vm_of(llama, recipe), Sequence(shuffled_blocks())
    sequence.extend(vm, tokens_of(llama, 12), 4)
    step = step_of([Rows(sequence, [3, 4, 5, 6], [NO_PARENT, 0, 0, 2])])
    expected = vm.run(step)
    orders = {expected.executed}
    for seed in range(6):
        result = vm.run(step, seed=seed)
        orders.add(result.executed)
        for name, buffer in expected.buffers.items():
            np.testing.assert_array_equal(buffer, result.buffers[name], err_msg=name)
    assert len(orders) == 7


def test_a_row_has_the_same_bits_in_every_bucket_company_and_number_of_workers(weights):
    tokens = tokens_of(weights, 22)
    alone = vm_of(weights, Recipe(bucket=1, workers=1, k_tiles=K_SPLIT))
    sequence = Sequence(shuffled_blocks()[:10])
    results = sequence.extend(alone, tokens, 1)
    path = np.concatenate([result.logits for result in results[-3:]])

    crowd = vm_of(weights, Recipe(bucket=8, workers=3, k_tiles=K_SPLIT, row_tiles=3, seed=4))
    other, mine = Sequence(shuffled_blocks()[10:20]), Sequence(shuffled_blocks()[20:30])
    other.extend(crowd, tokens_of(weights, 17, seed=8), 8, seed=1)
    mine.extend(crowd, tokens[:19], 5, seed=2)
    tree = Rows(mine, [1, *tokens[19:21], 7, tokens[21]], [NO_PARENT, NO_PARENT, 1, 2, 2])
    together = crowd.run(step_of([Rows(other, [9, 9], chain(2)), tree]), seed=3).logits
    np.testing.assert_array_equal(together[[3, 4, 6]], path)


def test_weights_that_are_quantized_meet_quantized_activations():
    weights = tiny_weights(6, hidden_size=64, max_context_tokens=64)
    quantized = MixedFormats(weights.shape, weights._tensors)
    tokens, buffers = tokens_of(weights, 2), {}
    for model in (weights, quantized):
        vm = vm_of(model, Recipe(bucket=2))
        buffers[model] = Sequence(shuffled_blocks()).extend(vm, tokens, 2)[0].buffers
    x = buffers[quantized]["hidden"]
    normed = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + weights.shape.rms_norm_eps)
    normed = (normed * weights.dense("final_norm")).astype(np.float32)
    expected = fake_quantize(normed) @ weights.dense("embed").T.astype(np.float64)
    np.testing.assert_allclose(buffers[quantized]["logits"], expected, rtol=1e-5, atol=1e-5)
    # K is quantized and V is not: of the first layer, V alone stays as it was.
    half = buffers[weights]["layers.0.kv"].shape[1] // 2
    keys, values = (
        np.abs(buffers[weights]["layers.0.kv"] - buffers[quantized]["layers.0.kv"])[:, part]
        for part in (slice(0, half), slice(half, None))
    )
    assert keys.max() > 1e-3
    assert values.max() == 0


class MixedFormats(TinyWeights):
    @property
    def formats(self):
        quantized = {"embed": "Q8_0", "layers.0.q": "Q4_1", "layers.0.k": "Q4_0"}
        return dict.fromkeys(self._tensors, "F32") | quantized


def test_stopping_after_an_op_leaves_the_rest_unwritten(llama):
    vm, sequence = vm_of(llama, Recipe(bucket=2)), Sequence(shuffled_blocks())
    step = step_of([Rows(sequence, [5, 6], chain(2))])
    embedded = vm.run(step, stop_after_op="embed").buffers
    np.testing.assert_array_equal(embedded["hidden"], llama.dense("embed")[[5, 6]])
    assert np.isnan(embedded["queries"]).all()
    first = vm.run(step, stop_after_op="layers.0.down").buffers
    np.testing.assert_array_equal(first["hidden"], vm.run(step, layers=1).buffers["hidden"])
    assert np.isnan(first["logits"]).all()
    assert not np.isnan(vm.run(step, layers=2).buffers["logits"]).any()
    with pytest.raises(StepError, match=r"no op 'layers.9.o'; there are embed, layers.0.qkv"):
        vm.run(step, stop_after_op="layers.9.o")


def test_a_program_that_cannot_go_on_names_who_waits(llama):
    vm = vm_of(llama, Recipe(workers=2))
    first = vm.program.workers[0]
    waiting = msgspec.structs.replace(first[0], waits=(Wait(2, 1),))
    vm.program = msgspec.structs.replace(vm.program, workers=((waiting, *first[1:]), vm.program.workers[1]))
    with pytest.raises(VmStuckError, match=r"embed .*worker 0, instruction 0\): counter 2 at 0 of 1"):
        vm.run(step_of([Rows(Sequence([0]), [1], [NO_PARENT])]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parents": [0, NO_PARENT]}, "row 0 has parent 0"),
        ({"positions": [0, 5]}, "row 1 is at position 5, not 1"),
        ({"slots": [3, 3]}, "two rows write one slot"),
        ({"token_ids": [0, 160]}, r"token id is not in \[0, 160\)"),
        ({"context_lengths": [8], "positions": [8, 9]}, "does not cover 8 tokens"),
        ({"slots": [1]}, "arrays of lengths"),
        ({"held_starts": [0, 1], "held_slots": [3]}, "do not deal 1 held slots to 2 rows"),
        ({"held_starts": [0, 1, 1], "held_slots": [160]}, r"row 0: a held slot is not in \[0, "),
        ({"held_starts": [0, 1, 1], "held_slots": [0]}, "row 0: a row of the step writes a held slot"),
        ({"held_starts": [0, 1, 1], "held_slots": [3]}, "row 0 is at position 0, not 1"),
        (
            {"held_starts": [0, 0, 1], "held_slots": [3], "positions": [0, 2]},
            "row 1: a parent in the step, and held slots",
        ),
    ],
)
def test_steps_that_make_no_sense_are_refused(llama, change, message):
    step = step_of([Rows(Sequence([0]), [1, 2], chain(2))])
    arrays = {name: np.array(values, dtype=np.int64) for name, values in change.items()}
    with pytest.raises(StepError, match=message):
        vm_of(llama, Recipe(bucket=2)).run(msgspec.structs.replace(step, **arrays))


def test_bisecting_finds_the_first_op_that_departs(llama):
    right = vm_of(llama, Recipe(bucket=2))
    wrong_tensors = {name: llama.dense(name) for name in llama.names}
    wrong_tensors["layers.1.up"][3, 0] += 1
    wrong = Vm(right.program, OpWeights(TinyWeights(llama.shape, wrong_tensors)), right.kv)
    step = step_of([Rows(Sequence([2]), [1, 2], chain(2))])

    def other(name):
        return wrong.run(step, stop_after_op=name).buffers

    found = run_bisect(right.program, llama, right.kv, step, other)
    assert found is not None
    assert (found.op, found.buffer, found.column) == ("layers.1.gate_up", "mlp", 3)
    assert run_bisect(right.program, llama, right.kv, step, other, layers=1) is None
