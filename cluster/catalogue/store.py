"""A folder of compiled catalogues, by tenant and name; any number of processes of one machine share it.

    <tenant's hash>/<name>/current.json     what is served, renamed into place: whole, or not there
    <tenant's hash>/<name>/v<version>-<checksum>.catalogue     of this version and the one before
    <tenant's hash>/.<name>.lock            while somebody puts or deletes

What a process that died has left is whatever else lies in a name's folder; who takes the lock next removes
it.
"""

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from cluster.catalogue.compile import Compiled, CompileTarget, Progress, compile_upload
from cluster.catalogue.faults import Fault
from cluster.catalogue.file import BID
from cluster.catalogue.file_lock import try_locked
from cluster.catalogue.upload import Format
from cluster.messages import CatalogueRef, Record

CURRENT = "current.json"
SUFFIX = ".catalogue"
KEPT_VERSIONS = 2
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_CHECKSUM_CHARS = 16


class CatalogueNameError(ValueError):
    """A name that no catalogue can have."""


class UnknownCatalogueError(LookupError):
    """No catalogue of that name. Handled as not found by the router."""


class ConflictError(RuntimeError):
    """Somebody else puts or deletes the same name right now. Handled as a conflict by the router."""


class StoredVersion(Record, frozen=True, kw_only=True):
    version: int
    file: str
    checksum: str
    num_bytes: int
    num_items: int
    num_nodes: int
    num_path_tokens: int
    fingerprint: str
    attributes: tuple[str, ...]
    num_left_out: int
    created_unix_s: float


class CatalogueInfo(Record, frozen=True, kw_only=True):
    """A catalogue as it is served."""

    ref: CatalogueRef
    num_items: int
    num_nodes: int
    num_path_tokens: int
    """Of all items, each with its end."""
    fingerprint: str
    attributes: tuple[str, ...]
    num_left_out: int
    """Bad items of its upload."""
    created_unix_s: float


class PutResult(Record, frozen=True, kw_only=True):
    info: CatalogueInfo
    faults: tuple[Fault, ...]
    """Of the items that were left out, the first ones' by line."""


class _Current(Record, frozen=True, kw_only=True):
    name: str
    versions: tuple[StoredVersion, ...]
    """The one that is served, then the one before."""


