"""Stop strings in text that arrives in pieces: none of one is ever released."""

import msgspec


class StopOutput(msgspec.Struct, frozen=True):
    text: str
    """Safe to release: it belongs to no stop string, whatever comes next."""
    match: str | None = None
    """The stop string found. Text from its start on is dropped, and nothing may be pushed after."""


class StopMatcher:
    """Finds the earliest end of any stop string; of those that end together, the longest."""

    __slots__ = ("_first_characters", "_held", "_longest", "_stops")

    def __init__(self, stops: tuple[str, ...]) -> None:
        """Stop strings are not empty."""
        assert all(stops), "an empty stop string would match everywhere"
        self._stops = stops
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str) -> StopOutput:
        """Release all but what a stop string may still start with."""
        if not self._stops:
            return StopOutput(text)
        text = self._held + text
        found = self._first_match(text)
        if found is not None:
            start, match = found
            self._held = ""
            return StopOutput(text[:start], match)
        num_held = self._num_held(text)
        released = text[: len(text) - num_held]
        self._held = text[len(released) :]
        return StopOutput(released)

    def flush(self) -> str:
        """What is held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        matches = [(text.find(stop), stop) for stop in self._stops]
        ends = [(start + len(stop), start, stop) for start, stop in matches if start >= 0]
        if not ends:
            return None
        _, start, stop = min(ends)
        return start, stop

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string starts with."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first_characters:
                end = text[start:]
                if any(stop.startswith(end) for stop in self._stops):
                    return len(end)
        return 0
