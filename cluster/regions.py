"""Which parts of one stretch of memory are taken. Bookkeeping alone; first fit."""

from bisect import insort

ALIGNMENT_BYTES = 4096


class Regions:
    """Deals out [start, start + bytes) of `num_bytes`, each to one owner at a time. For one thread."""

    def __init__(self, num_bytes: int) -> None:
        """`num_bytes` is rounded up to whole pages."""
        self.num_bytes = _aligned(num_bytes)
        self._taken: list[tuple[int, int]] = []
        """[start, end), in order."""

    @property
    def num_taken(self) -> int:
        return len(self._taken)

    @property
    def num_bytes_taken(self) -> int:
        return sum(end - start for start, end in self._taken)

    def find(self, num_bytes: int) -> int | None:
        """Where the next region of so many bytes would start; None: there is no room."""
        region_bytes, start = _region_bytes(num_bytes), 0
        for taken, end in self._taken:
            if taken - start >= region_bytes:
                return start
            start = end
        return start if self.num_bytes - start >= region_bytes else None

    def take(self, num_bytes: int) -> int | None:
        start = self.find(num_bytes)
        if start is not None:
            insort(self._taken, (start, start + _region_bytes(num_bytes)))
        return start

    def give_back(self, start: int) -> None:
        self._taken = [region for region in self._taken if region[0] != start]


def _region_bytes(num_bytes: int) -> int:
    """Never none: a region is known by where it starts."""
    return _aligned(max(num_bytes, 1))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
