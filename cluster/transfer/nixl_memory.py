"""The host memory that an agent registers: mapped once, dealt out in regions, each to one hand-off."""

import contextlib
import ctypes
import mmap
import threading
import time
from collections.abc import Callable

from cluster.regions import Regions


class RegisteredMemory:
    """Any thread may call any method."""

    def __init__(self, num_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises OSError where the kernel gives no such memory."""
        self._regions = Regions(num_bytes)
        self.num_bytes = self._regions.num_bytes
        self._map = mmap.mmap(-1, self.num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = _address_of(self._map)
        self.view = memoryview(self._map)
        self._clock = clock
        self._lock = threading.Lock()
        self._retired: list[tuple[float, int]] = []
        """When they are due, and where they start."""

    def take(self, num_bytes: int) -> int | None:
        """The offset of a region; None where there is no room."""
        with self._lock:
            now_s = self._clock()
            for due_s, start in self._retired:
                if due_s <= now_s:
                    self._regions.give_back(start)
            self._retired = [item for item in self._retired if item[0] > now_s]
            return self._regions.take(num_bytes)

    def give_back(self, start: int, delay_s: float = 0.0) -> None:
        """`delay_s`: for whoever may still look at it, or write to it."""
        with self._lock:
            if delay_s > 0:
                self._retired.append((self._clock() + delay_s, start))
            else:
                self._regions.give_back(start)

    @property
    def num_taken(self) -> int:
        """Regions that somebody has, retired ones included."""
        return self._regions.num_taken

    def close(self) -> None:
        """Only once nothing reads or writes it by its address."""
        # A view of a chunk may outlive us, in a traceback say; the mapping then goes with its last view.
        with contextlib.suppress(BufferError):
            self.view.release()
            self._map.close()


def _address_of(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))
