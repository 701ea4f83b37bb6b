"""Fetches an engine's events in a thread of its own: fetching waits, and some come behind the last prompt."""

import collections
import logging
import threading
from collections.abc import Callable, Sequence

_WAIT_S = 0.1
_RETRY_S = 1.0

_log = logging.getLogger(__name__)


class EventPoller:
    def __init__(self, fetch: Callable[[float], Sequence[object]], max_events: int) -> None:
        """`fetch` waits up to so many seconds. Of those that nobody takes, the last `max_events` are kept."""
        self._fetch = fetch
        self._fetched: collections.deque[object] = collections.deque(maxlen=max_events)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def take(self) -> list[object]:
        """What has come since the last call, in order; never waits."""
        return [self._fetched.popleft() for _ in range(len(self._fetched))]

    def close(self) -> None:
        """Waits for the fetch that is under way."""
        self._is_closed.set()
        self._thread.join()

    def _run(self) -> None:
        has_failed = False
        while not self._is_closed.is_set():
            try:
                self._fetched.extend(self._fetch(_WAIT_S))
            except Exception as error:  # noqa: BLE001 - whatever an engine of another make raises
                if not has_failed:
                    _log.warning("KV-cache events cannot be fetched, trying on: %s", error)
                has_failed = True
                self._is_closed.wait(_RETRY_S)
            else:
                has_failed = False
