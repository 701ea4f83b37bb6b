"""Growing one tree, and dividing rows among several, beside a search of all there are."""

import itertools
from collections.abc import Sequence as SequenceOf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.messages import Record
from cluster.placement.predict import StepTable
from decode_workers.draft_tree import NO_DRAFT, DraftTree, check_tree, node_depths
from decode_workers.drafting.budget import LEAST_GAIN, StepCosts, spend
from decode_workers.drafting.growth import Found, TreeGrowth
from decode_workers.drafting.place import Guess, Source
from decode_workers.drafting.rates import MOST_LIKELY, RateBook, Rates
from decode_workers.step_batch import NO_PARENT

Tries = dict[Source, "Scripted"]
Path = tuple[int, ...]


class Scripted(Record, frozen=True):
    """A source that guesses by a script: what may follow each path, with its share."""

    following: dict[Path, dict[int, float]]
    path: Path = ()

    @property
    def length(self) -> int:
        return 1 + len(self.path)

    def guesses(self) -> list[Guess]:
        return [
            Guess(token, share, Scripted(self.following, (*self.path, token)))
            for token, share in self.following.get(self.path, {}).items()
        ]


class Believed(Rates):
    """Rates that take every share as it is."""

    def rate(self, source: Source, length: int) -> float:
        return 1.0


@st.composite
def scripts(draw: st.DrawFn) -> Scripted:
    following: dict[Path, dict[int, float]] = {}
    paths: list[Path] = [()]
    for _ in range(draw(st.integers(0, 5))):
        path = draw(st.sampled_from(paths))
        tokens = draw(st.lists(st.integers(0, 3), unique=True, max_size=3))
        weights = [draw(st.integers(1, 20)) for _ in tokens]
        following[path] = {t: w / (sum(weights) + 3) for t, w in zip(tokens, weights, strict=True)}
        paths += [(*path, token) for token in tokens]
    return Scripted(following)


many = st.lists(scripts(), min_size=1, max_size=3)


def union(sources: SequenceOf[Scripted], max_depth: int, barred: frozenset[int]) -> dict[Path, float]:
    """Every path that some source guesses throughout, with its estimate."""
    estimates: dict[Path, float] = {}
    level: list[Path] = [()]
    while level:
        following: list[Path] = []
        for path in level:
            if len(path) == max_depth:
                continue
            chances: dict[int, float] = {}
            for one in sources:
                if all(path[i] in one.following.get(path[:i], {}) for i in range(len(path))):
                    for token, share in one.following.get(path, {}).items():
                        chances[token] = max(chances.get(token, 0.0), min(share, MOST_LIKELY))
            total = max(1.0, sum(chances.values()))
            for token, chance in chances.items():
                if token not in barred:
                    estimates[(*path, token)] = estimates.get(path, 1.0) * chance / total
                    following.append((*path, token))
        level = following
    return estimates


def paths_of(tree: DraftTree) -> list[Path]:
    paths: list[Path] = []
    for token, parent in zip(tree.token_ids, tree.parents, strict=True):
        paths.append((*(() if parent == NO_PARENT else paths[parent]), token))
    return paths


def growth_of(sources: SequenceOf[Scripted], **limits: object) -> TreeGrowth:
    found = [Found(source, one) for source, one in zip(Source, sources, strict=False)]
    return TreeGrowth(found, Believed(), **{"max_nodes": 99, "max_depth": 99, **limits})  # type: ignore[arg-type]


@given(many, st.integers(0, 8), st.integers(0, 4), st.frozensets(st.integers(0, 3), max_size=1))
def test_a_tree_is_the_likeliest_of_its_size(
    sources: list[Scripted], max_nodes: int, max_depth: int, barred: frozenset[int]
) -> None:
    growth = growth_of(sources, max_nodes=max_nodes, max_depth=max_depth, barred=barred)
    expected = union(sources, max_depth, barred)
    while growth.best > 0:
        growth.take()
    best = sorted(expected.values(), reverse=True)[:max_nodes]
    assert growth.estimates == pytest.approx(best)
    tree = growth.tree(len(growth.estimates))
    check_tree(tree, max_nodes)
    paths = paths_of(tree)
    assert len(set(paths)) == len(paths), "duplicates are merged"
    assert [expected[path] for path in paths] == pytest.approx(growth.estimates)
    assert all(depth <= max_depth for depth in node_depths(tree))


