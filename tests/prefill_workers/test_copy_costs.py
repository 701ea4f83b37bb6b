"""Which way a piece is copied, by figures that are given."""

import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.kv_layout import KvLayout
from prefill_workers.copy_costs import CopyCosts, measure_copies
from prefill_workers.piece_copier import PieceCopier
from prefill_workers.pool_layout import HeadRange, RankPool

FIGURES = st.floats(0.0, 1e4)


class Bus:
    """Copies on a clock of its own: the host starts one, then it takes its time; seldom as fast as it can."""

    def __init__(self, start_us: float, besides_us: float, token_us: float) -> None:
        self.now_us = 0.0
        self.sizes: list[int] = []
        self._figures = start_us, besides_us, token_us
        self._dice = random.Random(0)

    def start(self, num_tokens: int):
        start_us, besides_us, token_us = self._figures
        self.sizes.append(num_tokens)
        delay = self._dice.choice([1, 1, 1, 7])
        self.now_us += start_us * delay

        def finish() -> None:
            self.now_us += besides_us + num_tokens * token_us

        return finish

    def clock_s(self) -> float:
        return self.now_us / 1e6


@pytest.mark.parametrize(
    ("start_us", "token_us", "tokens"),
    # An H200's: 28 us, and 44 GB/s of 4,096 bytes a token (Llama 3.1 8B), or of 2,048 (Llama 3.2 1B).
    [(28.0, 4096 / 44e3, 301), (17.0, 4096 / 44e3, 183), (20.0, 2048 / 44e3, 430), (0.0, 0.1, 1)],
)
def test_figures_choose_what_the_model_says(start_us: float, token_us: float, tokens: int) -> None:
    bus = Bus(start_us, 9.0, token_us)
    costs = measure_copies(bus.start, 10_000, bus.clock_s)
    assert costs.start_us == pytest.approx(start_us)
    assert costs.token_us == pytest.approx(token_us)
    assert costs.layerwise_tokens(32) == tokens
    assert set(bus.sizes) == {1024, 4096}


@given(start_us=FIGURES, token_us=FIGURES, num_layers=st.integers(2, 100))
def test_a_piece_goes_layerwise_from_where_that_saves_more_than_it_costs(
    start_us, token_us, num_layers
) -> None:
    shortest = CopyCosts(start_us=start_us, token_us=token_us).layerwise_tokens(num_layers)

    def is_better(num_tokens: int) -> bool:
        others = num_layers - 1
        return others * num_tokens * Fraction(token_us) > others * Fraction(start_us)

    if shortest is None:
        assert not is_better(1_000_000)
        return
    # The quotient of two floats is off by one in 2**53 at most.
    slack = math.ceil(shortest * 2**-52)
    assert is_better(shortest + slack)
    assert shortest <= 1 + slack or not is_better(shortest - 1 - slack)


def test_one_layer_is_copied_one_way() -> None:
    assert CopyCosts(start_us=0.0, token_us=1.0).layerwise_tokens(1) is None


def test_a_bus_that_takes_no_time_is_never_waited_for() -> None:
    bus = Bus(5.0, 3.0, 0.0)
    assert measure_copies(bus.start, 500, bus.clock_s).layerwise_tokens(16) is None


@pytest.mark.parametrize("start_us", [10.0, 60_000.0])
def test_it_is_over_soon(start_us: float) -> None:
    bus = Bus(start_us, 0.0, 1.0)
    measure_copies(bus.start, 4000, bus.clock_s)
    assert len(bus.sizes) <= 2 * 31
    assert bus.clock_s() < 0.2 or len(bus.sizes) == 2 * 4


@pytest.mark.parametrize("longest", [0, 1, 3, 4, 100])
def test_little_memory_does(longest: int) -> None:
    bus = Bus(5.2, 3.0, 0.5)
    tokens = measure_copies(bus.start, longest, bus.clock_s).layerwise_tokens(16)
    assert max(bus.sizes, default=0) <= longest
    assert tokens == (11 if longest >= 4 else None)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("num_blocks", [1, 40])
def test_measuring_reads_the_pool_and_writes_one_layer_of_the_staging_memory(num_blocks, num_ranks) -> None:
    layout = KvLayout(
        model_fingerprint="",
        num_layers=3,
        num_kv_heads=4,
        head_dim=8,
        dtype="float16",
        block_size_tokens=16,
    )
    heads = HeadRange(0, 4 // num_ranks)
    tensor = torch.randn(num_blocks, 3, 2, heads.count * 16 * 8).half()
    before = tensor.clone()
    staging = torch.full((5000 * layout.bytes_per_token_layer,), 7, dtype=torch.uint8)
    pool = RankPool(tensor, heads=heads, head_dim=8, tokens_per_block=16)
    costs = PieceCopier(pool, staging, layout).measure()
    assert costs.start_us > 0
    assert costs.token_us >= 0
    assert torch.equal(tensor, before)
    assert (staging[4096 * layout.bytes_per_token_layer :] == 7).all()
