"""A compiled catalogue as one file: what is where, written and checked.

64 bytes of preamble (`_PREAMBLE`), a JSON header, then arrays, each on a boundary of 64 bytes, all
little-endian. The checksum is xxh3-128 of the whole file, with zeros where it stands itself: no byte can
change unnoticed. Equal items, tokenizer, name and version give an equal file.
"""

import mmap
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from cluster.messages import Record

MAGIC = b"HRCATLG\n"
FORMAT_VERSION = 1
ALIGNMENT_BYTES = 64
MAX_HEADER_BYTES = 1 << 20
_PREAMBLE = struct.Struct("<8sIIQ16s24x")
"""Magic, version, bytes of the header, bytes of the file, checksum."""
_CHECKSUM = slice(24, 40)
_COPY_BYTES = 1 << 20
_DTYPES = ("|u1", "<i4", "<i8", "<f8")

AnyArray = npt.NDArray[Any]


class CatalogueFileError(ValueError):
    """A file that cannot be used; a store or cache fetches or compiles another."""


class NotACatalogueError(CatalogueFileError):
    """Another kind of file, or one of another version of the format."""


class DamagedCatalogueError(CatalogueFileError):
    """Cut, changed, or inconsistent in itself."""


class ArrayPlace(Record, frozen=True, kw_only=True):
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """In bytes, from the file's begin."""

    @property
    def num_bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * np.dtype(self.dtype).itemsize


class ColumnHeader(Record, frozen=True, kw_only=True):
    """An attribute: array `column.<index>` of numbers, or of codes into `column.<index>.bytes`."""

    name: str
    kind: Literal["number", "text"]


class CatalogueHeader(Record, frozen=True, kw_only=True):
    name: str
    version: int
    fingerprint: str
    """Of the tokenizer or model, as whoever compiled it names them."""
    end_token: int
    vocab_size: int
    num_items: int
    num_nodes: int
    num_path_tokens: int
    """Of all items, their ends included."""
    columns: tuple[ColumnHeader, ...]
    arrays: dict[str, ArrayPlace]


class Preamble(Record, frozen=True, kw_only=True):
    header_bytes: int
    file_bytes: int
    checksum: str
    """32 hex digits."""


Source = Callable[[int, int], AnyArray]
"""Elements [start, start + count) of a flat array."""


class Section(Record, frozen=True, kw_only=True):
    """An array to write, read from `source` a piece at a time."""

    dtype: str
    count: int
    source: Source


def in_memory(array: AnyArray) -> Section:
    little = array.dtype.newbyteorder("<")
    flat = array.astype(little, copy=False)
    return Section(dtype=little.str, count=flat.size, source=lambda start, count: flat[start : start + count])


def write_file(
    path: Path,
    header: CatalogueHeader,
    sections: Mapping[str, Section],
    progress: Callable[[int, int], None] | None = None,
) -> Preamble:
    """Onto `path` itself, synced: the caller writes beside and renames. Raises OSError."""
    header, encoded, file_bytes = _placed(header, sections)
    digest = xxhash.xxh3_128()
    with path.open("wb") as file:
        writer = _HashingWriter(file, digest)
        writer.write(_PREAMBLE.pack(MAGIC, FORMAT_VERSION, len(encoded), file_bytes, b""))
        writer.write(encoded)
        for name, section in sections.items():
            writer.pad_to(header.arrays[name].offset)
            piece = _COPY_BYTES // np.dtype(section.dtype).itemsize
            for start in range(0, section.count, piece):
                array = section.source(start, min(piece, section.count - start))
                writer.write(np.ascontiguousarray(array).data.cast("B"))
                if progress is not None:
                    progress(writer.count, file_bytes)
        assert writer.count == file_bytes
        file.seek(0)
        file.write(_PREAMBLE.pack(MAGIC, FORMAT_VERSION, len(encoded), file_bytes, digest.digest()))
        file.flush()
        os.fsync(file.fileno())
    return Preamble(header_bytes=len(encoded), file_bytes=file_bytes, checksum=digest.hexdigest())


class _HashingWriter:
    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self._file = file
        self._digest = digest
        self.count = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.count += len(data)

    def pad_to(self, offset: int) -> None:
        self.write(bytes(offset - self.count))


def _placed(header: CatalogueHeader, sections: Mapping[str, Section]) -> tuple[CatalogueHeader, bytes, int]:
    """Offsets depend on the header's length, and it on them: it is padded to what the longest would take."""
    reserved = 0
    while True:
        offset, arrays = _aligned(_PREAMBLE.size + reserved), {}
        end = _PREAMBLE.size + reserved
        for name, section in sections.items():
            arrays[name] = ArrayPlace(dtype=section.dtype, shape=(section.count,), offset=offset)
            end = offset + arrays[name].num_bytes
            offset = _aligned(end)
        placed = msgspec.structs.replace(header, arrays=arrays)
        encoded = msgspec.json.encode(placed)
        if len(encoded) > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {len(encoded)} bytes; at most {MAX_HEADER_BYTES}")
        if len(encoded) <= reserved:
            return placed, encoded.ljust(reserved), end
        reserved = _aligned(len(encoded) + ALIGNMENT_BYTES)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def read_preamble(path: Path) -> Preamble:
    """Raises OSError and CatalogueFileError."""
    with path.open("rb") as file:
        start = file.read(_PREAMBLE.size)
        return _checked_preamble(path, start, os.fstat(file.fileno()).st_size)


