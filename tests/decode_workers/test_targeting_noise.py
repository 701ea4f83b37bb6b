"""Stochastic beams: how often items are drawn, against their probabilities."""

import itertools
import math
import random

import numpy as np
import pytest

from decode_workers.targeting import noise
from tests.decode_workers.targeting_support import END, Case, Model
from tests.decode_workers.test_targeting_search import FLAT, assert_same, start

PATHS = [(1, 2, END), (1, 3, END), (1, 3, 4, END), (2, END), (2, 5, END), (6, 7, 8, END)]
NUM_DRAWS = 400


def draws(case: Case, table, *, k: int, beams: int) -> list[tuple]:
    drawn = []
    for seed in range(NUM_DRAWS):
        search, driver = start(case, table, beams=beams, extra_slots=64, k=k, noise_seed=seed)
        driver.run(lambda: 64)
        drawn.append(tuple(path for path, _ in case.found(search)))
    return drawn


@pytest.mark.parametrize(
    ("scoring", "table", "beams"),
    [("catalogue", None, 2), ("catalogue", FLAT, 2), ("vocabulary", None, 6), ("vocabulary", FLAT, 6)],
)
def test_items_are_drawn_without_replacement_by_their_probabilities(scoring: str, table, beams: int) -> None:
    case = Case(PATHS, Model(3), scoring)
    weights = {path: math.exp(case.path_score(path)) for path in PATHS}
    total = sum(weights.values())
    drawn = draws(case, table, k=2, beams=beams)
    for first, second in itertools.permutations(PATHS, 2):
        expected = weights[first] / total * weights[second] / (total - weights[first])
        share = sum(draw == (first, second) for draw in drawn) / NUM_DRAWS
        assert abs(share - expected) < 4.5 * math.sqrt(expected * (1 - expected) / NUM_DRAWS) + 2 / NUM_DRAWS


def test_logprobs_are_told_without_the_noise_and_seeds_are_repeatable() -> None:
    case = Case(PATHS, Model(3), "vocabulary")
    orders = set()
    for seed in range(20):
        results = []
        for table in (None, FLAT):
            search, driver = start(case, table, beams=6, k=6, noise_seed=seed, extra_slots=64)
            driver.run(lambda: 64)
            results.append(case.found(search))
        assert_same(results[0], results[1])
        for path, logprob in results[0]:
            assert logprob == pytest.approx(case.path_score(path), abs=1e-9)
        orders.add(tuple(path for path, _ in results[0]))
    assert len(orders) > 5


def test_no_child_scores_above_its_parent_and_one_reaches_it() -> None:
    dice = np.random.default_rng(random.getrandbits(32))
    for seed in range(50):
        counts = dice.integers(1, 6, size=4)
        starts = np.concatenate([[0], np.cumsum(counts)])
        weights = dice.random(starts[-1]) + 1e-6
        logprobs = np.log(weights / np.repeat(np.add.reduceat(weights, starts[:-1]), counts))
        parent_scores = dice.normal(size=4) * 5
        scores = noise.perturbed(
            seed,
            parents=np.arange(4),
            parent_scores=parent_scores,
            parent_logprobs=-dice.random(4) * 5,
            edge_starts=starts,
            edge_nodes=np.arange(4, 4 + starts[-1]),
            edge_logprobs=logprobs,
        )
        assert np.maximum.reduceat(scores, starts[:-1]) == pytest.approx(parent_scores)
        assert (scores <= np.repeat(parent_scores, counts)).all()
