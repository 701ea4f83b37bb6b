"""The automaton beside what it stands for: all runs of tokens ever seen, searched one by one."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakernel.draft_automaton import (
    EMPTY_KEY,
    NO_STATE,
    NO_TOKEN,
    ROOT,
    build_automaton,
)

tokens = st.lists(st.integers(0, 3), max_size=20)
texts = st.lists(tokens, max_size=4)
lengths = st.integers(2, 5)
Piece = tuple[int, ...]


class Oracle:
    def __init__(self, texts: list[list[int]], most_tokens: int) -> None:
        self.pieces: Counter[Piece] = Counter()
        """How often each came, in the order in which they were seen first."""
        for text in texts:
            for start in range(len(text)):
                for length in range(1, min(most_tokens, len(text) - start) + 1):
                    self.pieces[tuple(text[start : start + length])] += 1

    def longest_suffix(self, history: list[int] | Piece) -> Piece:
        """That is a known piece."""
        for start in range(len(history) + 1):
            piece = tuple(history[start:])
            if piece in self.pieces:
                return piece
        return ()

    def follower(self, piece: Piece) -> int | None:
        """What came most often after the longest suffix that anything came after."""
        while piece:
            followers = {known[-1]: count for known, count in self.pieces.items() if known[:-1] == piece}
            if followers:
                return max(followers, key=lambda token: followers[token])
            piece = self.longest_suffix(piece[1:])
        return None

    def draft(self, history: list[int], most: int) -> list[int]:
        found: list[int] = []
        piece = self.longest_suffix(history)
        while len(found) < most and (token := self.follower(piece)) is not None:
            found.append(token)
            piece = self.longest_suffix((*piece, token))
        return found


@given(texts, lengths, st.lists(st.integers(0, 4), max_size=30))
def test_a_state_is_the_longest_suffix_that_begins_a_known_piece(texts, most_tokens, history):
    automaton, oracle = build_automaton(texts, most_tokens), Oracle(texts, most_tokens)
    states = {piece: automaton.follow_all(ROOT, piece) for piece in oracle.pieces}
    states[()] = ROOT
    assert sorted(states.values()) == list(range(automaton.num_states)), "a state a piece"
    state = ROOT
    for end in range(len(history)):
        state = automaton.follow(state, history[end])
        assert state == states[oracle.longest_suffix(history[: end + 1])]


@given(texts, lengths, tokens, st.integers(0, 8))
def test_a_draft_is_what_came_most_often(texts, most_tokens, history, most):
    automaton, oracle = build_automaton(texts, most_tokens), Oracle(texts, most_tokens)
    state = automaton.follow_all(ROOT, history)
    assert automaton.draft(state, most) == oracle.draft(history, most)


@given(texts, lengths)
def test_the_likeliest_token_leads_where_following_it_does(texts, most_tokens):
    automaton = build_automaton(texts, most_tokens)
    assert automaton.best_tokens[ROOT] == NO_TOKEN
    for state in range(automaton.num_states):
        token = int(automaton.best_tokens[state])
        if token == NO_TOKEN:
            assert automaton.best_states[state] == NO_STATE
        else:
            assert automaton.best_states[state] == automaton.follow(state, token)


@given(texts, lengths)
def test_the_table_of_transitions_has_room_and_every_one_once(texts, most_tokens):
    automaton = build_automaton(texts, most_tokens)
    held = automaton.keys[automaton.keys != np.uint64(EMPTY_KEY)]
    assert len(set(held.tolist())) == len(held) == automaton.num_states - 1
    assert len(automaton.keys) >= max(2, 2 * len(held))
    assert len(automaton.keys) & (len(automaton.keys) - 1) == 0


def test_the_first_seen_of_equals_wins():
    assert build_automaton([[1, 2, 9, 1, 3]]).draft(1, 1) == [2]
    automaton = build_automaton([[1, 2, 9, 1, 3, 9, 1, 3]])
    assert automaton.draft(automaton.follow(ROOT, 1), 2) == [3, 9]


def test_one_token_is_followed_by_nothing():
    with pytest.raises(ValueError, match="most_tokens is 1"):
        build_automaton([[1, 2]], 1)