def _checked_preamble(path: Path, start: bytes, file_bytes: int) -> Preamble:
    if not start.startswith(MAGIC):
        raise NotACatalogueError(f"{path} is no compiled catalogue: it does not begin with {MAGIC!r}")
    if len(start) < _PREAMBLE.size:
        raise DamagedCatalogueError(f"{path} is cut: {file_bytes} bytes, not even a preamble")
    _, version, header_bytes, announced, checksum = _PREAMBLE.unpack(start)
    if version != FORMAT_VERSION:
        raise NotACatalogueError(
            f"{path} has version {version} of the format, this program reads {FORMAT_VERSION}: "
            "compile it again"
        )
    if announced != file_bytes:
        raise DamagedCatalogueError(f"{path} has {file_bytes} bytes, its preamble says {announced}")
    if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - _PREAMBLE.size):
        raise DamagedCatalogueError(f"{path}: a header of {header_bytes} bytes does not fit into the file")
    return Preamble(header_bytes=header_bytes, file_bytes=file_bytes, checksum=checksum.hex())


class MappedFile:
    """A file's arrays, read-only, over one mapping that lives as long as any of them."""

    def __init__(self, path: Path, *, verify: bool) -> None:
        """Raises OSError and CatalogueFileError."""
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self.preamble = _checked_preamble(path, file.read(_PREAMBLE.size), size)
            self._view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self.path = path
        if verify:
            self._verify()
        self.header = self._header()

    def _verify(self) -> None:
        digest = xxhash.xxh3_128(self._view[: _CHECKSUM.start])
        digest.update(bytes(_CHECKSUM.stop - _CHECKSUM.start))
        digest.update(self._view[_CHECKSUM.stop :])
        if digest.hexdigest() != self.preamble.checksum:
            raise DamagedCatalogueError(
                f"{self.path} hashes to {digest.hexdigest()}, its preamble says {self.preamble.checksum}"
            )

    def _header(self) -> CatalogueHeader:
        raw = self._view[_PREAMBLE.size : _PREAMBLE.size + self.preamble.header_bytes]
        try:
            header = msgspec.json.decode(raw, type=CatalogueHeader)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise DamagedCatalogueError(f"{self.path}: its header cannot be read: {error}") from None
        for name, place in header.arrays.items():
            self._check_place(name, place)
        return header

    def _check_place(self, name: str, place: ArrayPlace) -> None:
        is_known = place.dtype in _DTYPES and len(place.shape) == 1 and place.shape[0] >= 0
        end = self.preamble.file_bytes
        if not is_known or not 0 <= place.offset <= end or place.offset % ALIGNMENT_BYTES:
            raise DamagedCatalogueError(f"{self.path}: array {name} is described as {place}")
        if place.offset + place.num_bytes > end:
            raise DamagedCatalogueError(f"{self.path}: array {name} goes past the file's end, {end}")

    def array(self, name: str, dtype: npt.DTypeLike, count: int | None = None) -> AnyArray:
        """Raises DamagedCatalogueError where it is not there as asked for."""
        place = self.header.arrays.get(name)
        if place is None or np.dtype(place.dtype) != np.dtype(dtype):
            raise DamagedCatalogueError(f"{self.path}: no array {name} of {np.dtype(dtype)}")
        if count is not None and place.shape != (count,):
            raise DamagedCatalogueError(f"{self.path}: array {name} has shape {place.shape}, not ({count},)")
        return np.frombuffer(self._view, place.dtype, place.shape[0], place.offset)


def string_offsets(lengths: AnyArray) -> npt.NDArray[np.int64]:
    """[count + 1] where each string begins, and where the last one ends."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)))


class Strings:
    """Byte strings one after another: `offsets` has where each begins and where the last one ends."""

    def __init__(self, offsets: AnyArray, data: AnyArray) -> None:
        """Raises DamagedCatalogueError where they do not fit together."""
        if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(data):
            raise DamagedCatalogueError(f"offsets of strings do not span their {len(data)} bytes")
        self._offsets = offsets
        self._data = data

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._data[self._offsets[index] : self._offsets[index + 1]].tobytes().decode()


def joined(values: Sequence[bytes]) -> tuple[AnyArray, AnyArray]:
    """Offsets and bytes."""
    lengths = np.fromiter((len(value) for value in values), np.int64, len(values))
    return string_offsets(lengths), np.frombuffer(b"".join(values), np.uint8)
