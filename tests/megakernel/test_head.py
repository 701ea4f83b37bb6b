"""The head asked for less than all logits: allowed tokens alone, and reductions, native and in the VM."""

import msgspec
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megakernel.build import BuildError, find_compiler
from megakernel.codegen_cpu import generate
from megakernel.head import reduce_rows
from megakernel.model.gguf import GgufWeights
from megakernel.runtime import Runtime
from megakernel.step import Rows, StepError
from megakernel.vm import Vm
from megakernel.vm_state import NO_PARENT, kv_for
from megakernel.vm_state import StepError as VmStepError
from tests.megakernel.model.model_files import VOCAB_SIZE, random_tensors, tiny_shape, write_gguf
from tests.megakernel.native_steps import BLOCK, Group, chain, int32, rows_of, vm_step
from tests.megakernel.programs import Recipe, build_program
from tests.tiny_model import TinyWeights, tiny_weights

NUM_BLOCKS = 8
BUCKET = 16
FORMATS = ("F32", "BF16", "F16", "Q8_0", "Q4_1", "Q4_0")
RARE = ("F16", "Q4_0")
"""Compiled for a quarter of a minute each."""
QUICK = ("-O1",)
SLOW_FIXTURES = [HealthCheck.function_scoped_fixture]

try:
    find_compiler()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


def recipe(workers: int, **changes) -> Recipe:
    return Recipe(workers=workers, bucket=BUCKET, stats_span=64, tile_columns={"head": 64}, **changes)


@pytest.fixture(scope="session")
def library_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("head_libraries")


def opened(weights, program, library_folder) -> Runtime:
    return Runtime.of(
        [program],
        weights,
        NUM_BLOCKS,
        BLOCK,
        kv_format="float32",
        library_folder=library_folder,
        extra_flags=QUICK,
    )


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] if name in RARE else []) for name in FORMATS],
)
def stored(request, tmp_path_factory) -> GgufWeights:
    """A vocabulary of 300: its last group of 16 columns is not full."""
    path = tmp_path_factory.mktemp("head") / "model.gguf"
    shape = tiny_shape("llama")
    write_gguf(path, shape, random_tensors(shape), storage=GGMLQuantizationType[request.param])
    return GgufWeights(path)


@pytest.fixture(scope="module")
def runtimes(stored, library_folder):
    """With one worker, and with three and row tiles."""
    recipes = (recipe(1), recipe(3, seed=5, row_tiles=3))
    programs = [build_program(stored.shape, it) for it in recipes]
    made = [opened(stored, program, library_folder) for program in programs]
    yield made
    for runtime in made:
        runtime.close()


def asked(num_rows: int, **wants) -> Rows:
    """A chain of rows of one sequence."""
    tokens = np.random.default_rng(7).integers(0, 150, num_rows).tolist()
    rows = rows_of(Group(tokens=tokens, parents=chain(num_rows), context=0, table=[5, 2, 1]))
    return msgspec.structs.replace(rows, **wants)


def allowed_tokens(*slices) -> dict:
    return {
        "allowed_starts": int32(np.cumsum([0, *map(len, slices)])),
        "allowed_token_ids": int32([token for part in slices for token in part]),
    }


TOKEN = st.integers(0, VOCAB_SIZE - 1)
SLICE = st.one_of(
    st.just([]),
    st.just([VOCAB_SIZE - 1]),
    st.just(list(range(VOCAB_SIZE))),
    st.sets(TOKEN, max_size=8).map(sorted),
    st.sets(st.integers(40, 70), max_size=20).map(sorted),  # neighbours that share groups
)
WISHES = st.lists(st.tuples(SLICE, st.booleans(), st.booleans()), min_size=1, max_size=BUCKET)
"""By row: allowed tokens, needs logits, needs the best."""


@settings(max_examples=40, deadline=None, suppress_health_check=SLOW_FIXTURES)
@given(WISHES, st.sampled_from([0, 1, 9]))
def test_what_is_asked_for_is_the_same_bits_as_the_full_heads(runtimes, wishes, top_k):
    needs_logits = np.array([wish[1] for wish in wishes])
    needs_best = np.array([wish[2] for wish in wishes])
    slices = [tokens for tokens, *needs in wishes if any(needs)]
    rows = asked(
        len(wishes),
        needs_logits=needs_logits,
        needs_best=needs_best,
        top_k=top_k,
        needs_log_sums=True,
        **allowed_tokens(*slices),
    )
    for runtime in runtimes:
        every = runtime.run(asked(len(wishes)))
        output = runtime.step(rows)
        is_open = np.array([not wish[0] for wish in wishes])
        assert np.array_equal(output.logits, every[needs_logits & is_open])
        logit_rows = np.flatnonzero(needs_logits | needs_best)
        expected = [every[row, tokens] for row, tokens in zip(logit_rows, slices, strict=True)]
        assert np.array_equal(output.allowed_logits, np.concatenate([[], *expected]).astype(np.float32))
        definition = reduce_rows(every[needs_best], top_k)
        for name in ("token_ids", "maxima", "top_token_ids", "top_logits"):
            assert np.array_equal(getattr(output.reductions, name), getattr(definition, name)), name
        np.testing.assert_allclose(output.reductions.log_sums, definition.log_sums, rtol=1e-6, atol=1e-5)


