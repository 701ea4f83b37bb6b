"""An upload's bytes as lines: bounded, numbered from 1, without a byte order mark."""

from collections import deque
from collections.abc import Iterable, Iterator

from cluster.catalogue.faults import UploadCutError, UploadError

MAX_RECORD_BYTES = 64 * 1024
MAX_UPLOAD_BYTES = 8 * 1024**3
MAX_REREAD_BYTES = 16 * 1024 * 1024
"""What broken records may make us read twice, an upload: else a hostile one costs its square."""
_BOM = b"\xef\xbb\xbf"


class RecordTooLongError(ValueError):
    """A CSV record of more than MAX_RECORD_BYTES."""


class UploadBytes:
    """Chunks as they come, counted against what was announced."""

    def __init__(self, chunks: Iterable[bytes], content_length: int | None = None) -> None:
        self._chunks = chunks
        self._content_length = content_length
        self.count = 0

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self.count += len(chunk)
            if self.count > MAX_UPLOAD_BYTES:
                raise UploadError(f"an upload of more than {MAX_UPLOAD_BYTES} bytes; split the catalogue")
            if self._content_length is not None and self.count > self._content_length:
                break
            yield chunk
        if self._content_length is not None and self.count != self._content_length:
            came = "more came" if self.count > self._content_length else f"{self.count} came"
            raise UploadCutError(f"an upload of {self._content_length} bytes was announced, {came}")

    @property
    def is_known_whole(self) -> bool:
        """All that was announced has come, so that its last record is broken rather than cut."""
        return self._content_length is not None and self.count == self._content_length


class RawLine:
    """One line with its end of line where it has one; `raw` is None for a line that was too long."""

    __slots__ = ("is_terminated", "raw")

    def __init__(self, raw: bytes | None, is_terminated: bool) -> None:
        self.raw = raw
        self.is_terminated = is_terminated


def raw_lines(chunks: Iterable[bytes]) -> Iterator[RawLine]:
    tail, is_skipping = b"", False
    for chunk in _without_bom(chunks):
        *whole, rest = chunk.split(b"\n")
        for part in whole:
            line, tail = (tail + part if tail else part), b""
            is_long = is_skipping or len(line) > MAX_RECORD_BYTES
            is_skipping = False
            yield RawLine(None if is_long else line + b"\n", True)
        tail += rest
        if len(tail) > MAX_RECORD_BYTES:
            tail, is_skipping = b"", True
    if tail or is_skipping:
        yield RawLine(None if is_skipping else tail, False)


def _without_bom(chunks: Iterable[bytes]) -> Iterator[bytes]:
    head: bytes | None = b""
    for chunk in chunks:
        if head is None:
            yield chunk
            continue
        head += chunk
        if len(head) >= len(_BOM):
            yield head.removeprefix(_BOM)
            head = None
    if head:
        yield head


def json_lines(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes | None, bool]]:
    """(line, bytes or None where it was too long, whether it ends) of every line that is not blank."""
    for number, line in enumerate(raw_lines(chunks), 1):
        if line.raw is None or not line.raw.isspace():
            yield number, line.raw, line.is_terminated


class CsvLines:
    """Lines for `csv.reader`, which asks for as many as a record has. Bounds a record, and can have the lines
    of a broken one read again as records of their own: an open quote takes those after it for its field."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._lines = raw_lines(chunks)
        self._given_back: deque[RawLine] = deque()
        self._record: list[RawLine] = []
        self._record_bytes = 0
        self._next_line = 1
        self._reread_bytes = 0
        self.record_line = 1
        """The line that the record in hand begins on."""
        self.is_at_end = False

    def begin_record(self) -> None:
        self._record.clear()
        self._record_bytes = 0
        self.record_line = self._next_line
        self.is_at_end = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            line = self._given_back.popleft() if self._given_back else next(self._lines)
        except StopIteration:
            self.is_at_end = True
            raise
        self._next_line += 1
        self._record.append(line)
        self._record_bytes += MAX_RECORD_BYTES + 1 if line.raw is None else len(line.raw)
        if line.raw is None or self._record_bytes > MAX_RECORD_BYTES:
            raise RecordTooLongError
        return line.raw.decode()

    def reread_from_second_line(self) -> str:
        """Of the record in hand, which is broken; what to say of it."""
        rest = self._record[1:]
        if not rest:
            return ""
        self._reread_bytes += self._record_bytes
        if self._reread_bytes > MAX_REREAD_BYTES:
            return f"; with it, lines up to {self._next_line - 1} are left out"
        self._given_back.extendleft(reversed(rest))
        self._next_line -= len(rest)
        return "; the lines after it were read on their own"
