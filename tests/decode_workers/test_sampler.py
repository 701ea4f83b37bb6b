import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.messages import SamplingParams
from decode_workers.philox import philox4x32
from decode_workers.sampler import BadLogitsError, gumbel, sample, with_logprobs
from tests.decode_workers.support import drawn, greedy

# From the known-answer file of the Random123 distribution: philox4x32, 10 rounds.
KNOWN_ANSWERS = [
    ((0x00000000,) * 4, 0x0000000000000000, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple[int, ...], key: int, words: tuple[int, ...]) -> None:
    counters = np.array([counter], dtype=np.uint32).T
    assert philox4x32(counters, key)[:, 0].tolist() == list(words)
    # Among thousands of others, over the edge of a chunk.
    many = np.tile(np.arange(9000, dtype=np.uint32), (4, 1))
    many[:, 4095:4097] = counters
    assert philox4x32(many, key)[:, 4095].tolist() == list(words)
    assert philox4x32(many, key)[:, 4096].tolist() == list(words)


def row_of(*logits: float) -> np.ndarray:
    return np.array(logits, dtype=np.float32)


def random_row(seed: int, size: int = 300) -> np.ndarray:
    # Rounded, so that equal logits are common.
    return (np.random.default_rng(seed).standard_normal(size) * 3).round(1).astype(np.float32)


def allowed(row: np.ndarray, params: SamplingParams) -> set[int]:
    """The filters as their definition says, one after the other, on a sorted list."""
    order = sorted(range(row.size), key=lambda i: (-row[i], i))
    if params.top_k:
        order = order[: params.top_k]
    weights = [math.exp((float(row[i]) - float(row[order[0]])) / params.temperature) for i in order]
    total, reached, kept = sum(weights), 0.0, 0
    while kept < len(order) and (kept == 0 or reached < params.top_p * total):
        reached += weights[kept]
        kept += 1
    if params.top_p < 1:
        order, weights = order[:kept], weights[:kept]
    return {i for i, weight in zip(order, weights, strict=True) if weight >= params.min_p * weights[0]}


params_strategy = st.builds(
    lambda temperature, top_k, top_p, min_p, seed: drawn(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    ),
    st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    st.sampled_from([0, 1, 2, 7, 40, 1000]),
    st.sampled_from([0.01, 0.3, 0.9, 0.99, 1.0]),
    st.sampled_from([0.0, 0.013, 0.31, 1.0]),
    st.integers(0, 2**64 - 1),
)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1000), params_strategy)
def test_draws_stay_within_the_filters(row_seed: int, params: SamplingParams) -> None:
    row = random_row(row_seed)
    support = allowed(row, params)
    assert {sample(row, params, index) for index in range(20)} <= support


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1000), params_strategy, st.integers(0, 2**31))
def test_filters_do_not_disturb_the_noise(row_seed: int, params: SamplingParams, index: int) -> None:
    # The token is the best of logit / T + noise among the allowed, whoever else is a candidate.
    row = random_row(row_seed)
    every = np.arange(row.size)
    scores = row.astype(np.float64) / params.temperature + gumbel(params.seed, index, every)
    best = max(allowed(row, params), key=lambda i: (scores[i], -i))
    assert sample(row, params, index) == best


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.sets(st.integers(0, 50_000), min_size=1, max_size=50),
)
def test_noise_is_a_function_of_seed_index_and_token(seed: int, index: int, ids: set[int]) -> None:
    token_ids = np.array(sorted(ids))
    some = gumbel(seed, index, token_ids)
    every = gumbel(seed, index, np.arange(int(token_ids[-1]) + 1))
    assert some.tolist() == every[token_ids].tolist()
    assert np.isfinite(every).all()


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 5.0])
def test_a_large_vocabulary_is_screened_without_changing_a_token(scale: float) -> None:
    row = (np.random.default_rng(5).standard_normal(20_000) * scale).astype(np.float32)
    row[:50] = -np.inf
    params = drawn(temperature=0.9, seed=11)
    for index in range(60):
        scores = row.astype(np.float64) / 0.9 + gumbel(params.seed, index, np.arange(row.size))
        assert sample(row, params, index) == int(scores.argmax())


def test_draws_follow_softmax() -> None:
    row, draws = row_of(1.0, 0.0, -1.0, 2.0, 0.5, 0.5), 20_000
    params = drawn(temperature=0.8, seed=99)
    expected = np.exp(row / 0.8) / np.exp(row / 0.8).sum() * draws
    counts = np.bincount([sample(row, params, index) for index in range(draws)], minlength=row.size)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 20.5, "p < 0.001 for 5 degrees of freedom"


def test_draws_of_different_seeds_and_indices_are_independent() -> None:
    row, draws = row_of(0.0, 0.0), 4_000
    by_seed = np.array([sample(row, drawn(seed=seed), 3) for seed in range(draws)])
    by_index = np.array([sample(row, drawn(seed=3), index) for index in range(draws)])
    for bits in (by_seed, by_index):
        assert abs(bits.mean() - 0.5) < 0.04
        assert abs((bits[1:] == bits[:-1]).mean() - 0.5) < 0.04


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    assert sample(row_of(1, 5, 5, 2), greedy(), 0) == 1


def test_top_k_takes_the_lowest_ids_of_equals() -> None:
    row = row_of(0, 1, 1, 1, 1)
    assert {sample(row, drawn(top_k=2, seed=seed), 0) for seed in range(64)} == {1, 2}


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-320])
def test_any_small_temperature_is_greedy(temperature: float) -> None:
    row = random_row(3)
    row[17] = 50
    assert sample(row, drawn(temperature=temperature), 0) == 17


def test_minus_infinity_is_never_drawn() -> None:
    row = row_of(-math.inf, 0.0, -math.inf, 0.0)
    assert {sample(row, drawn(temperature=5.0, seed=s), 0) for s in range(50)} == {1, 3}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [greedy(), drawn(), drawn(top_p=0.5), drawn(top_k=3)])
def test_bad_logits_name_the_token(bad: float, params: SamplingParams) -> None:
    row = random_row(1)
    row[7] = bad
    with pytest.raises(BadLogitsError, match="token 7"):
        sample(row, params, 0)


def test_all_minus_infinity_is_refused() -> None:
    with pytest.raises(BadLogitsError):
        sample(row_of(-math.inf, -math.inf), drawn(), 0)


@given(st.integers(0, 200), st.integers(0, 8), st.integers(0, 299))
def test_logprobs_are_log_softmax_of_the_raw_logits(row_seed: int, num_top: int, token_id: int) -> None:
    row = random_row(row_seed)
    exact = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
    emitted = with_logprobs(row, token_id, num_top)
    assert emitted.logprob == pytest.approx(exact[token_id], abs=1e-6)
    ranked = sorted(range(row.size), key=lambda i: (-row[i], i))[:num_top]
    assert [top.token_id for top in emitted.top_logprobs] == ranked
    assert [top.logprob for top in emitted.top_logprobs] == pytest.approx(exact[ranked].tolist(), abs=1e-6)