@settings(max_examples=40, deadline=None, suppress_health_check=SLOW_FIXTURES)
@given(st.lists(SLICE.filter(len), min_size=1, max_size=BUCKET))
def test_restricted_rows_alone_are_the_same_bits_too(runtimes, slices):
    for runtime in runtimes:
        every = runtime.run(asked(len(slices)))
        output = runtime.step(asked(len(slices), **allowed_tokens(*slices)))
        expected = [every[row, tokens] for row, tokens in enumerate(slices)]
        assert np.array_equal(output.allowed_logits, np.concatenate(expected))
        assert output.logits.shape == (0, VOCAB_SIZE)


def test_native_is_the_vms(stored, runtimes):
    program = build_program(stored.shape, recipe(3))
    everything = list(range(VOCAB_SIZE))
    slices = ([3], [], [0, 17, 299], everything, [], [17, 18], [1, 2, 3], [17])
    needs_best = np.array([False] * 4 + [True, True] + [False] * 2)
    rows = asked(8, needs_best=needs_best, top_k=5, needs_log_sums=True, **allowed_tokens(*slices))
    kv = kv_for(program, NUM_BLOCKS * BLOCK, block_size=BLOCK)
    expected = Vm(program, stored, kv).run(vm_step(rows), seed=3)
    scale = float(np.nanmax(np.abs(expected.logits)))
    tolerance = {"rtol": 0, "atol": scale * (0.05 if stored.formats["embed"].startswith("Q") else 2e-3)}
    assert np.isnan(expected.logits[[0, 0, 5], [2, 299, 0]]).tolist() == [True, True, False]
    for runtime in runtimes:
        output = runtime.step(rows)
        np.testing.assert_allclose(output.logits, expected.logits[[1, 4]], **tolerance)
        np.testing.assert_allclose(output.allowed_logits, expected.allowed_logits, **tolerance)
        for name in ("maxima", "log_sums", "top_logits"):
            found, wanted = getattr(output.reductions, name), getattr(expected.reductions, name)
            np.testing.assert_allclose(found, wanted, **tolerance)


@settings(max_examples=15, deadline=None)
@given(st.lists(SLICE, min_size=1, max_size=6), st.integers(0, 100))
def test_the_vms_allowed_logits_are_the_same_bits_as_its_full_heads(slices, seed):
    weights = tiny_weights(3, vocab_size=VOCAB_SIZE, max_context_tokens=64)
    k_split = {"head": 2} if seed % 2 else {}
    program = build_program(weights.shape, recipe(3, k_tiles=k_split, row_tiles=2))
    rows = asked(len(slices), **allowed_tokens(*slices))
    vm = Vm(program, weights, kv_for(program, NUM_BLOCKS * BLOCK, block_size=BLOCK))
    every = vm.run(vm_step(asked(len(slices)))).logits
    some = vm.run(vm_step(rows), seed=seed)
    for row, tokens in enumerate(slices):
        columns = tokens or list(range(VOCAB_SIZE))
        assert np.array_equal(some.logits[row, columns], every[row, columns])
        assert np.isnan(np.delete(some.logits[row], columns)).all()
    expected = [every[row, tokens] for row, tokens in enumerate(slices)]
    assert np.array_equal(some.allowed_logits, np.concatenate(expected))


@settings(max_examples=25, deadline=None, suppress_health_check=SLOW_FIXTURES)
@given(st.lists(st.sets(st.integers(0, 159), max_size=20).map(sorted), min_size=1, max_size=BUCKET))
def test_a_head_with_k_tiles_is_restricted_too(k_split_runtime, slices):
    every = k_split_runtime.run(asked(len(slices)))
    output = k_split_runtime.step(asked(len(slices), **allowed_tokens(*slices)))
    expected = [every[row, tokens] for row, tokens in enumerate(slices)]
    assert np.array_equal(output.allowed_logits, np.concatenate(expected))
    assert np.array_equal(output.logits, every[[row for row, tokens in enumerate(slices) if not tokens]])


@pytest.fixture(scope="module")
def k_split_runtime(library_folder):
    weights = tiny_weights(1)
    program = build_program(weights.shape, recipe(3, k_tiles={"head": 3}, row_tiles=2))
    with opened(weights, program, library_folder) as runtime:
        yield runtime


