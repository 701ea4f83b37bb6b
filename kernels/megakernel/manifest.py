"""What an artifact says of itself: what it was made from, for what, and the checksum of each of its files."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import msgspec

from megakernel.artifact import Segment, WeightLayout
from megakernel.build import Compiler
from megakernel.codegen_limits import KvFormat
from megakernel.cpu_identity import CpuIdentity
from megakernel.machine import Machine
from megakernel.model.shape import ModelShape

FORMAT = 1
"""Of the folder, its files and what the library is called with. Raised by any change of them that another
version would not understand."""
MANIFEST = "manifest.json"
PROGRAMS = "programs.msgpack"
SOURCE = "step.cpp"
LIBRARY = "step.so"
WEIGHTS = "weights.bin"
STEP_TABLE = "step_table.json"
REPORT = "report.txt"
PICTURE = "schedule.svg"
PROOF = "validate() has proved every program; the checksum of programs.msgpack stands for it"
_CHUNK_BYTES = 8 << 20


class ArtifactError(ValueError):
    """An artifact that cannot be used; the message names the folder, what is wrong, and what would be right.

    Handled by whoever can build another; else by the command line.
    """


class ArtifactDamagedError(ArtifactError):
    """Files are missing, cut short or changed."""


class ArtifactMismatchError(ArtifactError):
    """Whole, but for another model, CPU, KV format, number of threads or version."""


class UnsupportedModelError(ValueError):
    """A model that no kernel of this machine takes; the message says what is in the way."""


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    num_bytes: int
    blake2b: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    format: int = FORMAT
    model: str
    """A name for people; the fingerprint decides."""
    model_fingerprint: str
    shape: ModelShape
    machine: Machine
    num_workers: int
    kv_format: KvFormat
    buckets: tuple[int, ...]
    segments: tuple[Segment, ...]
    """Of the packed weights, ascending by offset."""
    weight_bytes: int
    buffer_offsets: dict[str, int]
    is_searched: bool
    """Whether a measured schedule search chose the plan."""
    compiler: Compiler
    flags: tuple[str, ...]
    cpu: CpuIdentity
    sources: str
    """Hash of the megakernel compiler's own files."""
    proof: str = PROOF
    files: dict[str, FileEntry]
    """By name: every file but this one."""
    blake2b: str = ""
    """Of this record without it."""

    @property
    def layout(self) -> WeightLayout:
        return WeightLayout(
            segments={segment.weights: segment for segment in self.segments},
            num_bytes=self.weight_bytes,
            backend=self.machine.kind,
        )


class _Version(msgspec.Struct, frozen=True):
    format: int


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """With its own checksum filled in."""
    sealed = msgspec.structs.replace(manifest, blake2b=_own_checksum(manifest))
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(sealed), indent=1))
    return sealed


def read_manifest(folder: Path) -> Manifest:
    """Raises ArtifactDamagedError, or ArtifactMismatchError for another version's format."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactDamagedError(f"{folder} is no artifact: {MANIFEST}: {error.strerror}") from None
    try:
        version = msgspec.json.decode(content, type=_Version).format
        if version != FORMAT:
            age = "newer" if version > FORMAT else "older"
            raise ArtifactMismatchError(
                f"{folder} has artifact format {version}, {age} than {FORMAT}, which this version "
                "of headrace reads: compile the model with this version"
            )
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ArtifactDamagedError(f"{path} is damaged: {error}; compile the model again") from None
    if manifest.blake2b != _own_checksum(manifest):
        raise ArtifactDamagedError(f"{path} has been changed: its checksum is wrong; compile the model again")
    return manifest


def _own_checksum(manifest: Manifest) -> str:
    plain = msgspec.json.encode(msgspec.structs.replace(manifest, blake2b=""), order="sorted")
    return hashlib.blake2b(plain, digest_size=32).hexdigest()


def entry_of(path: Path) -> FileEntry:
    """Reads all of the file."""
    digest = hashlib.blake2b(digest_size=32)
    num_bytes = 0
    with path.open("rb") as file:
        for chunk in _chunks(file):
            digest.update(chunk)
            num_bytes += len(chunk)
    return FileEntry(num_bytes=num_bytes, blake2b=digest.hexdigest())


def check_file(folder: Path, name: str, manifest: Manifest) -> None:
    """Raises ArtifactDamagedError where the file is not, to the bit, what was written."""
    check_size(folder, name, manifest)
    check_entry(folder, name, manifest, entry_of(folder / name).blake2b)


def check_size(folder: Path, name: str, manifest: Manifest) -> int:
    """The file's size. Raises ArtifactDamagedError where it is missing or of another size."""
    wanted = manifest.files.get(name)
    if wanted is None:
        raise ArtifactDamagedError(f"{folder / MANIFEST} does not list {name}; compile the model again")
    try:
        found = (folder / name).stat().st_size
    except OSError as error:
        raise ArtifactDamagedError(f"{folder / name}: {error.strerror}; compile the model again") from None
    if found != wanted.num_bytes:
        raise ArtifactDamagedError(
            f"{folder / name} has {found} bytes, not {wanted.num_bytes}: it is incomplete or another file; "
            "copy the folder again, or compile the model again"
        )
    return found


def check_entry(folder: Path, name: str, manifest: Manifest, blake2b: str) -> None:
    wanted = manifest.files[name].blake2b
    if blake2b != wanted:
        raise ArtifactDamagedError(
            f"{folder / name} is damaged: its checksum is {blake2b[:16]}..., not {wanted[:16]}...; copy the "
            "folder again, or compile the model again"
        )


def _chunks(file: BinaryIO) -> Iterable[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk
