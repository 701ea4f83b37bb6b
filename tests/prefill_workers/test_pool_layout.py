"""KV from a rank's pool to the wire and back, against loops over single values."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.kv_layout import KvLayout
from prefill_workers.pool_layout import (
    TORCH_DTYPES,
    KvScales,
    PoolLayoutError,
    RankPool,
    new_wire,
    rank_shard,
    wire_dtype,
)

SEEDS = st.integers(0, 2**63)
FP8 = torch.float8_e4m3fn


class Case:
    """A model's KV over the pools of a tensor-parallel group, and a sequence in scattered blocks."""

    def __init__(self, seed: int, pool_dtype: torch.dtype, num_heads: int | None = None) -> None:
        self.dice = random.Random(seed)
        self.pool_dtype = pool_dtype
        self.num_heads = num_heads or self.dice.choice([1, 2, 3, 4, 8])
        self.head_dim = self.dice.choice([4, 8, 64])
        self.tokens_per_block = self.dice.choice([1, 2, 8, 32, 64])
        self.num_layers = self.dice.randint(1, 3)
        self.num_tokens = self.dice.randint(1, 3 * self.tokens_per_block + 5)
        num_needed = -(-self.num_tokens // self.tokens_per_block)
        self.num_blocks = num_needed + self.dice.randint(0, 4)
        self.block_ids = torch.tensor(self.dice.sample(range(self.num_blocks), num_needed))
        self.values = torch.Generator().manual_seed(self.dice.getrandbits(31))
        self.scales = KvScales(self.dice.choice([1.0, 0.37]), self.dice.choice([1.0, 2.5]))

    def num_ranks(self) -> int:
        return self.dice.choice(
            [n for n in (1, 2, 3, 4, 8, 16) if self.num_heads % n == 0 or n % self.num_heads == 0]
        )

    def pools(self, num_ranks: int, *, is_filled: bool) -> list[torch.Tensor]:
        pools = []
        for rank in range(num_ranks):
            count = rank_shard(rank, num_ranks, self.num_heads).heads.count
            shape = (self.num_blocks, self.num_layers, 2, count * self.tokens_per_block * self.head_dim)
            pool = torch.randn(shape, generator=self.values) if is_filled else torch.zeros(shape)
            pools.append(pool.to(self.pool_dtype))
        return pools

    def open(self, pool: torch.Tensor, rank: int, num_ranks: int) -> RankPool:
        return RankPool(
            pool,
            heads=rank_shard(rank, num_ranks, self.num_heads).heads,
            head_dim=self.head_dim,
            tokens_per_block=self.tokens_per_block,
            scales=self.scales if self.pool_dtype == FP8 else None,
        )

    def layout(self, dtype: str) -> KvLayout:
        return KvLayout(
            model_fingerprint="m",
            num_layers=self.num_layers,
            num_kv_heads=self.num_heads,
            head_dim=self.head_dim,
            dtype=dtype,
            block_size_tokens=16,
        )

    def token_range(self) -> tuple[int, int]:
        first = self.dice.randint(0, self.num_tokens)
        return first, self.dice.randint(first, self.num_tokens)

    def read_all(
        self,
        pools: list[torch.Tensor],
        layer: int,
        first: int,
        end: int,
        dtype: str,
        block_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        wire = new_wire(self.layout(dtype), end - first)
        for rank, pool in enumerate(pools):
            if rank_shard(rank, len(pools), self.num_heads).is_exported:
                opened = self.open(pool, rank, len(pools))
                blocks = self.block_ids if block_ids is None else block_ids
                opened.read(layer, blocks, first, opened.own_heads(wire))
        return wire


def value_by_value(
    case: Case, pools: list[torch.Tensor], layer: int, first: int, end: int, dtype: str
) -> torch.Tensor:
    """By a pool's documented order alone, one value at a time."""
    wire = torch.zeros(2, end - first, case.num_heads, case.head_dim, dtype=wire_dtype(dtype))
    per_rank = pools[0].shape[3] // (case.tokens_per_block * case.head_dim)
    for part, token, head, at in itertools.product(
        range(2), range(first, end), range(case.num_heads), range(case.head_dim)
    ):
        rank = head // per_rank if len(pools) <= case.num_heads else head * len(pools) // case.num_heads
        block = int(case.block_ids[token // case.tokens_per_block])
        within = token % case.tokens_per_block
        own_head = head % per_rank
        place = (own_head * case.tokens_per_block + within) * case.head_dim + at
        value = pools[rank][block, layer, part, place].float()
        if case.pool_dtype == FP8:
            value = value * (case.scales.value if part else case.scales.key)
        wire[part, token - first, head, at] = value
    return wire


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("pool_dtype", list(TORCH_DTYPES))
@settings(deadline=None, max_examples=8)
@given(seed=SEEDS)
def test_a_read_is_every_value_in_its_place(pool_dtype: str, dtype: str, seed: int) -> None:
    case = Case(seed, TORCH_DTYPES[pool_dtype], num_heads=random.Random(seed).choice([1, 2, 4]))
    case.head_dim = 4
    pools = case.pools(case.num_ranks(), is_filled=True)
    layer = case.dice.randrange(case.num_layers)
    first, end = case.token_range()
    wire = case.read_all(pools, layer, first, end, dtype)
    assert torch.equal(wire, value_by_value(case, pools, layer, first, end, dtype))


@pytest.mark.parametrize("pool_dtype", ["float16", "bfloat16", "float32"])
@settings(deadline=None, max_examples=200)
@given(seed=SEEDS)
def test_there_and_back_over_other_ranks_is_exact(pool_dtype: str, seed: int) -> None:
    """From one group's pools to those of another size: shards are merged and split again."""
    case = Case(seed, TORCH_DTYPES[pool_dtype])
    first, end = case.token_range()
    source, target = (
        case.pools(case.num_ranks(), is_filled=True),
        case.pools(case.num_ranks(), is_filled=False),
    )
    block_ids = torch.tensor(case.dice.sample(range(case.num_blocks), len(case.block_ids)))
    for layer in range(case.num_layers):
        wire = case.read_all(source, layer, first, end, pool_dtype)
        for rank, pool in enumerate(target):
            opened = case.open(pool, rank, len(target))
            opened.write(layer, block_ids, first, opened.own_heads(wire))
    for layer in range(case.num_layers):
        back = case.read_all(target, layer, first, end, pool_dtype, block_ids)
        assert torch.equal(back, case.read_all(source, layer, first, end, pool_dtype))
    others = torch.ones(case.num_blocks, dtype=torch.bool)
    others[block_ids] = False
    assert not any(pool[others].float().any() for pool in target), "other sequences' blocks were written"


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS)
def test_eight_bits_are_off_by_their_rounding_alone(seed: int) -> None:
    """E4M3 has 3 bits of mantissa: a normal value is off by at most 1/16 of itself; below 2**-6 by 2**-10."""
    case = Case(seed, FP8)
    layout = case.layout("bfloat16")
    wire = torch.randn(new_wire(layout, case.num_tokens).shape, generator=case.values).to(torch.bfloat16)
    pools = case.pools(case.num_ranks(), is_filled=False)
    for rank, pool in enumerate(pools):
        opened = case.open(pool, rank, len(pools))
        opened.write(0, case.block_ids, 0, opened.own_heads(wire))
    back = case.read_all(pools, 0, 0, case.num_tokens, "bfloat16")
    for part, scale in enumerate((case.scales.key, case.scales.value)):
        error = (back[part].float() - wire[part].float()).abs()
        # bfloat16 rounds once more, by 1/256.
        bound = wire[part].float().abs() * (1 / 16 + 1 / 128) + 2**-10 * scale
        assert (error <= bound).all()


@pytest.mark.parametrize(
    ("num_heads", "num_ranks", "expected"),
    [
        (4, 1, [(0, 4, True)]),
        (4, 2, [(0, 2, True), (2, 4, True)]),
        (2, 4, [(0, 1, True), (0, 1, False), (1, 2, True), (1, 2, False)]),
        (1, 2, [(0, 1, True), (0, 1, False)]),
    ],
)
def test_heads_are_dealt_out(num_heads: int, num_ranks: int, expected: list[tuple[int, int, bool]]) -> None:
    shards = [rank_shard(rank, num_ranks, num_heads) for rank in range(num_ranks)]
    assert [(shard.heads.start, shard.heads.end, shard.is_exported) for shard in shards] == expected


def test_what_cannot_be_laid_out_is_refused() -> None:
    with pytest.raises(PoolLayoutError, match="3 KV heads over 2 ranks"):
        rank_shard(0, 2, 3)
    with pytest.raises(PoolLayoutError, match="rank 2 of 2"):
        rank_shard(2, 2, 4)
    heads = rank_shard(0, 1, 2).heads
    with pytest.raises(PoolLayoutError, match=r"shape \[4, 1, 2, 7\], expected \[blocks, layers, 2, 64\]"):
        RankPool(torch.zeros(4, 1, 2, 7), heads=heads, head_dim=4, tokens_per_block=8)
    with pytest.raises(PoolLayoutError, match="int8, known are"):
        RankPool(torch.zeros(4, 1, 2, 64, dtype=torch.int8), heads=heads, head_dim=4, tokens_per_block=8)
    with pytest.raises(PoolLayoutError, match="scales are for"):
        RankPool(torch.zeros(4, 1, 2, 64), heads=heads, head_dim=4, tokens_per_block=8, scales=KvScales())
    pool = RankPool(torch.zeros(4, 1, 2, 64), heads=heads, head_dim=4, tokens_per_block=8)
    with pytest.raises(PoolLayoutError, match=r"tokens \[10, 17\) are outside 2 blocks of 8"):
        pool.read(0, torch.tensor([3, 1]), 10, torch.zeros(2, 7, 2, 4))
