"""Points in time at which something is due, one a key: a heap with lazy deletion, bounded by live keys."""

import heapq
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

_SLACK = 64


class Timers(Generic[Key]):
    """Not thread-safe. Nanoseconds on whatever clock the caller reads."""

    def __init__(self) -> None:
        self._due_ns: dict[Key, int] = {}
        self._heap: list[tuple[int, int, Key]] = []
        self._num_set = 0

    def set(self, key: Key, at_ns: int) -> None:
        """Replaces the key's earlier time."""
        self._due_ns[key] = at_ns
        self._num_set += 1
        heapq.heappush(self._heap, (at_ns, self._num_set, key))
        if len(self._heap) > 2 * len(self._due_ns) + _SLACK:
            self._heap = [entry for entry in self._heap if self._is_live(entry)]
            heapq.heapify(self._heap)

    def cancel(self, key: Key) -> None:
        self._due_ns.pop(key, None)

    def pop_due(self, now_ns: int) -> list[Key]:
        """Keys whose time has come, earliest first; each is told once."""
        due: list[Key] = []
        while self._heap and self._heap[0][0] <= now_ns:
            entry = heapq.heappop(self._heap)
            if self._is_live(entry):
                due.append(entry[2])
                del self._due_ns[entry[2]]
        return due

    def next_ns(self) -> int | None:
        """When something is due next."""
        while self._heap and not self._is_live(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def _is_live(self, entry: tuple[int, int, Key]) -> bool:
        return self._due_ns.get(entry[2]) == entry[0]
