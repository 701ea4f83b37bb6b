"""Each source of drafts beside a search that scans the whole text."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode_workers.drafting import phrases as phrases_module
from decode_workers.drafting.history import (
    CAMPAIGN_NODES,
    DEPTH,
    LEAST_NODES,
    SHORTEST,
    UNSEEN,
    History,
    HistoryPlace,
    HistoryWriter,
)
from decode_workers.drafting.ngrams import LONGEST, MOST_COUNTED, NgramIndex
from decode_workers.drafting.ngrams import SHORTEST as SHORTEST_NGRAM
from decode_workers.drafting.phrases import PhraseBook, PhraseTrie, TooManyPhrasesError
from decode_workers.drafting.place import Place
from decode_workers.drafting.suffix_trie import NONE, ROOT, START, SuffixTrie

texts = st.lists(st.integers(0, 3), max_size=60)
pieces = st.lists(st.lists(st.integers(0, 3), max_size=25), max_size=5)


def chain(place: Place | None, num_tokens: int) -> list[int]:
    """What the likeliest guesses say, one after the other."""
    tokens: list[int] = []
    while place is not None and len(tokens) < num_tokens:
        guesses = place.guesses()
        if not guesses:
            break
        tokens.append(guesses[0].token_id)
        place = guesses[0].place
    return tokens


# The sequence's own text.


def latest_match(text: list[int]) -> tuple[int, int] | None:
    """(where it goes on, tokens that match) of the longest run up to LONGEST, the latest of equals."""
    for size in range(min(LONGEST, len(text)), SHORTEST_NGRAM - 1, -1):
        for at in range(len(text) - 1, size - 1, -1):
            if text[at - size : at] == text[len(text) - size :]:
                length = size
                while length < min(at, MOST_COUNTED) and text[at - length - 1] == text[-length - 1]:
                    length += 1
                return at, length
    return None


@given(pieces)
def test_an_ngram_is_found_where_a_scan_finds_it(pieces: list[list[int]]) -> None:
    index, text = NgramIndex(), list[int]()
    for piece in pieces:
        text += piece
        index.catch_up(text)
        expected, found = latest_match(text), index.find(text)
        assert (None if found is None else (found.at, found.length)) == expected
        if expected is not None:
            at = expected[0]
            period = len(text) - at
            assert chain(found, 2 * period) == text[at:] * 2, "the end repeats itself"


# What was said before.


def occurrences(texts: list[list[int]], run: tuple[int, ...]) -> int:
    return sum(
        tuple(text[at : at + len(run)]) == run for text in texts for at in range(len(text) - len(run) + 1)
    )


def node_of(trie: SuffixTrie, run: tuple[int, ...]) -> int:
    node = ROOT
    for token in run:
        node = trie.child(node, token)
        if node == NONE:
            break
    return node


@given(st.lists(texts, max_size=3), st.integers(1, 4), texts)
def test_a_trie_counts_every_run_and_links_to_its_tail(
    said: list[list[int]], depth: int, asked: list[int]
) -> None:
    trie = SuffixTrie(depth)
    for text in said:
        ends: list[int] | tuple[int, ...] = START
        for token in text:
            ends = trie.append(ends, token)
        assert trie.longest(ends) == trie.find(text)
    runs = {
        tuple(text[at : at + size])
        for text in said
        for size in range(1, depth + 1)
        for at in range(len(text) - size + 1)
    }
    assert trie.num_nodes == len(runs)
    for run in runs:
        node = node_of(trie, run)
        assert trie.counts[node] == occurrences(said, run)
        assert (trie.tokens[node], trie.depths[node]) == (run[-1], len(run))
        assert trie.links[node] == node_of(trie, run[1:])
        following = {r[-1]: occurrences(said, r) for r in runs if r[:-1] == run}
        children = list(trie.children(node))
        assert {trie.tokens[child]: trie.counts[child] for child in children} == following
        if children:
            assert trie.counts[children[0]] == max(following.values())
    continued = {run[:-1] for run in runs}
    longest = next(
        (
            run
            for size in range(min(depth - 1, len(asked)), 0, -1)
            if (run := tuple(asked[len(asked) - size :])) in continued
        ),
        (),
    )
    assert trie.find(asked) == node_of(trie, longest)
    # Following token by token comes to where looking for all of them does.
    node = ROOT
    for end, token in enumerate(asked):
        node = trie.follow(node, token)
        assert node == trie.find(asked[: end + 1])


def say(history: History, tenant: str, campaign: str, text: list[int]) -> None:
    writer = HistoryWriter()
    for token in text:
        history.append(tenant, campaign, writer, token)


@given(st.lists(texts, max_size=3), texts)
def test_history_guesses_what_followed_the_longest_run_as_often_as_it_did(
    said: list[list[int]], asked: list[int]
) -> None:
    history = History(100_000, 100_000)
    for text in said:
        say(history, "t", "c", text)
    place = history.find("t", "c", asked)
    for size in range(min(DEPTH - 1, len(asked)), SHORTEST - 1, -1):
        run = tuple(asked[len(asked) - size :])
        followed = Counter({token: occurrences(said, (*run, token)) for token in range(4)})
        if followed.total():
            assert place is not None
            assert place.length == size
            shares = {guess.token_id: guess.share for guess in place.guesses()}
            total = occurrences(said, run) + UNSEEN
            assert shares == pytest.approx({t: n / total for t, n in followed.items() if n >= 0.05 * total})
            return
    assert place is None


tenants = st.sampled_from(["one", "two", "three"])
sayings = st.lists(st.tuples(tenants, st.sampled_from(["a", "b", ""]), texts), max_size=12)


@given(sayings, st.integers(LEAST_NODES, 400), st.integers(LEAST_NODES, 400))
def test_history_stays_within_its_bounds(
    sayings: list[tuple[str, str, list[int]]], max_nodes: int, per_tenant: int
) -> None:
    history = History(max_nodes, per_tenant)
    for tenant, campaign, text in sayings:
        writer = HistoryWriter()
        for token in text:
            history.append(tenant, campaign, writer, token)
            held = {tenant: history.tenant_nodes(tenant) for tenant in ("one", "two", "three")}
            assert sum(held.values()) == history.num_nodes <= max_nodes
            assert max(held.values()) <= history.max_nodes_per_tenant


@given(sayings, texts)
def test_no_tenant_sees_anothers_text(sayings: list[tuple[str, str, list[int]]], asked: list[int]) -> None:
    """Tokens tell whose they are: whatever one is proposed is its own."""
    base = {"one": 0, "two": 100, "three": 200}
    history = History(600, 300)
    for tenant, campaign, text in sayings:
        say(history, tenant, campaign, [token + base[tenant] for token in text])
    for tenant, own in base.items():
        for campaign in ("a", "b", ""):
            for other in base.values():
                place = history.find(tenant, campaign, [token + other for token in asked])
                assert all(own <= token < own + 100 for token in chain(place, 8))
                assert place is None or other == own


def test_campaigns_of_a_tenant_are_apart() -> None:
    history = History(1000, 1000)
    say(history, "t", "a", [1, 2, 3, 4])
    assert history.find("t", "b", [1, 2]) is None
    assert chain(history.find("t", "a", [1, 2]), 2) == [3, 4]


def test_what_is_no_longer_said_fades_and_then_goes() -> None:
    limit = CAMPAIGN_NODES + 4 * DEPTH * 20
    history = History(limit, limit)
    say(history, "t", "c", [1, 2, 3] * 4)
    fresh = iter(range(10, 100_000))
    seen = []
    while (place := history.find("t", "c", [1, 2])) is not None:
        assert isinstance(place, HistoryPlace)
        seen.append(place.young_node != ROOT)
        say(history, "t", "c", [1, 2, 9] if len(seen) == 3 else [next(fresh)])
        assert len(seen) < 1000
    assert seen[0]
    assert not seen[-1], "it was in the older generation last"


def test_an_older_generation_weighs_half() -> None:
    limit = CAMPAIGN_NODES + 8 * DEPTH
    history = History(limit, limit)
    say(history, "t", "c", [1, 2, 3])
    fresh = iter(range(10, 100_000))
    place = history.find("t", "c", [1, 2])
    while place is not None and place.old_node == ROOT:
        say(history, "t", "c", [next(fresh)])
        place = history.find("t", "c", [1, 2])
    say(history, "t", "c", [1, 2, 4])
    place = history.find("t", "c", [1, 2])
    assert place is not None
    shares = {guess.token_id: guess.share for guess in place.guesses()}
    assert shares == pytest.approx({4: 1 / (1.5 + UNSEEN), 3: 0.5 / (1.5 + UNSEEN)})


# Phrases.


@given(st.lists(texts, max_size=6), texts)
def test_phrases_go_on_after_their_longest_beginning(phrases: list[list[int]], text: list[int]) -> None:
    trie = PhraseTrie(phrases)
    node = ROOT
    for token in text:
        node = trie.follow(node, token)
    place = trie.place(node)
    beginnings = {tuple(phrase[:size]) for phrase in phrases for size in range(1, len(phrase))}
    fitting = [
        run for size in range(len(text), 0, -1) if (run := tuple(text[len(text) - size :])) in beginnings
    ]
    if not fitting:
        assert place is None
        return
    longest = fitting[0]
    assert place is not None
    assert place.length == len(longest)
    begun = [phrase for phrase in phrases if tuple(phrase[: len(longest)]) == longest]
    following = Counter(phrase[len(longest)] for phrase in begun if len(phrase) > len(longest))
    shares = {guess.token_id: guess.share for guess in place.guesses()}
    assert shares == pytest.approx({token: count / len(begun) for token, count in following.items()})


def test_a_phrase_is_proposed_to_its_end_and_not_beyond() -> None:
    trie = PhraseTrie([[1, 2, 3, 4]])
    assert chain(trie.place(trie.follow(ROOT, 1)), 9) == [2, 3, 4]


def test_phrases_are_bounded_and_a_tenants_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrases_module, "MAX_PHRASE_TOKENS", 5)
    book = PhraseBook(max_tenants=2)
    book.set("a", [[1, 2, 3]])
    with pytest.raises(TooManyPhrasesError, match="5 tokens"):
        book.set("a", [[1, 2, 3], [4, 5, 6]])
    kept = book.get("a")
    assert kept is not None
    assert kept.num_nodes == 3
    assert book.get("b") is None
    book.set("b", [[1]])
    book.set("c", [[1]])
    assert book.get("a") is None
    book.set("c", [])
    assert book.get("c") is None
