"""The kernel from pool to wire, emulated, against RankPool.read; compiled for GPUs that are not here."""

import functools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.cuda_build import build_cubin, check_resources
from megakernel.emulation import Counts, Emulation, Region, build_emulation, device_array, device_copy
from prefill_workers.pool_export import (
    EXPORT_THREADS,
    PAIRS,
    Pair,
    PoolExport,
    export_arguments,
    export_source,
    kernel_name,
)
from prefill_workers.pool_layout import (
    TORCH_DTYPES,
    HeadRange,
    KvScales,
    PoolLayoutError,
    RankPool,
    rank_shard,
)
from tests.megakernel.compilers import needs_compiler
from tests.megakernel.fake_cuda import FakeDriver, emulated
from tests.megakernel.test_cuda_build import needs_nvcc

SEEDS = st.integers(0, 2**63)
FP8 = torch.float8_e4m3fn
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


@functools.lru_cache(maxsize=1)
def emulation() -> Emulation:
    return build_emulation(export_source(PAIRS))


class Case:
    """A sequence's run of tokens in the pools of a group, whose values are bits at random: NaN, too."""

    def __init__(self, seed: int, pair: Pair) -> None:
        self.pair = pair
        self.dice = dice = random.Random(seed)
        self.random = np.random.default_rng(seed)
        self.num_heads = dice.choice([1, 2, 3, 4])
        self.num_ranks = dice.choice(
            [n for n in (1, 2, 3, 4, 8) if self.num_heads % n == 0 or n % self.num_heads == 0]
        )
        self.head_dim = dice.choice([1, 3, 4, 8, 16, 24, 48])
        self.tokens_per_block = dice.choice([1, 2, 5, 8])
        self.num_layers = dice.randint(1, 3)
        end = dice.randint(1, 3 * self.tokens_per_block)
        self.first = dice.randint(0, end)
        self.num_tokens = end - self.first
        num_needed = -(-end // self.tokens_per_block)
        self.num_blocks = num_needed + dice.randint(0, 2)
        self.block_ids = dice.sample(range(self.num_blocks), num_needed)
        self.offset = dice.choice([0, 0, 1, 8])
        """Values between an aligned address and the wire."""
        self.scales = KvScales(dice.choice([1.0, 0.37]), dice.choice([1.0, 2.5, 1e-3]))

    def bits(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        array = device_array(shape, f"u{dtype.itemsize}")
        array[...] = self.random.integers(0, 2 ** (8 * dtype.itemsize), shape, dtype=array.dtype)
        return torch.from_numpy(array.view(f"i{dtype.itemsize}")).view(dtype)

    def pool(self, heads: HeadRange, *, is_part: bool) -> tuple[torch.Tensor, RankPool]:
        """`is_part`: of a larger tensor, with other layers before its own."""
        values_a_block = heads.count * self.tokens_per_block * self.head_dim
        shape = (self.num_blocks, self.num_layers + is_part, 2, values_a_block)
        whole = self.bits(shape, TORCH_DTYPES[self.pair[0]])
        pool = RankPool(
            whole[:, 1:] if is_part else whole,
            heads=heads,
            head_dim=self.head_dim,
            tokens_per_block=self.tokens_per_block,
            scales=self.scales if whole.dtype == FP8 else None,
        )
        return whole, pool

    def wire(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The memory, and `[2, tokens, heads of the model, head_dim]` of it."""
        shape = (2, self.num_tokens, self.num_heads, self.head_dim)
        count = int(np.prod(shape))
        memory = self.bits((self.offset + count + 3,), TORCH_DTYPES[self.pair[1]])
        return memory, memory[self.offset : self.offset + count].view(shape)


def run(
    case: Case, whole: torch.Tensor, pool: RankPool, layer: int, memory: torch.Tensor, own: torch.Tensor
) -> Counts:
    ids = device_copy(case.block_ids, np.int64)
    arguments = export_arguments(
        pool,
        layer,
        torch.from_numpy(ids),
        case.first,
        own,
        ids_address=ids.ctypes.data,
        own_address=own.data_ptr(),
    )
    regions = [
        Region("pool", bits_of(whole).numpy()),
        Region("wire", bits_of(memory).numpy(), is_writable=True),
        Region("ids", ids),
    ]
    return emulation().run(
        kernel_name(case.pair),
        arguments,
        regions,
        num_blocks=case.dice.randint(1, 2),
        shared_bytes=0,
        threads_per_block=EXPORT_THREADS,
        seed=case.dice.getrandbits(32),
    )


def bits_of(values: torch.Tensor) -> torch.Tensor:
    return values.view(BITS[values.element_size()])


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit by bit; a NaN that was converted is any NaN."""
    differs = bits_of(found) != bits_of(expected)
    assert not (differs & ~(found.isnan() & expected.isnan())).any()


@needs_compiler
@pytest.mark.parametrize("pair", PAIRS, ids=kernel_name)
@settings(deadline=None, max_examples=60)
@given(seed=SEEDS)
def test_the_kernel_writes_what_a_read_does(pair: Pair, seed: int) -> None:
    """Rank by rank into one wire, of which nothing else changes."""
    case = Case(seed, pair)
    memory, wire = case.wire()
    expected = memory.clone()
    expected_wire = expected[case.offset :][: wire.numel()].view(wire.shape)
    layer = case.dice.randrange(case.num_layers)
    for rank in range(case.num_ranks):
        shard = rank_shard(rank, case.num_ranks, case.num_heads)
        if shard.is_exported:
            whole, pool = case.pool(shard.heads, is_part=case.dice.random() < 0.5)
            pool.read(layer, torch.tensor(case.block_ids), case.first, pool.own_heads(expected_wire))
            run(case, whole, pool, layer, memory, pool.own_heads(wire))
            if case.pair[0] == case.pair[1]:
                assert torch.equal(bits_of(memory), bits_of(expected))
            assert_same(memory, expected)


@needs_compiler
@pytest.mark.parametrize("pair", PAIRS, ids=kernel_name)
def test_aligned_heads_are_stored_by_16_bytes(pair: Pair) -> None:
    """Those of one rank of two, in a wire that begins anywhere in between."""
    case = Case(1, pair)
    case.num_heads, case.head_dim, case.tokens_per_block = 4, 64, 4
    case.first, case.num_tokens, case.num_blocks, case.block_ids = 3, 6, 3, [2, 0, 1]
    stores = {}
    for offset in (0, 1):
        case.offset = offset
        memory, wire = case.wire()
        whole, pool = case.pool(HeadRange(2, 4), is_part=False)
        stores[offset] = run(case, whole, pool, 0, memory, pool.own_heads(wire)).stores
    num_values = 2 * 6 * 2 * 64
    assert stores == {0: num_values * TORCH_DTYPES[pair[1]].itemsize // 16, 1: num_values}


@needs_compiler
def test_every_value_of_8_bits_is_right_with_scales() -> None:
    case = Case(2, ("float8_e4m3fn", "float32"))
    case.num_heads, case.head_dim, case.tokens_per_block, case.offset = 1, 128, 1, 0
    case.first, case.num_tokens, case.num_blocks, case.block_ids = 0, 2, 2, [1, 0]
    case.scales = KvScales(0.37, 1e-3)
    whole, pool = case.pool(HeadRange(0, 1), is_part=False)
    every = torch.arange(-128, 128, dtype=torch.int8).view(FP8).view(2, 1, 1, 128)
    whole[:, :1] = every.expand(2, 1, 2, 128)
    memory, wire = case.wire()
    run(case, whole, pool, 0, memory, wire)
    for part, scale in enumerate((0.37, 1e-3)):
        expected = every.float().flip(0).view(256) * torch.tensor(scale)
        assert_same(wire[part].reshape(256), expected)


@needs_compiler
def test_a_loaded_export_launches_its_kernel() -> None:
    """As a driver is asked to, with one of ours below."""
    pair: Pair = ("bfloat16", "float16")
    case = Case(3, pair)
    case.num_tokens = max(case.num_tokens, 1)
    memory, wire = case.wire()
    whole, pool = case.pool(HeadRange(0, case.num_heads), is_part=False)
    driver = FakeDriver(emulated(emulation()))
    ids = device_copy(case.block_ids, np.int64)
    for tensor in (bits_of(whole).numpy(), bits_of(memory).numpy(), ids):
        driver.memory[tensor.ctypes.data] = tensor
    export = PoolExport(pool, "float16", driver, Path())
    stream = driver.new_stream()
    before, expected = memory.clone(), torch.empty_like(wire)
    export.start(stream.handle, 0, torch.tensor(case.block_ids), torch.from_numpy(ids), case.first, wire)
    assert torch.equal(bits_of(memory), bits_of(before)), "nothing runs before the stream does"
    driver.synchronize(stream)
    pool.read(0, torch.tensor(case.block_ids), case.first, expected)
    assert_same(wire, expected)
    assert driver.launches[0][0] == "export_bfloat16_as_float16"


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_89", "sm_90"])
def test_kernels_compile_without_spills(architecture: str, tmp_path: Path) -> None:
    """And with registers to spare: an SM holds as many blocks as it has threads for."""
    build = build_cubin(export_source(PAIRS), architecture, folder=tmp_path).build
    assert {kernel.name for kernel in build.kernels} == {kernel_name(pair) for pair in PAIRS}
    assert not build.warnings
    assert not any(kernel.stack_bytes for kernel in build.kernels)
    check_resources(build, threads=EXPORT_THREADS, dynamic_shared_bytes=0, max_registers=40)


def test_what_a_kernel_cannot_read_or_write_is_refused() -> None:
    pool = RankPool(torch.zeros(3, 1, 2, 64), heads=HeadRange(0, 2), head_dim=4, tokens_per_block=8)
    driver = FakeDriver()
    export = PoolExport(pool, "float32", driver, Path())

    def start(own: torch.Tensor, block_ids: torch.Tensor, first: int = 0) -> None:
        export.start(0, 0, block_ids, block_ids, first, own)

    own, ids = torch.zeros(2, 7, 2, 4), torch.tensor([2, 1])
    with pytest.raises(PoolLayoutError, match=r"tokens \[10, 17\) are outside 2 blocks of 8"):
        start(own, ids, 10)
    with pytest.raises(PoolLayoutError, match="block 3 of a sequence is not among the pool's 3"):
        start(own, torch.tensor([2, 3]))
    with pytest.raises(PoolLayoutError, match=r"int32, expected int64"):
        start(own, ids.int())
    with pytest.raises(PoolLayoutError, match=r"float16, the kernel writes torch.float32"):
        start(own.half(), ids)
    with pytest.raises(PoolLayoutError, match=r"shape \[2, 7, 3, 4\], expected \[2, tokens, 2, 4\]"):
        start(torch.zeros(2, 7, 3, 4), ids)
    with pytest.raises(PoolLayoutError, match=r"strides \(8, 2\), expected \(4, 1\)"):
        start(torch.zeros(2, 7, 2, 8)[..., ::2], ids)
    assert driver.launches == []
