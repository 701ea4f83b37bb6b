"""Targeting through the engine and a compiled model equals brute force, and is never worse where it verified
more: the acceptance of exactness, on a toy model of random weights.
"""

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path as FilePath

import numpy as np
import pytest
import torch

from cluster.placement.predict import StepTable
from decode_workers.megakernel_executor import MegaKernelExecutor
from megakernel.build import BuildError, find_compiler
from megakernel.reference import reference_logits
from tests.decode_workers.brute_force import TOLERANCE, BruteForce, is_same
from tests.decode_workers.plain_model import PlainLlama
from tests.decode_workers.random_catalogues import SHAPES, random_texts
from tests.decode_workers.support import EOS, VOCAB_SIZE
from tests.decode_workers.targeting_rig import TargetingRig, toy_executor, toy_weights

ROWS_COST_LITTLE = StepTable(rows=(1, 64), ms=(1.0, 1.01))
WIDTHS = ((20, 20), (20, 20), (5, 20), (1, 1), (3, 4), (10, 32))
"""k and beams."""

try:
    find_compiler()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def plain() -> PlainLlama:
    torch.set_num_threads(1)  # its matrices are so small that threads only wait for each other
    return PlainLlama(toy_weights())


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MegaKernelExecutor]:
    made = toy_executor(tmp_path_factory.mktemp("library"))
    yield made
    made.close()


def test_the_plain_model_is_the_oracle_in_float64(plain: PlainLlama) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, VOCAB_SIZE, length).tolist() for length in (1, 17, 60)]
    for text, logits in zip(texts, plain.logits(texts), strict=True):
        ours = logits[: len(text)].numpy()
        np.testing.assert_allclose(ours, reference_logits(toy_weights(), text), atol=1e-4)


def test_targeting_equals_brute_force(executor, plain, tmp_path, record_figure) -> None:
    sizes = [1, 10, 12, 40, 100, 300, 1_000, 3_000]
    counts = _check(_plan(sizes, 48, seed=1), executor, plain, tmp_path)
    record_figure(_line(counts))
    assert counts["contexts"] == 48


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_targeting_equals_brute_force_a_thousand_times(executor, plain, tmp_path, record_figure) -> None:
    dice = random.Random(2)
    sizes = [1, 10, 100_000, 100_000, *(int(10 ** dice.uniform(1, 4.5)) for _ in range(36))]
    counts = _check(_plan(sizes, 1_000, seed=2), executor, plain, tmp_path)
    record_figure(_line(counts))
    assert counts["contexts"] == 1_000


def _plan(sizes: list[int], num_contexts: int, seed: int) -> list[tuple[tuple[str, ...], int, int]]:
    """Catalogues, how many contexts each is asked for, and a seed. Shapes take turns."""
    dice = random.Random(seed)
    shapes = [SHAPES[place % len(SHAPES)] for place in range(len(sizes))]
    for place, size in enumerate(sizes):
        if size > 20_000:
            shapes[place] = ("words", "numbers")[place % 2]
    shares = [num_contexts // len(sizes) + (p < num_contexts % len(sizes)) for p in range(len(sizes))]
    return [
        (random_texts(dice, shape, size), share, dice.getrandbits(32))
        for shape, size, share in zip(shapes, sizes, shares, strict=True)
    ]


def _check(
    plan: list[tuple[tuple[str, ...], int, int]],
    executor: MegaKernelExecutor,
    plain: PlainLlama,
    folder: FilePath,
) -> Counter[str]:
    counts: Counter[str] = Counter()
    for place, (texts, num_contexts, seed) in enumerate(plan):
        dice = random.Random(seed)
        own_folder = folder / str(place)
        own_folder.mkdir()
        rig = TargetingRig(texts, own_folder, executor)
        for _ in range(num_contexts):
            context = [dice.randrange(EOS) for _ in range(dice.randint(1, 16))]
            k, beams = dice.choice(WIDTHS)
            scoring = dice.choice(("vocabulary", "catalogue"))
            brute = BruteForce(plain, context, rig.sets, scoring)
            _check_one(rig, brute, counts, k=k, beams=beams, scoring=scoring)
    return counts


def _check_one(rig: TargetingRig, brute: BruteForce, counts: Counter[str], k: int, beams: int, scoring: str):
    context = list(brute.context)
    stepwise = rig.ask(context, None, k=k, beams=beams, scoring=scoring)
    parallel = rig.ask(context, ROWS_COST_LITTLE, k=k, beams=beams, scoring=scoring)
    assert stepwise.decoding != "parallel"
    rankings = brute.beam_search(k, beams)
    found = rig.found(stepwise)
    assert any(is_same(found, ranking, k) for ranking in rankings), (found, rankings[0][: k + 1])
    counts["contexts"] += 1
    counts["nearly tied beams"] += len(rankings) > 1
    if parallel.decoding != "parallel":
        counts["PTPV did not pay"] += 1
        assert parallel.items == stepwise.items
        return
    verified = rig.found(parallel)
    true_scores = brute.scores([path for _, path in verified])
    assert np.abs(np.subtract([score for score, _ in verified], true_scores)).max() < TOLERANCE
    if parallel.num_verified_items == len(rig.sets.paths):
        counts["PTPV verified all"] += 1
        assert is_same(verified, brute.ranking_of_all(), k)
    if is_same(verified, found, k):
        counts["PTPV equal"] += 1
        return
    # Where it is not equal it is better, at no place worse.
    gains = np.array(true_scores[: len(found)]) - [score for score, _ in found]
    assert len(verified) >= len(found)
    assert gains.min(initial=0.0) > -TOLERANCE, gains
    assert len(verified) > len(found) or gains.max() > TOLERANCE
    counts["PTPV better"] += 1


def _line(counts: Counter[str]) -> str:
    return "targeting against brute force: " + ", ".join(f"{name} {n}" for name, n in sorted(counts.items()))
