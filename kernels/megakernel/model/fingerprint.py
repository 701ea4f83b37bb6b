"""A model's identity: equal content, equal fingerprint, wherever the files lie.

Hashed: each file's size, its header (metadata and tensor table), and of every tensor 16 windows of
1 KiB spread evenly over it, so any retrained or requantized tensor shows without reading gigabytes.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

WINDOW_BYTES = 1024
WINDOWS_PER_TENSOR = 16


class Span(msgspec.Struct, frozen=True):
    """Bytes [offset, offset + num_bytes) of a file."""

    offset: int
    num_bytes: int


class WeightFile(Protocol):
    path: Path

    @property
    def size_bytes(self) -> int: ...


class Fingerprint:
    """Accumulates facts in a fixed order; `digest` is 32 hex digits."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(b"model1", digest_size=16)

    def add_bytes(self, data: bytes) -> None:
        self._hash.update(len(data).to_bytes(8, "little"))
        self._hash.update(data)

    def add_file(self, file: WeightFile, header_bytes: int, tensors: Iterable[Span]) -> None:
        """`tensors` in the order of the file's own table.

        Read, not mapped: a window touched in a mapping brings its neighbours into the process's memory.
        """
        self.add_bytes(file.size_bytes.to_bytes(8, "little"))
        with file.path.open("rb") as opened:
            descriptor = opened.fileno()
            self.add_bytes(os.pread(descriptor, header_bytes, 0))
            for span in tensors:
                for window in sampled_windows(span):
                    self._hash.update(os.pread(descriptor, window.num_bytes, window.offset))

    def digest(self) -> str:
        return self._hash.hexdigest()


def sampled_windows(span: Span) -> Sequence[Span]:
    """All of a small tensor; first, last and evenly spaced windows of a large one."""
    if span.num_bytes <= WINDOW_BYTES * WINDOWS_PER_TENSOR:
        return [span]
    last = span.num_bytes - WINDOW_BYTES
    starts = [last * i // (WINDOWS_PER_TENSOR - 1) for i in range(WINDOWS_PER_TENSOR)]
    return [Span(span.offset + start, WINDOW_BYTES) for start in starts]
