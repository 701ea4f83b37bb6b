"""A stream that runs what is enqueued in order, later, in a thread of its own."""

import queue
import random
import threading
import time
from collections.abc import Callable
from typing import Any


class Event:
    def __init__(self) -> None:
        self._happened = threading.Event()

    def query(self) -> bool:
        return self._happened.is_set()

    def synchronize(self) -> None:
        self._happened.wait()

    def happen(self) -> None:
        self._happened.set()


class Stream:
    def __init__(self, longest_delay_s: float) -> None:
        self._longest_delay_s = longest_delay_s
        self._dice = random.Random(0)
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="double-stream", daemon=True)
        self._thread.start()

    def enqueue(self, work: Callable[[], None]) -> None:
        self._work.put(work)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        self._work.put(event.happen)
        return event

    def wait_event(self, event: Any) -> None:
        self._work.put(event.synchronize)

    def synchronize(self) -> None:
        self.record_event().synchronize()

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if self._longest_delay_s:
                time.sleep(self._dice.random() * self._longest_delay_s)
            work()
