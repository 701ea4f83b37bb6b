"""Each source of drafts beside a search that scans the whole text."""

from collections import Counter
from collections.abc import Iterator
from functools import cache

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from cluster.text import Tokenizer
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
from decode_workers.drafting.phrases import (
    LOOKBACK,
    MOST_BEGUN,
    MOST_GUESSES,
    MOST_WORD_TOKENS,
    BareWords,
    PhraseText,
)
from decode_workers.drafting.place import Place
from decode_workers.drafting.suffix_trie import NONE, ROOT, START, SuffixTrie
from tests.decode_workers.draft_support import phrases_of

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


@cache
def spaced_tokenizer() -> Tokenizer:
    """Letters, and words with the space before them: " abb" is one token, "abb" two, "bb" one."""
    merges = [("Ġ", "a"), ("Ġa", "b"), ("b", "b"), ("Ġa", "bb"), ("Ġ", "b")]
    texts = ["<|end|>", "a", "b", "x", "Ġ", *(left + right for left, right in merges)]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=merges)
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    return Tokenizer(made.to_str().encode())


END, NUM_TOKENS = 0, 10
item_texts = st.lists(st.text("ab ", min_size=1, max_size=9), min_size=1, max_size=12)
said = st.lists(st.lists(st.integers(1, NUM_TOKENS - 1), max_size=LOOKBACK + 4), max_size=4)
Begun = tuple[int, int, tuple[int, ...]]
"""(tokens of the text, tokens of the path, the path): as nodes are numbered."""


