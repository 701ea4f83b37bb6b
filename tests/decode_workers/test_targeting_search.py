"""Beam search and PTPV over random tries, against references that are written plainly and never prune."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.catalogue.trie import Trie
from cluster.messages import TargetingParams
from cluster.placement.predict import StepTable
from decode_workers.sampler import BadLogitsError
from decode_workers.step_batch import BoolArray
from decode_workers.targeting.forest import OutOfSlotsError
from decode_workers.targeting.ptpv import chunk_rows, nodes_at_once
from decode_workers.targeting.search import TargetingSearch
from decode_workers.targeting.slots import level_widths, slots_needed
from decode_workers.targeting.wanted import WantedTrie
from tests.decode_workers.targeting_support import END, Case, Driver, Model, params_of
from tests.decode_workers.tries import Path

FLAT = StepTable(rows=(1, 64), ms=(1.0, 1.0))
"""64 rows cost what one does: whatever is left is verified at once."""
CPU_LIKE = StepTable(rows=(1, 2, 4, 8, 16, 32, 64), ms=(2.4, 2.4, 2.4, 3.2, 5.8, 11.4, 22.0))
LINEAR = StepTable(rows=(1, 8, 64), ms=(1.0, 8.0, 64.0))
"""A row costs the same in any step: under `catalogue` scoring nodes run best first."""
SEEDS = st.integers(0, 2**63)


def search_over(
    trie: Trie, params: TargetingParams, mask: BoolArray | None, table: StepTable | None, num_slots: int
) -> TargetingSearch:
    wanted = WantedTrie(trie, mask, is_renormalised=params.scoring == "catalogue")
    return TargetingSearch(wanted, params, table, num_slots)


def random_case(dice: random.Random, *, max_items: int = 100, may_tie: bool = True) -> Case:
    """Long and short items, beginnings of each other, one alone; some filters want none."""
    num_items = dice.choice([count for count in (1, 2, 3, 5, 10, 30, 100) if count <= max_items])
    longest, vocab = dice.choice([1, 3, 8, 15]), dice.choice([2, 4, 20])
    paths: set[Path] = set()
    for _ in range(3 * num_items):
        if len(paths) == num_items:
            break
        begin: Path = ()
        if paths and dice.random() < 0.5:
            begin = dice.choice(sorted(paths))[:-1]
            begin = begin[: dice.randint(0, len(begin))]
        rest = tuple(dice.randint(1, vocab) for _ in range(dice.randint(0, longest)))
        paths.add((*begin, *rest, END))
    upload = sorted(paths)
    dice.shuffle(upload)
    scoring = dice.choice(["vocabulary", "catalogue"])
    resolution = None
    if may_tie:
        # Of a catalogue's softmax only equal logits tie for certain: others may, by rounding alone.
        resolution = dice.choice([None, None, 0, 2 if scoring == "vocabulary" else None])
    is_wanted = None
    if dice.random() < 0.5:
        share = dice.choice([0.1, 0.5, 0.9])
        is_wanted = [dice.random() < share for _ in upload]
    return Case(upload, Model(dice.getrandbits(32), resolution=resolution), scoring, is_wanted)


def catalogue_case(dice: random.Random) -> Case:
    while True:
        case = random_case(dice, may_tie=False)
        if case.scoring == "catalogue":
            return case


def some_rows(dice: random.Random, most: int | None = None):
    limit = most or dice.choice([1, 4, 30])
    return lambda: dice.randint(1, limit)


def start(case: Case, table: StepTable | None, *, beams: int, extra_slots: int = 0, **fields):
    capacity = slots_needed(level_widths(case.trie), beams, extra_slots)
    params = params_of(beams=beams, scoring=case.scoring, **fields)
    search = search_over(case.trie, params, case.mask, table, capacity)
    return search, Driver(case, search, capacity)


def run_until_parallel(driver: Driver, search: TargetingSearch) -> int:
    """One step a round. How many there were."""
    while not search.is_done and not search.went_parallel:
        driver.run(lambda: 10**6, driver.gives + 1)
    return driver.gives


def assert_same(found: list[tuple[Path, float]], expected: list[tuple[Path, float]]) -> None:
    assert [path for path, _ in found] == [path for path, _ in expected]
    logprobs = [logprob for _, logprob in found]
    assert logprobs == pytest.approx([logprob for _, logprob in expected], rel=0, abs=1e-9)


@settings(deadline=None, max_examples=500)
@given(SEEDS)
def test_stepwise_is_beam_search(seed: int) -> None:
    dice = random.Random(seed)
    case = random_case(dice)
    k, beams = dice.choice([1, 2, 5, 20]), dice.choice([1, 2, 5, 20])
    diversity = 0.0 if case.model.resolution is not None else dice.choice([0.0, 0.0, 0.5])
    search, driver = start(case, None, beams=beams, k=k, diversity=diversity)
    driver.run(some_rows(dice))
    finished, frontier = case.beam_search(beams)[-1]
    assert frontier == []
    assert_same(case.found(search), case.best(finished, k, diversity))
    assert search.result().is_complete
    assert not search.went_parallel


@settings(deadline=None, max_examples=500)
@given(SEEDS)
def test_parallel_is_exact_below_the_frontier_and_never_worse(seed: int) -> None:
    dice = random.Random(seed)
    case = random_case(dice)
    k, beams = dice.choice([1, 2, 5, 20]), dice.choice([1, 2, 5, 20])
    diversity = 0.0 if case.model.resolution is not None else dice.choice([0.0, 0.0, 0.5])
    table = dice.choice([FLAT, FLAT, CPU_LIKE])
    extra = dice.choice([0, 3, 64])
    search, driver = start(case, table, beams=beams, extra_slots=extra, k=k, diversity=diversity)
    num_rounds = run_until_parallel(driver, search)
    driver.run(some_rows(dice))
    rounds = case.beam_search(beams)
    stepwise = case.best(rounds[-1][0], k, diversity)
    if search.went_best_first:
        if not diversity:
            assert_never_worse(case.found(search), stepwise)
        return
    if not search.went_parallel:
        assert_same(case.found(search), stepwise)
        return
    verified, frontier = rounds[num_rounds - 1]
    below = {path: case.path_score(path) for _, prefix in frontier for path in case.below[prefix]}
    assert_same(case.found(search), case.best(verified | below, k, diversity))
    if not diversity:
        assert_never_worse(case.found(search), stepwise)


def assert_never_worse(found: list[tuple[Path, float]], stepwise: list[tuple[Path, float]]) -> None:
    assert len(found) >= len(stepwise)
    assert all(ours[1] >= theirs[1] - 1e-9 for ours, theirs in zip(found, stepwise, strict=False))


@pytest.mark.parametrize("count", [1, 2, 5])
@settings(deadline=None, max_examples=200)
@given(seed=SEEDS)
def test_best_first_is_never_worse_than_stepwise(count: int, seed: int) -> None:
    dice = random.Random(seed)
    case = catalogue_case(dice)
    k, beams, noise = dice.choice([1, 2, 5]), dice.choice([2, 5, 20]), dice.choice([None, None, 7])
    extra = dice.choice([0, 3, 64])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("decode_workers.targeting.search.nodes_at_once", lambda *_: count)
        search, driver = start(case, LINEAR, beams=beams, extra_slots=extra, k=k, noise_seed=noise)
    driver.run(some_rows(dice))
    stepwise, stepwise_driver = start(case, None, beams=beams, k=k, noise_seed=noise)
    stepwise_driver.run(some_rows(dice))
    found = case.found(search)
    if noise is None:
        assert_never_worse(found, case.found(stepwise))
        for path, logprob in found:
            assert logprob == pytest.approx(case.path_score(path), abs=1e-9)
    if count == 1 and search.decoding == "best_first":
        # One at a time, nodes run in the order of their scores, which no node that is found later beats.
        assert search.num_rows <= stepwise.num_rows


def chained_case(seed: int) -> Case:
    """Long chains beside short ones: beams of one round are of many depths."""
    dice = random.Random(seed)
    words: list[Path] = [(1,), (2,), *((3, *(9,) * length) for length in range(1, 7))]
    paths = {tuple(itertools.chain(*dice.choices(words, k=dice.randint(2, 5)), (END,))) for _ in range(60)}
    return Case(sorted(paths), Model(seed), "catalogue")


def test_best_first_begins_anew_round_by_round_where_slots_are_few(monkeypatch) -> None:
    """Wherever stepwise has enough."""
    monkeypatch.setattr("decode_workers.targeting.search.nodes_at_once", lambda *_: 1)
    begun_anew = 0
    for seed in range(12):
        case = chained_case(seed)
        for extra in itertools.count(0, -3):
            stepwise, driver = start(case, None, beams=2, extra_slots=extra, k=20)
            try:
                driver.run(lambda: 64)
            except OutOfSlotsError:
                break
            search, driver = start(case, LINEAR, beams=2, extra_slots=extra, k=20)
            while not search.is_done:
                was_best_first = search.went_best_first
                driver.run(lambda: 64, driver.gives + 1)
                begun_anew += was_best_first and not search.went_best_first
            assert_never_worse(case.found(search), case.found(stepwise))
    assert begun_anew > 0


@settings(deadline=None, max_examples=150)
@given(SEEDS, st.sampled_from([None, FLAT, CPU_LIKE, LINEAR]))
def test_with_beams_for_all_items_it_is_exhaustive(seed: int, table: StepTable | None) -> None:
    dice = random.Random(seed)
    case = random_case(dice, max_items=30)
    k = dice.choice([1, 5, 40])
    search, driver = start(case, table, beams=40, k=k)
    driver.run(some_rows(dice))
    assert_same(case.found(search), case.exhaustive(k))
    assert search.num_verified_items <= len(case.wanted)


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.sampled_from([None, FLAT, CPU_LIKE, LINEAR]))
def test_whenever_it_is_asked_it_has_items_with_their_own_scores(seed: int, table: StepTable | None) -> None:
    dice = random.Random(seed)
    case = random_case(dice)
    search, driver = start(case, table, beams=5, k=10)
    counted = []
    while True:
        found = case.found(search)
        counted.append(len(found))
        assert {path for path, _ in found} <= set(case.wanted)
        for path, logprob in found:
            assert logprob == pytest.approx(case.path_score(path), abs=1e-9)
        assert found == case.best(dict(found), 10)
        assert search.result().is_complete == search.is_done
        if search.is_done:
            break
        driver.run(some_rows(dice), driver.gives + 1)
    assert counted == sorted(counted)
    assert len({path for path, _ in found}) == len(found)


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.sampled_from([None, FLAT, LINEAR]), st.sampled_from([None, 7]))
def test_how_rows_are_cut_into_steps_changes_no_bit(seed: int, table: StepTable | None, noise: int | None):
    case = random_case(random.Random(seed))
    results = []
    for most in (1, 3, 1000):
        dice = random.Random(seed)
        search, driver = start(case, table, beams=5, k=5, noise_seed=noise, extra_slots=dice.choice([0, 64]))
        driver.run(some_rows(dice, most))
        results.append((search.result().items.tolist(), search.result().logprobs.tolist()))
    assert results[0] == results[1] == results[2]


def test_ties_go_to_the_earlier_upload() -> None:
    paths = [(token, END) for token in (5, 3, 9, 1, 7)]
    for table in (None, FLAT):
        case = Case(paths, Model(0, resolution=0), "catalogue")
        search, driver = start(case, table, beams=3, k=3)
        driver.run(lambda: 64)
        assert [path for path, _ in case.found(search)] == paths[:3]


@pytest.mark.parametrize("scoring", ["vocabulary", "catalogue"])
def test_where_nothing_is_wanted_nothing_runs(scoring: str) -> None:
    case = Case([(1, END), (2, END)], Model(0), scoring, [False, False])
    search, _ = start(case, None, beams=2, k=2)
    assert search.is_done
    assert search.result().is_complete
    assert case.found(search) == []
    assert search.num_steps == search.num_rows == search.num_verified_items == 0


def test_of_a_single_item_only_the_vocabulary_has_something_to_say() -> None:
    paths = [(1, 2, END), (1, 3, END)]
    search, _ = start(case := Case(paths, Model(0), "catalogue", [False, True]), None, beams=2, k=2)
    assert search.is_done
    assert case.found(search) == [(paths[1], 0.0)]
    assert search.num_steps == 0
    search, driver = start(case := Case(paths, Model(0), "vocabulary", [False, True]), None, beams=2, k=2)
    driver.run(lambda: 4)
    assert_same(case.found(search), [(paths[1], case.path_score(paths[1]))])
    assert search.num_steps == search.num_rows == 3


def test_under_catalogue_scoring_a_chain_to_one_item_never_runs() -> None:
    case = Case([(1, 4, 4, 4, 4, END), (2, 5, END), (3, END)], Model(0), "catalogue")
    search, driver = start(case, None, beams=3, k=3)
    driver.run(lambda: 64)
    assert (search.num_steps, search.num_rows, search.num_verified_items) == (1, 1, 3)


def test_under_catalogue_scoring_a_chain_to_several_runs_at_once() -> None:
    case = Case([(1, 4, 4, 4, 5, END), (1, 4, 4, 4, 6, END), (2, END)], Model(0), "catalogue")
    for table in (None, FLAT):
        search, driver = start(case, table, beams=3, extra_slots=64, k=3)
        driver.run(lambda: 64)
        # The root, then the chain: 1, 4, 4, and the 4 whose children are told apart.
        assert (search.num_steps, search.num_rows) == (2, 5)
        assert not search.went_parallel, "one round is left either way"


def test_parallel_takes_one_step_where_rows_are_cheap() -> None:
    paths = [(brand, *rest, END) for brand in (1, 2) for rest in itertools.product((3, 4), (5, 6), (7, 8))]
    case = Case(paths, Model(1), "vocabulary")
    steps = {}
    dear = StepTable(rows=(1, 64), ms=(0.35, 22.0))
    for name, table in (("none", None), ("flat", FLAT), ("cheap to 4 rows", CPU_LIKE), ("dear", dear)):
        search, driver = start(case, table, beams=2, extra_slots=64, k=2)
        driver.run(lambda: 64)
        steps[name] = (search.num_steps, search.num_rows, search.went_parallel)
        if name == "flat":
            assert search.num_verified_items == len(paths)
    assert steps == {
        "none": (5, 9, False),
        "flat": (2, 31, True),
        "cheap to 4 rows": (3, 17, True),
        "dear": (5, 9, False),
    }


@pytest.mark.parametrize("most_rows", [1, 5, 16])
@pytest.mark.parametrize("extra_slots", [0, 5, 12])
def test_the_fewest_slots_are_enough_for_a_wide_trie(most_rows: int, extra_slots: int, monkeypatch) -> None:
    """Nothing is pruned, and parallel runs where it would never be predicted to pay."""

    def always(wanted, frontier, *_args, **_kwargs):
        return wanted.all_below(frontier.nodes, 10**6)

    monkeypatch.setattr("decode_workers.targeting.search.plan_parallel", always)
    paths = [(*path, END) for path in itertools.product((1, 2), repeat=6)]
    for seed in range(5):
        case = Case(paths, Model(seed), "vocabulary")
        search, driver = start(case, FLAT, beams=2, extra_slots=extra_slots, k=200)
        driver.run(lambda: most_rows)
        assert search.went_parallel
        assert len(case.found(search)) == len(paths)
        assert search.num_rows == 2**7 - 1


def test_a_chunk_is_as_large_as_pays() -> None:
    assert chunk_rows(FLAT) == 64
    assert chunk_rows(CPU_LIKE) == 16
    assert chunk_rows(StepTable(rows=(1, 2, 4), ms=(1.0, 2.0, 4.0))) == 1
    assert chunk_rows(StepTable(rows=(1, 8), ms=(0.0, 0.0))) == 1


def test_nodes_run_together_as_far_as_that_makes_them_cheaper() -> None:
    assert nodes_at_once(FLAT, 20) == 20
    assert nodes_at_once(LINEAR, 20) == 8
    assert nodes_at_once(CPU_LIKE, 20) == 8
    assert nodes_at_once(CPU_LIKE, 64) == 16
    assert nodes_at_once(CPU_LIKE, 4) == 4
    l20 = StepTable(rows=(1, 2, 4, 8, 16, 32, 64), ms=(0.40, 0.40, 0.41, 0.42, 0.53, 0.69, 1.01))
    assert nodes_at_once(l20, 20) == 20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers_are_refused(value: float) -> None:
    case = Case([(1, END), (2, END)], Model(0), "vocabulary")
    search, _ = start(case, None, beams=2, k=2)
    rows = search.root_ask()
    bad, good = np.array([0, value], dtype=np.float32), np.zeros(2, dtype=np.float32)
    with pytest.raises(BadLogitsError, match="allowed logit 1"):
        search.give(rows, bad, np.zeros(1, dtype=np.float32))
    with pytest.raises(BadLogitsError, match="log-sum-exp of row 0"):
        search.give(rows, good, bad[1:])


def test_what_cannot_be_searched_is_refused() -> None:
    case = Case([(1, 2, END), (2, 3, END)], Model(0), "vocabulary")
    for fields, message in (
        ({"k": 0}, "k is 0"),
        ({"k": 1, "beams": 0}, "beams 0"),
        ({"k": 1, "diversity": -1.0}, "diversity is -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            search_over(case.trie, params_of(scoring="vocabulary", **fields), None, None, 8)
    with pytest.raises(ValueError, match="2 items"):
        search_over(case.trie, params_of(k=1), np.ones(3, dtype=np.bool_), None, 8)
    search = search_over(case.trie, params_of(k=1, beams=2), None, None, 1)
    search.give(search.root_ask(), np.zeros(2, dtype=np.float32), np.ones(1, dtype=np.float32))
    with pytest.raises(OutOfSlotsError, match="2 rows need slots, 1 of 1"):
        search.take(2)