tables = st.lists(st.integers(1, 40), min_size=1, max_size=6).map(
    lambda rises: StepTable(
        rows=tuple(2**i for i in range(len(rises))), ms=tuple(itertools.accumulate(r / 4 for r in rises))
    )
)


@settings(max_examples=150)
@given(st.lists(many, min_size=1, max_size=3), st.integers(1, 7), st.integers(0, 2), tables)
def test_no_other_division_emits_more_a_millisecond(
    asked: list[list[Scripted]], max_drafted: int, num_forced: int, table: StepTable
) -> None:
    num_tokens, num_rows = len(asked), len(asked) + num_forced
    costs = StepCosts(table)
    ms = costs.beside(num_rows, max_drafted)
    trees = spend([growth_of(one) for one in asked], num_tokens, num_rows, max_drafted, costs)

    estimates = [sorted(union(one, 99, frozenset()).values(), reverse=True) for one in asked]
    sizes = [tree.num_nodes for tree in trees]
    assert sum(sizes) <= max_drafted

    def rate(counts: SequenceOf[int]) -> float:
        gain = sum(sum(own[:count]) for own, count in zip(estimates, counts, strict=True))
        return (num_tokens + gain) / ms[sum(counts)]

    every = itertools.product(*(range(min(len(own), max_drafted) + 1) for own in estimates))
    best = max(rate(counts) for counts in every if sum(counts) <= max_drafted)
    plain = num_tokens / ms[0]
    assert rate(sizes) == pytest.approx(best if best > LEAST_GAIN * plain else plain, rel=1e-6)


def test_nothing_is_drafted_where_rows_cost_more_than_they_bring() -> None:
    sure = Scripted({(): {1: 0.5}, (1,): {2: 0.5}})
    dear = StepTable(rows=(1, 2, 64), ms=(1.0, 2.0, 64.0))
    assert spend([growth_of([sure])], 1, 1, 8, StepCosts(dear)) == [NO_DRAFT]
    cheap = StepTable(rows=(1, 64), ms=(10.0, 10.5))
    assert spend([growth_of([sure])], 1, 1, 8, StepCosts(cheap))[0].token_ids == (1, 2)


def test_rates_follow_what_is_measured_and_forget() -> None:
    rates = Rates()
    before = rates.rate(Source.NGRAM, 3)
    for _ in range(200):
        rates.observe(Source.NGRAM, 3, 1.0, is_right=False)
    assert rates.rate(Source.NGRAM, 3) < 0.01
    assert rates.rate(Source.NGRAM, 2) != rates.rate(Source.NGRAM, 3)
    assert rates.rate(Source.HISTORY, 3) == Rates().rate(Source.HISTORY, 3)
    for _ in range(200):
        rates.observe(Source.NGRAM, 3, 1.0, is_right=True)
    assert rates.rate(Source.NGRAM, 3) > 0.97 > before
    # Guesses of half a chance that always come true are worth twice what they say.
    for _ in range(500):
        rates.observe(Source.HISTORY, 2, 0.5, is_right=True)
    assert rates.rate(Source.HISTORY, 2) == pytest.approx(2.0, rel=1e-3)


def test_campaigns_are_measured_apart_and_the_oldest_forgotten() -> None:
    book = RateBook(max_campaigns=2)
    book.of("t", "a").observe(Source.NGRAM, 3, 1.0, is_right=False)
    assert book.of("t", "a").rate(Source.NGRAM, 3) < book.of("t", "b").rate(Source.NGRAM, 3)
    book.of("t", "c")
    assert book.of("t", "a").rate(Source.NGRAM, 3) == book.of("t", "c").rate(Source.NGRAM, 3)
