"""The compiled megakernel against VM and reference, and against itself in other company, bit by bit."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from megakernel.build import BuildError, find_compiler
from megakernel.model.gguf import GgufWeights
from megakernel.reference import reference_logits
from megakernel.runtime import Runtime
from megakernel.step import StepError
from megakernel.vm import Vm
from megakernel.vm_state import NO_PARENT, kv_for
from tests.megakernel.model.model_files import random_tensors, tiny_shape, write_gguf
from tests.megakernel.native_steps import BLOCK, Group, chain, int32, rows_of, slot_of, vm_step
from tests.megakernel.programs import Recipe, build_program
from tests.tiny_model import tiny_weights

NUM_BLOCKS = 24
RECIPE = Recipe(workers=2, stats_span=64, k_tiles={"down": 3, "o": 2}, tile_columns={"gate_up": 64})
QUICK = ("-O1",)
TREE = [NO_PARENT, 0, 0, NO_PARENT, 1, 4]

try:
    find_compiler()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="session")
def library_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("libraries")


def programs_for(shape, recipe=RECIPE, buckets=(1, 4, 64)):
    return [build_program(shape, msgspec.structs.replace(recipe, bucket=bucket)) for bucket in buckets]


def tokens_of(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 150, count).tolist()


@pytest.fixture(scope="module")
def weights():
    return tiny_weights(1, "qwen3")


@pytest.fixture(scope="module")
def runtime(weights, library_folder):
    programs = programs_for(weights.shape)
    with Runtime.of(
        programs, weights, NUM_BLOCKS, BLOCK, library_folder=library_folder, extra_flags=QUICK
    ) as it:
        yield it


def stored_weights(folder: Path, architecture: str, storage: str) -> GgufWeights:
    shape = tiny_shape(architecture)
    scaled = {
        name: values if values.ndim == 1 else values * 0.2 for name, values in random_tensors(shape).items()
    }
    write_gguf(folder / "model.gguf", shape, scaled, storage=GGMLQuantizationType[storage])
    return GgufWeights(folder / "model.gguf")


@pytest.mark.parametrize(
    ("architecture", "storage", "kv_format", "num_rows"),
    [
        ("llama", "F32", "float32", 29),
        ("qwen2", "F16", "float16", 29),
        ("qwen3", "BF16", "float32", 29),
        ("llama", "Q4_1", "float16", 29),
        ("qwen2", "Q8_0", "float32", 29),
        ("qwen3", "Q4_0", "float32", 29),
        ("llama", "F32", "float32", 113),
        ("qwen3", "Q4_1", "float16", 113),
    ],
)
def test_every_buffer_is_the_vms(tmp_path, library_folder, architecture, storage, kv_format, num_rows):
    stored = stored_weights(tmp_path, architecture, storage)
    programs = programs_for(stored.shape, buckets=(8, 32 if num_rows <= 32 else 256))
    dtype = np.float16 if kv_format == "float16" else np.float32
    kv = kv_for(programs[1], NUM_BLOCKS * BLOCK, block_size=BLOCK, dtype=dtype)
    table = [7, 3, 9, *range(10, 16)]
    prompt = rows_of(Group(tokens=tokens_of(num_rows), parents=chain(num_rows), context=0, table=table))
    tree = rows_of(Group(tokens=tokens_of(6, 1), parents=TREE, context=num_rows, table=table))
    # A rounding that falls the other way moves an activation by 1/127 of its block's largest.
    is_quantized = storage.startswith("Q")
    with Runtime.of(
        programs,
        stored,
        NUM_BLOCKS,
        BLOCK,
        kv_format=kv_format,
        library_folder=library_folder,
        extra_flags=QUICK,
    ) as native:
        for program, rows in ((programs[1], prompt), (programs[0], tree)):
            count = len(rows.token_ids)
            expected = Vm(program, stored, kv).run(vm_step(rows)).buffers
            stats = np.empty((count, expected["head_stats"].shape[1]), dtype=np.float32)
            logits = native.run(rows, stats)
            assert_close(logits, expected["logits"], is_quantized)
            assert_close(stats[:, 0::3], expected["head_stats"][:, 0::3], is_quantized)
            assert_close(stats[:, 2::3], expected["head_stats"][:, 2::3], is_quantized)
            spans = [logits[:, i : i + 64].argmax(1) + i for i in range(0, logits.shape[1], 64)]
            assert np.array_equal(stats[:, 1::3], np.array(spans).T)
            for name in ("queries", "mlp", "hidden"):
                assert_close(native.buffer(name, program.bucket)[:count], expected[name], is_quantized)
            for layer, pool in enumerate(kv.layers):
                wire = np.frombuffer(native.read_kv(layer, rows.slots), dtype=dtype).reshape(2, count, -1)
                expected_kv = pool[rows.slots].reshape(count, 2, -1).swapaxes(0, 1)
                assert_close(wire.astype(np.float32), expected_kv.astype(np.float32), is_quantized)


def assert_close(actual, expected, is_quantized: bool) -> None:
    scale = float(np.abs(expected).max())
    error = np.abs(actual - expected)
    assert error.max() <= (0.05 if is_quantized else 2e-3) * scale
    assert np.median(error) <= (2e-3 if is_quantized else 3e-4) * scale


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_chain_rows_give_the_reference_logits(library_folder, architecture):
    weights = tiny_weights(2, architecture, has_tied_head=architecture == "llama", vocab_size=150)
    tokens = tokens_of(50)
    with Runtime.of(
        programs_for(weights.shape, buckets=(64,)),
        weights,
        NUM_BLOCKS,
        BLOCK,
        kv_format="float32",
        library_folder=library_folder,
        extra_flags=QUICK,
    ) as native:
        logits = native.run(rows_of(Group(tokens=tokens, parents=chain(50), context=0, table=[5, 2, 8, 1])))
    np.testing.assert_allclose(logits, reference_logits(weights, tokens), atol=2e-4)


def one_by_one(runtime: Runtime, tokens, table, context=0):
    steps = [
        rows_of(Group(tokens=[t], parents=[-1], context=context + i, table=table))
        for i, t in enumerate(tokens)
    ]
    return np.concatenate([runtime.run(step) for step in steps])


def test_a_row_is_the_same_bits_in_every_bucket(runtime):
    tokens = tokens_of(60)
    whole = runtime.run(rows_of(Group(tokens=tokens, parents=chain(60), context=0, table=[3, 1, 2, 0])))
    assert np.array_equal(one_by_one(runtime, tokens, [4, 5, 6, 7]), whole)
    parts = [
        runtime.run(
            rows_of(Group(tokens=tokens[i : i + 4], parents=chain(4), context=i, table=[8, 9, 10, 11]))
        )
        for i in range(0, 60, 4)
    ]
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("kv_format", ["float16", "float32"])
def test_a_row_of_the_widest_bucket_is_the_same_bits_as_alone(library_folder, kv_format):
    weights = tiny_weights(1, "qwen3")
    tokens = tokens_of(256 + 21)
    prompt, wide = tokens[:21], tokens[21:]
    ordered, single, scattered = (list(range(first, first + 18)) for first in (0, 18, 36))
    with Runtime.of(
        programs_for(weights.shape, buckets=(1, 32, 256)),
        weights,
        72,
        BLOCK,
        kv_format=kv_format,
        library_folder=library_folder,
        extra_flags=QUICK,
    ) as native:
        alone = one_by_one(native, tokens, single)
        for table in (ordered, scattered):
            native.run(rows_of(Group(tokens=prompt, parents=chain(21), context=0, table=table)))
        rows = rows_of(Group(tokens=wide, parents=chain(256), context=21, table=ordered))
        assert np.array_equal(native.run(rows), alone[21:])
        # In slots out of order all but the prompt is gathered, from the part of a block on that it ends in.
        slots = int32(54 * BLOCK + np.random.default_rng(0).permutation(256))
        rows = rows_of(Group(tokens=wide, parents=chain(256), context=21, table=scattered))
        assert np.array_equal(native.run(msgspec.structs.replace(rows, slots=slots)), alone[21:])


def test_a_path_of_a_tree_is_the_same_bits_as_decoded_one_by_one(runtime):
    prompt, tokens = tokens_of(21, 1), tokens_of(6, 2)
    runtime.run(rows_of(Group(tokens=prompt, parents=chain(21), context=0, table=[3, 1])))
    tree = runtime.run(rows_of(Group(tokens=tokens, parents=TREE, context=21, table=[3, 1])))
    path = [0, 1, 4, 5]
    straight = one_by_one(runtime, prompt + [tokens[i] for i in path], [4, 5])
    assert np.array_equal(tree[path], straight[21:])
    branch = one_by_one(runtime, [*prompt, tokens[0], tokens[2]], [6, 7])
    assert np.array_equal(tree[2], branch[-1])


def test_company_changes_no_bit(runtime):
    tables = [[3, 1], [4, 5], [6, 7]]
    groups = []
    for index, (table, context) in enumerate(zip(tables, (17, 5, 30), strict=True)):
        prompt = tokens_of(context, index)
        runtime.run(rows_of(Group(tokens=prompt, parents=chain(context), context=0, table=table)))
        groups.append(
            Group(
                tokens=tokens_of(6, 9 + index)[: 2 if index == 2 else 6],
                parents=TREE[: 2 if index == 2 else 6],
                context=context,
                table=table,
            )
        )
    alone = [runtime.run(rows_of(group)) for group in groups]
    assert np.array_equal(runtime.run(rows_of(*groups)), np.concatenate(alone))
    assert np.array_equal(runtime.run(rows_of(*groups[::-1])), np.concatenate(alone[::-1]))


def test_workers_change_no_bit(runtime, weights, library_folder):
    tokens = tokens_of(40)
    rows = rows_of(Group(tokens=tokens, parents=chain(40), context=0, table=[3, 1, 2]))
    lone = msgspec.structs.replace(RECIPE, workers=1, seed=7)
    with Runtime.of(
        programs_for(weights.shape, lone), weights, 8, BLOCK, library_folder=library_folder, extra_flags=QUICK
    ) as other:
        assert np.array_equal(other.run(rows), runtime.run(rows))


def test_only_rows_that_need_logits_have_them(runtime):
    group = Group(tokens=tokens_of(10), parents=chain(10), context=0, table=[0])
    every = runtime.run(rows_of(group))
    some = runtime.run(rows_of(group, needs_logits=[False] * 4 + [True, False, True] + [False] * 3))
    assert np.array_equal(some, every[[4, 6]])
    assert runtime.run(rows_of(group, needs_logits=[False] * 10)).shape == (0, 160)


def test_without_logits_the_kv_is_the_same(runtime, weights):
    tokens = tokens_of(40)
    wanting = rows_of(Group(tokens=tokens, parents=chain(40), context=0, table=[3, 1, 2]))
    last = runtime.run(wanting)[-1]
    wanting_none = rows_of(
        Group(tokens=tokens, parents=chain(40), context=0, table=[6, 4, 5]), needs_logits=[False] * 40
    )
    assert runtime.run(wanting_none).shape == (0, 160)
    for layer in range(weights.shape.num_layers):
        wanted, other = (runtime.read_kv(layer, rows.slots) for rows in (wanting, wanting_none))
        assert wanted == other
    # Counters go on as after any step.
    assert np.array_equal(runtime.run(wanting)[-1], last)


def test_an_accepted_path_moves_to_committed_slots(runtime):
    prompt, tokens, table = tokens_of(11, 1), tokens_of(6, 2), [14, 7]
    runtime.run(rows_of(Group(tokens=prompt, parents=chain(11), context=0, table=table)))
    parents = [NO_PARENT, 0, 0, 1, 2, 3]
    runtime.run(rows_of(Group(tokens=tokens, parents=parents, context=11, table=table)))
    at = [slot_of(table, position) for position in range(17)]
    runtime.copy_slots(int32([at[11], at[13], at[15]]), int32([at[11], at[12], at[13]]))
    after = one_by_one(runtime, [77], table, context=14)
    straight = one_by_one(runtime, [*prompt, tokens[0], tokens[2], tokens[4], 77], [2, 3])
    assert np.array_equal(after[0], straight[-1])


def test_kv_goes_out_and_comes_back_as_it_was(runtime, weights):
    tokens = tokens_of(20)
    runtime.run(rows_of(Group(tokens=tokens, parents=chain(20), context=0, table=[3, 1])))
    before = one_by_one(runtime, [5], [3, 1], context=20)
    source = int32([slot_of([3, 1], position) for position in range(20)])
    target = int32([slot_of([9, 12], position) for position in range(20)])
    for layer in range(weights.shape.num_layers):
        runtime.write_kv(layer, target, memoryview(runtime.read_kv(layer, source)))
    assert np.array_equal(one_by_one(runtime, [5], [9, 12], context=20), before)


def test_kv_of_a_wrong_length_or_place_is_refused(runtime):
    with pytest.raises(ValueError, match="2 tokens of one layer are 256 bytes, not 100"):
        runtime.write_kv(0, int32([1, 2]), bytes(100))
    with pytest.raises(StepError, match="slot is not in the pool"):
        runtime.write_kv(0, int32([1, NUM_BLOCKS * BLOCK]), bytes(256))
    with pytest.raises(StepError, match="no such layer"):
        runtime.write_kv(2, int32([1, 2]), bytes(256))
    with pytest.raises(StepError, match="slot is not in the pool"):
        runtime.copy_slots(int32([-1]), int32([0]))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("token_ids", [1, 160], "row 1: token 160 is not in a vocabulary of 160"),
        ("slots", [0, NUM_BLOCKS * BLOCK], "row 1: slot 384 is not in a pool of 384"),
        ("positions", [0, 2], "row 1: its position is 2, but it has not 2 ancestors"),
        ("positions", [0, 512], "row 1: position 512 is not in"),
        ("parents", [-1, 1], "row 1: its parent 1 is not before it"),
        ("sequence_starts", [0, 1], "sequence starts do not cover the 2 rows"),
        ("context_lengths", [33], "33 committed tokens do not fit its block table of 2 blocks"),
        ("block_tables", [[NUM_BLOCKS, 0]], "block table entry 0 is 24; the pool has 24 blocks"),
    ],
)
def test_rows_that_cannot_be_are_refused_and_the_next_step_runs(runtime, name, values, message):
    good = rows_of(Group(tokens=[1, 2], parents=chain(2), context=0, table=[0, 1]))
    bad = msgspec.structs.replace(good, **{name: int32(values)})
    if name == "block_tables":
        bad = msgspec.structs.replace(bad, context_lengths=int32([1]), positions=int32([1, 2]))
    with pytest.raises(StepError, match=message):
        runtime.run(bad)
    assert np.isfinite(runtime.run(good)).all()


def test_block_sizes_are_whole_small_blocks(weights):
    with pytest.raises(ValueError, match="block size 24: a multiple of 16"):
        Runtime.of(programs_for(weights.shape), weights, 2, 24)


def test_stamps_are_in_order(runtime):
    stamps = runtime.new_stamps(1)
    runtime.run(rows_of(Group(tokens=[1], parents=[-1], context=0, table=[0])), stamps=stamps)
    for worker in stamps.workers:
        assert (worker > 0).all()
        assert (np.diff(worker.reshape(-1)) >= 0).all()