class SlowPhrases:
    """Looks at every item for every token, and keeps what begins them by its tokens."""

    def __init__(self, items: set[tuple[int, ...]], tokenizer: Tokenizer) -> None:
        self._items = items
        self._tokenizer = tokenizer
        self._text: list[int] = []
        self._begun: list[Begun] = []

    def say(self, piece: list[int]) -> None:
        """The text grows, and is looked at."""
        if len(piece) > LOOKBACK:
            piece, self._text, self._begun = piece[-LOOKBACK:], [], []
        for token in piece:
            self._text.append(token)
            longer = [(size + 1, len(path) + 1, (*path, token)) for size, _, path in self._begun]
            new = [(size, len(path), path) for size, path in self._beginnings()]
            going = {one for one in longer + new if self._following(one[2])}
            self._begun = sorted(going, reverse=True)[:MOST_BEGUN]

    def _beginnings(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Of the last token, and of the word that the text ends with, without its space."""
        yield 1, (self._text[-1],)
        texts = [self._tokenizer.token_text(token) for token in self._text]
        for size in range(1, min(MOST_WORD_TOKENS, len(texts)) + 1):
            if texts[-size].startswith(" "):
                bare = "".join(texts[-size:])[1:]
                yield size, tuple(self._tokenizer.encode(bare, allow_special=False))
                return

    def _following(self, path: tuple[int, ...]) -> Counter[int]:
        if not path:
            return Counter()
        return Counter(
            item[len(path)] for item in self._items if item[: len(path)] == path and len(item) > len(path)
        )

    def guessed(self) -> list[tuple[int, dict[int, float]]]:
        """(tokens that match, what share goes on with which) of each place."""
        places = []
        for size, depth, path in self._begun:
            if size == self._begun[0][0]:
                total = sum(item[:depth] == path for item in self._items)
                best = sorted(self._following(path).items(), key=lambda one: (-one[1], one[0]))
                places.append((size, {token: count / total for token, count in best[:MOST_GUESSES]}))
        return places


def tokens_of(texts: list[str]) -> set[tuple[int, ...]]:
    encoded = spaced_tokenizer().encode_batch(texts)
    return {tuple(tokens) for tokens in encoded}


@given(item_texts, said)
def test_phrases_go_on_after_their_longest_beginnings(texts: list[str], pieces: list[list[int]]) -> None:
    items, tokenizer = tokens_of(texts), spaced_tokenizer()
    phrases, bare_words = phrases_of(items, END), BareWords(tokenizer)
    slow, found, text = SlowPhrases(items, tokenizer), PhraseText(), list[int]()
    for piece in pieces:
        text += piece
        slow.say(piece)
        places = found.find(phrases, bare_words, text)
        assert [
            (place.length, {guess.token_id: guess.share for guess in place.guesses()}) for place in places
        ] == slow.guessed()


@given(st.text("ab ", min_size=1, max_size=12).filter(lambda text: not text.startswith(" ")))
@pytest.mark.parametrize("before", ["", "x"])
def test_an_item_is_foreseen_behind_its_first_word_wherever_it_is_said(before: str, item: str) -> None:
    """At the beginning of a text, and within a sentence, where the first word has other tokens."""
    tokenizer = spaced_tokenizer()
    (path,) = tokens_of([item])
    phrases, bare_words, text = phrases_of([path], END), BareWords(tokenizer), PhraseText()
    said = tokenizer.encode(f"{before} {item}" if before else item, allow_special=False)
    first_word = item.partition(" ")[0]
    num_before = len(tokenizer.encode(before, allow_special=False))
    num_first = len(tokenizer.encode(f" {first_word}" if before else first_word, allow_special=False))
    for end in range(num_before + num_first, len(said)):
        places = text.find(phrases, bare_words, said[:end])
        assert said[end:] in [chain(place, len(said)) for place in places]


def test_a_phrase_is_proposed_to_its_end_and_not_beyond() -> None:
    phrases, bare_words = phrases_of([[11, 12, 13, 14]]), BareWords(spaced_tokenizer())
    (place,) = PhraseText().find(phrases, bare_words, [17, 11])
    assert (place.length, chain(place, 9)) == (1, [12, 13, 14])
    assert PhraseText().find(phrases, bare_words, [11, 12, 13, 14]) == []


def test_a_shorter_beginning_goes_on_when_a_longer_one_ends() -> None:
    phrases, bare_words = phrases_of([[11, 12, 13, 14], [12, 13, 15, 16]]), BareWords(spaced_tokenizer())
    text = PhraseText()
    (place,) = text.find(phrases, bare_words, [11, 12, 13])
    assert (place.length, chain(place, 9)) == (3, [14])
    (place,) = text.find(phrases, bare_words, [11, 12, 13, 15])
    assert (place.length, chain(place, 9)) == (3, [16])


def test_what_a_text_began_long_before_it_was_looked_at_is_not_found() -> None:
    item = list(range(11, 41))
    phrases, bare_words = phrases_of([item]), BareWords(spaced_tokenizer())
    (place,) = PhraseText().find(phrases, bare_words, item[:LOOKBACK])
    assert place.length == LOOKBACK
    assert PhraseText().find(phrases, bare_words, item[: LOOKBACK + 1]) == []
    text = PhraseText()
    for end in (LOOKBACK, 20, 29):
        (place,) = text.find(phrases, bare_words, item[:end])
        assert place.length == end
    assert text.find(phrases, bare_words, item * 2) == []


def test_the_heaviest_of_very_many_follow() -> None:
    """Equal ones by their tokens."""
    following = [token for token in range(2, 3_000) for _ in range(3 if token == 2_999 else 1 + token % 2)]
    items = [(11, token, at) for at, token in enumerate(following, 3_000)]
    phrases = phrases_of(items, end_token=0)
    (place,) = PhraseText().find(phrases, BareWords(spaced_tokenizer()), [11])
    assert [guess.token_id for guess in place.guesses()] == [2_999, 3, 5, 7]
    assert place.guesses()[0].share == 3 / len(items)


def test_a_text_that_repeats_itself_is_followed_in_few_beginnings() -> None:
    phrases, bare_words = phrases_of([[11] * 60]), BareWords(spaced_tokenizer())
    text = PhraseText()
    for end in range(1, 60):
        (place,) = text.find(phrases, bare_words, [11] * end)
        assert place.length == end
        assert len(text._begun) <= MOST_BEGUN
