"""Drafts that a device can look up: an Aho-Corasick automaton over token sequences seen before.

A state is the longest suffix of what was generated that begins a known piece of text. `best_tokens` is what
followed it most often; a draft is the chain of those. Source: A. Aho, M. Corasick, Efficient string
matching, CACM 18 (1975). Transitions lie in a hash table with open addressing: a device finds one in a probe
or two.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]

ROOT = 0
NO_STATE = -1
NO_TOKEN = -1
EMPTY_KEY = 0xFFFFFFFFFFFFFFFF
_MULTIPLIER = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: Knuth, The Art of Computer Programming, volume 3, section 6.4."""
_WORD = (1 << 64) - 1


class DraftAutomaton(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Any number of automata in one set of arrays; each has a root of its own, its own fallback."""

    keys: npt.NDArray[np.uint64]
    """[slots, a power of two] state << 32 | token, at `first_slot_of` or after it; else EMPTY_KEY."""
    next_states: IntArray
    """[slots] where the key's transition leads."""
    fallbacks: IntArray
    """[states] the longest proper suffix that is a state; a root's is itself."""
    best_tokens: IntArray
    """[states] the likeliest next token; NO_TOKEN at roots: they say nothing of what came before."""
    best_states: IntArray
    """[states] where the likeliest token leads; NO_STATE where there is none."""

    @property
    def num_states(self) -> int:
        return len(self.fallbacks)

    def follow(self, state: int, token: int) -> int:
        """The state after `token`."""
        while True:
            found = self._find(state, token)
            if found != NO_STATE:
                return found
            fallback = int(self.fallbacks[state])
            if fallback == state:
                return state
            state = fallback

    def follow_all(self, state: int, tokens: Iterable[int]) -> int:
        for token in tokens:
            state = self.follow(state, token)
        return state

    def draft(self, state: int, most: int) -> list[int]:
        """The likeliest chain after `state`, of at most so many tokens."""
        tokens: list[int] = []
        while len(tokens) < most and (token := int(self.best_tokens[state])) != NO_TOKEN:
            tokens.append(token)
            state = int(self.best_states[state])
        return tokens

    def _find(self, state: int, token: int) -> int:
        key, mask = _key_of(state, token), len(self.keys) - 1
        slot = first_slot_of(key, mask)
        while (held := int(self.keys[slot])) != EMPTY_KEY:
            if held == key:
                return int(self.next_states[slot])
            slot = (slot + 1) & mask
        return NO_STATE


def build_automaton(texts: Sequence[Sequence[int]], most_tokens: int = 8) -> DraftAutomaton:
    """Of every run of up to `most_tokens` tokens in `texts`, its root at ROOT.

    A state says what is likeliest after it by how often it came; the token seen first wins a tie.
    """
    if most_tokens < 2:
        raise ValueError(f"most_tokens is {most_tokens}; a token and what followed it are 2")
    children: list[dict[int, int]] = [{}]
    counts = [0]
    for text in texts:
        for start in range(len(text)):
            state = ROOT
            for token in text[start : start + most_tokens]:
                if (child := children[state].get(token)) is None:
                    child = children[state][token] = len(children)
                    children.append({})
                    counts.append(0)
                counts[child] += 1
                state = child
    return _link(children, counts)


def _link(children: Sequence[Mapping[int, int]], counts: Sequence[int]) -> DraftAutomaton:
    fallbacks, best_tokens, best_states = (np.full(len(children), -1, dtype=np.int32) for _ in range(3))
    fallbacks[ROOT] = ROOT
    waiting = deque([ROOT])
    while waiting:  # breadth first: a state's fallback is shorter, so it is done
        state = waiting.popleft()
        for token, child in children[state].items():
            at = int(fallbacks[state])
            while token not in children[at] and at != ROOT:
                at = int(fallbacks[at])
            fallbacks[child] = children[at][token] if state != ROOT and token in children[at] else ROOT
            waiting.append(child)
        if state == ROOT:
            continue
        if children[state]:
            token, child = max(children[state].items(), key=lambda found: counts[found[1]])
            best_tokens[state], best_states[state] = token, child
        else:
            best_tokens[state] = best_tokens[fallbacks[state]]
            best_states[state] = best_states[fallbacks[state]]
    keys, next_states = _hashed(children)
    return DraftAutomaton(
        keys=keys,
        next_states=next_states,
        fallbacks=fallbacks,
        best_tokens=best_tokens,
        best_states=best_states,
    )


def _hashed(children: Sequence[Mapping[int, int]]) -> tuple[npt.NDArray[np.uint64], IntArray]:
    """At most half of the slots are taken."""
    num_slots = 2
    while num_slots < 2 * (len(children) - 1):
        num_slots *= 2
    keys = np.full(num_slots, EMPTY_KEY, dtype=np.uint64)
    next_states = np.full(num_slots, NO_STATE, dtype=np.int32)
    for state, own in enumerate(children):
        for token, child in own.items():
            key = _key_of(state, token)
            slot = first_slot_of(key, num_slots - 1)
            while int(keys[slot]) != EMPTY_KEY:
                slot = (slot + 1) & (num_slots - 1)
            keys[slot], next_states[slot] = key, child
    return keys, next_states


def first_slot_of(key: int, mask: int) -> int:
    """As `first_slot_of` of drafts.h: the product's upper half, of which the mask takes the lowest bits."""
    return (key * _MULTIPLIER & _WORD) >> 32 & mask


def _key_of(state: int, token: int) -> int:
    return state << 32 | token