def with_head(change) -> TinyWeights:
    """Tiny weights whose separate head `change` has edited."""
    weights = tiny_weights(1, has_tied_head=False)
    tensors = {name: weights.dense(name) for name in weights.names}
    change(tensors["head"])
    return TinyWeights(weights.shape, tensors)


def test_equal_logits_come_by_ascending_token(library_folder):
    def repeat(head):
        head[100:160:5] = head[7]

    weights = with_head(repeat)
    with opened(weights, build_program(weights.shape, recipe(2)), library_folder) as runtime:
        rows = asked(12, needs_best=np.ones(12, dtype=np.bool_), top_k=64)
        every = runtime.run(asked(12))
        found, expected = runtime.step(rows).reductions, reduce_rows(every, 64)
        assert np.array_equal(found.top_token_ids, expected.top_token_ids)
        assert np.array_equal(found.token_ids, every.argmax(axis=1))
        assert any(len(np.unique(top)) < 64 for top in found.top_logits)


@pytest.mark.parametrize("place", [0, 63, 77, 159])
def test_a_nan_surfaces(library_folder, place):
    def spoil(head):
        head[place, 5] = np.nan

    weights = with_head(spoil)
    with opened(weights, build_program(weights.shape, recipe(2)), library_folder) as runtime:
        rows = asked(3, needs_best=np.array([True, True, False]), top_k=2, **allowed_tokens([], [], [place]))
        output = runtime.step(rows)
        assert np.isnan(output.reductions.maxima).all()
        assert output.reductions.token_ids.tolist() == [place, place]
        assert np.isnan(output.reductions.top_logits).all()
        assert np.isnan(output.allowed_logits).all()


def test_nobody_asks_for_anything(runtimes):
    output = runtimes[0].step(asked(3, needs_logits=np.zeros(3, dtype=np.bool_)))
    assert output.logits.shape == (0, VOCAB_SIZE)
    assert output.reductions.token_ids.shape == (0,)
    assert output.allowed_logits.shape == (0,)


@pytest.mark.parametrize(
    ("wants", "message"),
    [
        (allowed_tokens([5, 5], [1]), "row 0: allowed token 5 after 5"),
        (allowed_tokens([1], [5, 300]), "row 1: allowed token 300 after 5, in a vocabulary of 300"),
        (allowed_tokens([-1], []), "row 0: allowed token -1"),
        (allowed_tokens([1]), "2 allowed_starts: one a row that needs logits, and one"),
        ({**allowed_tokens([1], [2]), "allowed_starts": int32([0, 3, 2])}, r"row 1: .* are \[3, 2\)"),
        ({**allowed_tokens([1], [2]), "allowed_starts": int32([0, 1, 1])}, "end at 1 of 2"),
        ({"top_k": 65}, "top_k is 65; it is at most 64"),
    ],
)  # fmt: skip
def test_wishes_that_cannot_be_are_refused_and_the_next_step_runs(runtimes, wants, message):
    with pytest.raises(StepError, match=message):
        runtimes[0].step(asked(2, **wants))
    assert np.isfinite(runtimes[0].run(asked(2))).all()


def test_the_vm_refuses_them_too():
    weights = tiny_weights(3, max_context_tokens=64)
    program = build_program(weights.shape, recipe(1))
    vm = Vm(program, weights, kv_for(program, NUM_BLOCKS * BLOCK, block_size=BLOCK))
    for wants in (allowed_tokens([5, 5], [1]), allowed_tokens([160], []), {"top_k": 65}):
        with pytest.raises(VmStepError):
            vm.run(vm_step(asked(2, **wants)))


def test_the_heads_weights_are_fetched_ahead_only_for_full_rows(stored):
    program = build_program(stored.shape, recipe(3))
    source = generate([program], stored.formats).source.splitlines()
    heads = [
        line for number, line in enumerate(source) if "s.weights" in line and "head" in _op(source, number)
    ]
    assert heads
    assert all("s.head.num_full > 0 ? " in line for line in heads)
    before = [line for line in source if "linear<" in line and "num_full > 0 ? " in line]
    assert len(before) >= len(program.workers)


def _op(source: list[str], number: int) -> str:
    return next(line for line in source[number::-1] if line.startswith("  // "))


def test_tree_rows_may_be_restricted(runtimes):
    parents = [NO_PARENT, 0, 0, 1]
    rows = rows_of(Group(tokens=[1, 2, 3, 4], parents=parents, context=0, table=[0]))
    every = runtimes[0].run(rows)
    slices = [[9], [8, 200], [], [299]]
    output = runtimes[0].step(msgspec.structs.replace(rows, **allowed_tokens(*slices)))
    assert np.array_equal(output.allowed_logits, every[[0, 1, 1, 3], [9, 8, 200, 299]])
