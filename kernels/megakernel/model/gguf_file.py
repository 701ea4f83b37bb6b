"""Reads a GGUF container: metadata, tensor table, and bytes mapped from the file.

The `gguf` package's reader trusts the file: an array length out of bounds makes it loop for ever, and
it takes seconds for a large vocabulary. This one checks every length against the file's size first, so
a hostile or truncated file costs milliseconds and a clear error. Formats and block sizes are still
`gguf`'s. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from megakernel.model.weights import ModelFormatError, shown

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
MAX_METADATA_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_NAME_BYTES = 65_535
MAX_DIMENSIONS = 4
MAX_ARRAY_STRINGS = 4_194_304

Metadata = dict[str, Any]
"""bool, int, float, str, list[str], or a one-dimensional NumPy array, by key."""

_SCALARS: dict[int, struct.Struct] = {
    code: struct.Struct("<" + letter)
    for code, letter in {
        0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
    }.items()
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class GgufTensor(msgspec.Struct, frozen=True, kw_only=True):
    """Where one tensor lies and how it is stored; `shape` is outermost first, as NumPy has it."""

    name: str
    format: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return int(np.prod(self.shape, dtype=object))


class GgufFile:
    """One mapped file. Raises ModelFormatError from the constructor for anything wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = _map(path)
        cursor = _Cursor(path, self._bytes)
        num_tensors, num_keys = _read_counts(cursor)
        self.metadata: Metadata = _read_metadata(cursor, num_keys)
        self.tensors: dict[str, GgufTensor] = _read_tensors(
            cursor, num_tensors, _alignment(path, self.metadata)
        )
        self.header_bytes = cursor.offset
        """Length of everything in front of the tensor data, padding left out."""

    @property
    def size_bytes(self) -> int:
        return len(self._bytes)

    def view(self, offset: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """A read-only view of the mapped file; nothing is copied."""
        return np.frombuffer(self._bytes, dtype=np.uint8, count=num_bytes, offset=offset)

    def rows(self, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
        """The tensor's bytes as stored, `[rows, bytes_per_row]`; a vector is one row."""
        num_rows = tensor.num_elements // tensor.shape[-1]
        return self.view(tensor.offset, tensor.num_bytes).reshape(num_rows, -1)


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelFormatError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise ModelFormatError(f"{path} is empty, not a GGUF file") from None


class _Cursor:
    """Reads forward through the header and never past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.offset = 0

    def fail(self, problem: str) -> ModelFormatError:
        return ModelFormatError(f"{self.path}: {problem}")

    def need(self, num_bytes: int, what: str) -> None:
        """Raises where fewer than `num_bytes` are left."""
        left = len(self.data) - self.offset
        if num_bytes > left:
            raise self.fail(
                f"truncated or corrupt GGUF: {what} at byte {self.offset} needs {num_bytes} bytes, "
                f"{left} are left"
            )

    def take(self, num_bytes: int, what: str) -> bytes:
        self.need(num_bytes, what)
        start = self.offset
        self.offset += num_bytes
        return self.data[start : self.offset]

    def scalar(self, form: struct.Struct, what: str) -> Any:
        return form.unpack(self.take(form.size, what))[0]

    def string(self, what: str) -> str:
        raw = self.take(self.scalar(_U64, what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not valid UTF-8") from None

    def name(self, what: str) -> str:
        start = self.offset
        name = self.string(what)
        if self.offset - start > MAX_NAME_BYTES:
            raise self.fail(f"{what} is longer than {MAX_NAME_BYTES} bytes")
        return name

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings in one loop of its own: a vocabulary has hundreds of thousands."""
        if count > MAX_ARRAY_STRINGS:
            raise self.fail(f"{what} holds {count} strings; the limit is {MAX_ARRAY_STRINGS}")
        self.need(8 * count, what)
        return [self.string(what) for _ in range(count)]


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    """Numbers of tensors and of metadata keys, once magic and version are right."""
    if len(cursor.data) < len(MAGIC) or cursor.take(len(MAGIC), "magic") != MAGIC:
        raise cursor.fail("not a GGUF file (it does not start with the bytes `GGUF`)")
    version: int = cursor.scalar(_U32, "version")
    if version not in SUPPORTED_VERSIONS:
        if version & 0xFFFF == 0:
            raise cursor.fail("big-endian GGUF is not supported; convert it to little-endian")
        raise cursor.fail(f"GGUF version {version} is not supported; versions 2 and 3 are")
    num_tensors: int = cursor.scalar(_U64, "tensor count")
    num_keys: int = cursor.scalar(_U64, "metadata count")
    if num_tensors > MAX_TENSORS or num_keys > MAX_METADATA_KEYS:
        raise cursor.fail(
            f"corrupt GGUF: {num_tensors} tensors and {num_keys} metadata keys announced; "
            f"the limits are {MAX_TENSORS} and {MAX_METADATA_KEYS}"
        )
    return num_tensors, num_keys


def _read_metadata(cursor: _Cursor, num_keys: int) -> Metadata:
    metadata: Metadata = {}
    for _ in range(num_keys):
        key = cursor.name("a metadata key")
        if key in metadata:
            raise cursor.fail(f"corrupt GGUF: metadata key `{key}` appears twice")
        metadata[key] = _read_value(cursor, cursor.scalar(_U32, f"type of `{key}`"), key)
    return metadata


def _read_value(cursor: _Cursor, kind: int, key: str) -> Any:
    what = f"metadata `{key}`"
    if kind == _STRING:
        return cursor.string(what)
    if kind != _ARRAY:
        return cursor.scalar(_scalar_form(cursor, kind, what), what)
    element_kind: int = cursor.scalar(_U32, what)
    count: int = cursor.scalar(_U64, what)
    if element_kind == _STRING:
        return cursor.strings(count, what)
    form = _scalar_form(cursor, element_kind, what)
    return np.frombuffer(cursor.take(count * form.size, what), dtype=np.dtype(form.format))


def _scalar_form(cursor: _Cursor, kind: int, what: str) -> struct.Struct:
    form = _SCALARS.get(kind)
    if form is None:
        raise cursor.fail(f"corrupt GGUF: {what} has type {kind}, which no GGUF version defines here")
    return form


def _alignment(path: Path, metadata: Metadata) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise ModelFormatError(
            f"{path}: `general.alignment` is {shown(alignment)}; it must be a power of two"
        )
    return alignment


def _read_tensors(cursor: _Cursor, num_tensors: int, alignment: int) -> dict[str, GgufTensor]:
    tensors = [_read_tensor(cursor) for _ in range(num_tensors)]
    data_start = -(-cursor.offset // alignment) * alignment
    placed: dict[str, GgufTensor] = {}
    for tensor in tensors:
        if tensor.name in placed:
            raise cursor.fail(f"corrupt GGUF: tensor `{tensor.name}` appears twice")
        tensor = msgspec.structs.replace(tensor, offset=data_start + tensor.offset)
        end = tensor.offset + tensor.num_bytes
        if end > len(cursor.data):
            raise cursor.fail(
                f"truncated GGUF: tensor `{tensor.name}` ends at byte {end}, the file at {len(cursor.data)}; "
                "download or copy it again"
            )
        placed[tensor.name] = tensor
    return placed


def _read_tensor(cursor: _Cursor) -> GgufTensor:
    """One row of the tensor table; its offset is still relative to the start of the data."""
    name = cursor.name("a tensor name")
    what = f"tensor `{name}`"
    num_dims: int = cursor.scalar(_U32, what)
    if not 1 <= num_dims <= MAX_DIMENSIONS:
        raise cursor.fail(
            f"corrupt GGUF: {what} has {num_dims} dimensions; 1 to {MAX_DIMENSIONS} are possible"
        )
    shape = tuple(reversed([int(cursor.scalar(_U64, what)) for _ in range(num_dims)]))
    code: int = cursor.scalar(_U32, what)
    offset: int = cursor.scalar(_U64, what)
    try:
        storage = GGMLQuantizationType(code)
    except ValueError:
        raise cursor.fail(f"{what} has quantization type {code}, which is not known") from None
    block_elements, block_bytes = GGML_QUANT_SIZES[storage]
    if 0 in shape or shape[-1] % block_elements:
        raise cursor.fail(
            f"corrupt GGUF: {what} has shape {list(shape)}; rows of {storage.name} hold a positive "
            f"multiple of {block_elements}"
        )
    num_bytes = int(np.prod(shape, dtype=object)) // block_elements * block_bytes
    return GgufTensor(name=name, format=storage, shape=shape, offset=offset, num_bytes=num_bytes)
