"""What is wrong with an upload, by line: counted in full, listed up to a bound."""

import heapq

from cluster.messages import Record

MAX_LISTED_FAULTS = 100
_SHOWN_CHARS = 80


class Fault(Record, frozen=True, kw_only=True):
    line: int
    """From 1; of a record of several lines, its first."""
    message: str


class Faults:
    """Counts every fault and keeps those of the first lines. They may come in any order."""

    def __init__(self, max_listed: int = MAX_LISTED_FAULTS) -> None:
        self._max_listed = max_listed
        self._heap: list[tuple[int, int, str]] = []
        self.count = 0

    def add(self, line: int, message: str) -> None:
        self.count += 1
        entry = (-line, -self.count, message)
        if len(self._heap) < self._max_listed:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def listed(self) -> tuple[Fault, ...]:
        """By line."""
        return tuple(
            Fault(line=-line, message=message) for line, _, message in sorted(self._heap, reverse=True)
        )


class UploadError(ValueError):
    """An upload that is refused; nothing of it is kept. Handled as a bad request by the router."""

    def __init__(self, message: str, faults: Faults | None = None) -> None:
        self.faults = faults.listed() if faults else ()
        self.num_faults = faults.count if faults else 0
        super().__init__("\n".join([message, *(f"line {f.line}: {f.message}" for f in self.faults)]))


class UploadCutError(UploadError):
    """The upload ends before its own end: sent again, it may be whole."""


def shown(text: str) -> str:
    """A user's text inside a message: quoted, on one line, bounded."""
    return repr(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…")
