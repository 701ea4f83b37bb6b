"""Arrays and byte strings that grow on disk: what a compilation keeps of items while it reads more."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

AnyArray = npt.NDArray[Any]
_BUFFER_BYTES = 1 << 16


class ArraySpool:
    """One array, appended to, then read. The caller closes it and removes its folder."""

    def __init__(self, folder: Path, name: str, dtype: npt.DTypeLike) -> None:
        self.path = folder / name
        self.dtype = np.dtype(dtype)
        self.count = 0
        self._file = self.path.open("w+b", buffering=_BUFFER_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def extend(self, values: npt.ArrayLike) -> None:
        array = np.ascontiguousarray(values, self.dtype)
        self._file.write(array.data.cast("B") if array.size else b"")
        self.count += array.size

    def write_bytes(self, data: bytes) -> None:
        """Of a spool of bytes."""
        self._file.write(data)
        self.count += len(data)

    def flush(self) -> None:
        """What was appended can be read by `path`; does nothing where it is closed."""
        if not self._file.closed:
            self._file.flush()

    def read(self, start: int = 0, count: int | None = None) -> AnyArray:
        """A copy in memory; also after `close`."""
        self.flush()
        length = self.count - start if count is None else count
        return np.fromfile(self.path, self.dtype, length, offset=start * self.dtype.itemsize)

    def overwrite(self, start: int, values: AnyArray) -> None:
        """May go past the end, for arrays that are written from behind."""
        self._file.seek(start * self.dtype.itemsize)
        self._file.write(np.ascontiguousarray(values, self.dtype).data.cast("B") if values.size else b"")
        self._file.seek(0, 2)
        self.count = max(self.count, start + values.size)

    def mapped(self) -> AnyArray:
        """Read-only; its pages are the system's to take back."""
        self.flush()
        if not self.count:
            return np.zeros(0, self.dtype)
        return np.memmap(self.path, self.dtype, "r", shape=(self.count,))

    def close(self) -> None:
        self._file.close()


class BlobSpool:
    """Byte strings; None is one that is not there."""

    def __init__(self, folder: Path, name: str) -> None:
        self.data = ArraySpool(folder, f"{name}.bytes", np.uint8)
        self._lengths = ArraySpool(folder, f"{name}.lengths", np.int32)

    @property
    def count(self) -> int:
        return self._lengths.count

    def extend(self, values: Sequence[bytes | None]) -> None:
        self._lengths.extend(
            np.fromiter((-1 if v is None else len(v) for v in values), np.int32, len(values))
        )
        self.data.write_bytes(b"".join([value for value in values if value]))

    def pad_to(self, count: int) -> None:
        """With Nones."""
        self._lengths.extend(np.full(count - self.count, -1, np.int32))

    def lengths(self) -> AnyArray:
        return self._lengths.read()

    def batches(self, batch: int = 1 << 14) -> "list[tuple[int, int]]":
        return [(start, min(start + batch, self.count)) for start in range(0, self.count, batch)]

    def values(self, start: int, end: int, first_byte: int) -> tuple[list[bytes | None], int]:
        """Values [start, end), of which the first begins at `first_byte`; and where the next one begins."""
        lengths = self._lengths.read(start, end - start)
        ends = first_byte + np.cumsum(np.maximum(lengths, 0), dtype=np.int64)
        next_byte = int(ends[-1]) if len(ends) else first_byte
        raw = self.data.read(first_byte, next_byte - first_byte).tobytes()
        at, found = 0, list[bytes | None]()
        for length in lengths.tolist():
            found.append(None if length < 0 else raw[at : at + length])
            at += max(length, 0)
        return found, next_byte

    def keep_only(self, keep: npt.NDArray[np.bool_], into: "BlobSpool") -> "BlobSpool":
        """`into`, an empty one, with the values that are kept."""
        first_byte = 0
        for start, end in self.batches():
            lengths = self._lengths.read(start, end - start)
            num_bytes = int(np.maximum(lengths, 0).sum())
            raw = self.data.read(first_byte, num_bytes)
            mask = keep[start:end]
            into.data.extend(raw[np.repeat(mask, np.maximum(lengths, 0))])
            into._lengths.extend(lengths[mask])
            first_byte += num_bytes
        return into

    def close(self) -> None:
        self.data.close()
        self._lengths.close()
