"""What other threads ask of the engine's thread: calls, run there in the order they were posted."""

import threading
from collections import deque
from collections.abc import Callable

Call = Callable[[], None]


class Inbox:
    """`post` from any thread; `drain` and `wait` from the engine's."""

    def __init__(self) -> None:
        self._calls: deque[Call] = deque()
        self._arrived = threading.Condition()

    def __len__(self) -> int:
        return len(self._calls)

    def post(self, call: Call) -> None:
        with self._arrived:
            self._calls.append(call)
            self._arrived.notify()

    def drain(self) -> None:
        """Run what had been posted by now."""
        for _ in range(len(self._calls)):
            self._calls.popleft()()

    def wait(self, timeout_s: float) -> None:
        """Sleep until something is posted, or the time is up."""
        with self._arrived:
            if not self._calls:
                self._arrived.wait(timeout_s)