class CatalogueStore:
    def __init__(self, folder: Path, fetch_address: str = "") -> None:
        """`fetch_address`: goes into every reference. Removes what dead processes left. Raises OSError."""
        self.folder = folder
        self.fetch_address = fetch_address
        folder.mkdir(parents=True, exist_ok=True)
        for names in _folders(folder):
            for catalogue in _folders(names):
                with (
                    try_locked(_lock_path(catalogue)) as is_ours,
                    suppress(OSError),
                ):  # of one that is damaged
                    if is_ours:
                        _sweep(catalogue)

    def put(
        self,
        name: str,
        chunks: Iterable[bytes],
        *,
        upload_format: Format,
        target: CompileTarget,
        tenant: str = "",
        content_length: int | None = None,
        skip_bad: bool = False,
        progress: Progress | None = None,
    ) -> PutResult:
        """Compile an upload and serve it from now on; until then, and where it fails, the version before it.

        Raises CatalogueNameError, ConflictError, UploadError and OSError.
        """
        catalogue = self._path(tenant, name)
        with self._locked(catalogue, name):
            _sweep(catalogue)
            catalogue.mkdir(exist_ok=True)
            before = _read_current(catalogue)
            version = before.versions[0].version + 1 if before else 1
            try:
                with tempfile.TemporaryDirectory(prefix=".new-", dir=catalogue) as work:
                    written = Path(work) / "catalogue"
                    compiled = compile_upload(
                        chunks,
                        written,
                        upload_format=upload_format,
                        name=name,
                        version=version,
                        target=target,
                        content_length=content_length,
                        skip_bad=skip_bad,
                        progress=progress,
                    )
                    stored = _stored(compiled)
                    written.rename(catalogue / stored.file)
            finally:
                if before is None and not any(catalogue.glob(f"*{SUFFIX}")):
                    shutil.rmtree(catalogue, ignore_errors=True)
            versions = (stored, *(before.versions if before else ()))[:KEPT_VERSIONS]
            _write_current(catalogue, _Current(name=name, versions=versions))
            _sweep(catalogue)
        return PutResult(info=self._info(catalogue, name, stored), faults=compiled.faults)

    def get(self, name: str, tenant: str = "") -> CatalogueInfo:
        """What is served now. Raises CatalogueNameError, UnknownCatalogueError and OSError."""
        catalogue = self._path(tenant, name)
        current = _read_current(catalogue)
        if current is None:
            raise UnknownCatalogueError(f"no catalogue `{name}`")
        return self._info(catalogue, name, current.versions[0])

    def list(self, tenant: str = "") -> "tuple[CatalogueInfo, ...]":
        """By name."""
        found = []
        for catalogue in sorted(_folders(self._tenant_path(tenant))):
            if (current := _read_current(catalogue)) is not None:
                found.append(self._info(catalogue, current.name, current.versions[0]))
        return tuple(found)

    def delete(self, name: str, tenant: str = "") -> None:
        """At once; who has it open keeps it.

        Raises CatalogueNameError, UnknownCatalogueError, ConflictError and OSError."""
        catalogue = self._path(tenant, name)
        with self._locked(catalogue, name):
            if not (catalogue / CURRENT).exists():
                raise UnknownCatalogueError(f"no catalogue `{name}`")
            (catalogue / CURRENT).unlink()  # first: what an interrupted removal leaves is a leftover
            shutil.rmtree(catalogue)

    @contextmanager
    def _locked(self, catalogue: Path, name: str) -> Iterator[None]:
        catalogue.parent.mkdir(exist_ok=True)
        with try_locked(_lock_path(catalogue)) as is_ours:
            if not is_ours:
                raise ConflictError(
                    f"catalogue `{name}` is being written or deleted; try again when that is done"
                )
            yield

    def _tenant_path(self, tenant: str) -> Path:
        return self.folder / hashlib.sha256(tenant.encode()).hexdigest()[:32]

    def _path(self, tenant: str, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise CatalogueNameError(
                f"{name!r} is no catalogue's name: 1 to 64 of a-z, 0-9, dot, dash and underscore, "
                "a letter or digit first"
            )
        return self._tenant_path(tenant) / name

    def _info(self, catalogue: Path, name: str, stored: StoredVersion) -> CatalogueInfo:
        ref = CatalogueRef(
            name=name,
            version=stored.version,
            checksum=stored.checksum,
            num_bytes=stored.num_bytes,
            path=str((catalogue / stored.file).resolve()),
            fetch_address=self.fetch_address,
        )
        return CatalogueInfo(
            ref=ref,
            num_items=stored.num_items,
            num_nodes=stored.num_nodes,
            num_path_tokens=stored.num_path_tokens,
            fingerprint=stored.fingerprint,
            attributes=stored.attributes,
            num_left_out=stored.num_left_out,
            created_unix_s=stored.created_unix_s,
        )


def _stored(compiled: Compiled) -> StoredVersion:
    header, preamble = compiled.header, compiled.preamble
    return StoredVersion(
        version=header.version,
        file=f"v{header.version}-{preamble.checksum[:_CHECKSUM_CHARS]}{SUFFIX}",
        checksum=preamble.checksum,
        num_bytes=preamble.file_bytes,
        num_items=header.num_items,
        num_nodes=header.num_nodes,
        num_path_tokens=header.num_path_tokens,
        fingerprint=header.fingerprint,
        attributes=(BID, *(column.name for column in header.columns)),
        num_left_out=compiled.num_faults,
        created_unix_s=time.time(),
    )


def _folders(folder: Path) -> "list[Path]":
    """Without hidden ones; none where `folder` is not there."""
    try:
        return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except FileNotFoundError:
        return []


def _lock_path(catalogue: Path) -> Path:
    return catalogue.with_name(f".{catalogue.name}.lock")


def _read_current(catalogue: Path) -> _Current | None:
    """Raises OSError; a file that is damaged is one too, as no put leaves such."""
    try:
        raw = (catalogue / CURRENT).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        current = msgspec.json.decode(raw, type=_Current)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise OSError(
            f"{catalogue / CURRENT} cannot be read: {error}; delete the catalogue's folder"
        ) from None
    return current if current.versions else None


def _write_current(catalogue: Path, current: _Current) -> None:
    beside = catalogue / f".{CURRENT}"
    with beside.open("wb") as file:
        file.write(msgspec.json.encode(current))
        file.flush()
        os.fsync(file.fileno())
    beside.rename(catalogue / CURRENT)
    descriptor = os.open(catalogue, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(catalogue: Path) -> None:
    """Removes all that is no version of `current`; under the lock."""
    current = _read_current(catalogue) if catalogue.is_dir() else None
    if current is None:
        shutil.rmtree(catalogue, ignore_errors=True)
        return
    kept = {CURRENT, *(version.file for version in current.versions)}
    for path in catalogue.iterdir():
        if path.name in kept:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
