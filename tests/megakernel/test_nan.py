"""A NaN in one token's K shows in every row that attends to it, wherever it lies, and in no other."""

import platform
from collections.abc import Iterator

import numpy as np
import pytest

from megakernel.build import BuildError, find_compiler
from megakernel.runtime import Runtime
from megakernel.vm import Vm
from megakernel.vm_state import NO_PARENT, kv_for
from tests.megakernel.native_steps import BLOCK, Group, chain, int32, rows_of, slot_of, vm_step
from tests.megakernel.programs import Recipe, build_program
from tests.megakernel.test_cpu_kernels import cpu_flags
from tests.tiny_model import tiny_weights

NUM_BLOCKS = 12
SPLIT_TOKENS = 2 * BLOCK
CONTEXT = 2 * BLOCK + 9
"""Two whole small blocks, which are one split, and a part of one, which some rows of a tree gather."""
NUM_SPLITS = 2
TREE = [NO_PARENT, 0, 0, NO_PARENT, 1, 4]
SPOILT, SHARING, ALONE = ([5, 2, 8], [5, 9, 1], [3, 10, 7])
"""Block tables; the first two have their first block in common."""
ROWS = {"spoilt": slice(0, 6), "sharing": slice(6, 12), "alone": slice(12, 18)}
BACKENDS = {
    "native": (),
    "avx2": ("-mno-avx512f",),
    "scalar": ("-mno-avx512f", "-mno-avx2", "-mno-fma", "-mno-f16c"),
}
"""What `-march=native` is to leave out."""

try:
    find_compiler()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)

WEIGHTS = tiny_weights(6)
PROGRAM = build_program(WEIGHTS.shape, Recipe(bucket=64, workers=2, split_tokens=SPLIT_TOKENS))
LAYERS = range(WEIGHTS.shape.num_layers)


@pytest.fixture(scope="module")
def library_folder(tmp_path_factory: pytest.TempPathFactory):
    return tmp_path_factory.mktemp("libraries")


@pytest.fixture(
    scope="module",
    params=[("native", "float16"), ("native", "float32"), ("avx2", "float16"), ("scalar", "float16")],
    ids="-".join,
)
def runtime(request, library_folder) -> Iterator[Runtime]:
    backend, kv_format = request.param
    if backend != "native" and platform.machine() != "x86_64":
        pytest.skip("flags are x86-64's")
    if backend == "avx2" and "avx512f" not in cpu_flags():
        pytest.skip("as native")
    with Runtime.of(
        [PROGRAM],
        WEIGHTS,
        NUM_BLOCKS,
        BLOCK,
        kv_format=kv_format,
        library_folder=library_folder,
        extra_flags=("-O1", *BACKENDS[backend]),
    ) as opened:
        for rows in prompts():
            opened.run(rows)
        yield opened


def tokens_of(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 150, count).tolist()


def prompts():
    """Steps that commit the context of all three sequences."""
    for seed, (table, start) in enumerate(((SPOILT, 0), (SHARING, BLOCK), (ALONE, 0))):
        tokens = tokens_of(seed, CONTEXT - start)
        yield rows_of(Group(tokens=tokens, parents=chain(len(tokens)), context=start, table=table))


def step():
    groups = [
        Group(tokens=tokens_of(10 + seed, len(TREE)), parents=TREE, context=CONTEXT, table=table)
        for seed, table in enumerate((SPOILT, SHARING, ALONE))
    ]
    return rows_of(*groups)


def spoiled(wire: bytes, kv_format: str) -> bytes:
    """One dimension of the second KV head's K, of one token as it goes over the wire."""
    token = np.frombuffer(wire, dtype=kv_format).reshape(2, WEIGHTS.shape.num_kv_heads, -1).copy()
    token[0, 1, 3] = np.nan
    return token.tobytes()


def run_spoilt(runtime: Runtime, layer: int, position: int) -> np.ndarray:
    slot = int32([slot_of(SPOILT, position)])
    before = runtime.read_kv(layer, slot)
    runtime.write_kv(layer, slot, spoiled(before, runtime.kv_format))
    logits = runtime.run(step())
    runtime.write_kv(layer, slot, before)
    return logits


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("position", range(CONTEXT))
def test_it_reaches_the_logits_of_those_rows_alone(runtime, layer, position):
    clean = runtime.run(step())
    assert np.isfinite(clean).all()
    logits = run_spoilt(runtime, layer, position)
    hit = ("spoilt", "sharing") if position < BLOCK else ("spoilt",)
    for name, rows in ROWS.items():
        if name in hit:
            assert np.isnan(logits[rows]).all()
        else:
            assert np.array_equal(logits[rows], clean[rows])
    assert np.array_equal(runtime.run(step()), clean)


@pytest.mark.parametrize("position", [0, 15, 16, 23, 31, 32, 40])
def test_it_is_where_the_vm_has_it(runtime, position):
    layer, rows, shape = LAYERS[-1], step(), WEIGHTS.shape
    kv = kv_for(PROGRAM, NUM_BLOCKS * BLOCK, block_size=BLOCK, dtype=np.dtype(runtime.kv_format).type)
    vm = Vm(PROGRAM, WEIGHTS, kv)
    for prompt in prompts():
        vm.run(vm_step(prompt))
    kv.layers[layer][slot_of(SPOILT, position), shape.head_dim + 3] = np.nan
    expected = vm.run(vm_step(rows)).buffers
    logits = run_spoilt(runtime, layer, position)
    assert np.array_equal(np.isnan(logits), np.isnan(expected["logits"]))
    for name in ("queries", "mlp", "hidden"):
        found = runtime.buffer(name, PROGRAM.bucket)[: len(logits)]
        assert np.array_equal(np.isnan(found), np.isnan(expected[name]))
    by_split = (len(logits), -1, shape.num_heads, shape.head_dim + 2)
    found = runtime.buffer("attention", PROGRAM.bucket)[: len(logits)].reshape(by_split)[:, :NUM_SPLITS]
    attended = expected["attention"].reshape(by_split)[:, :NUM_SPLITS]
    assert np.array_equal(np.isnan(found), np.isnan(attended))
    assert np.isnan(attended).any()
    assert not np.isnan(attended).all()
