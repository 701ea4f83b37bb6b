"""Reads an artifact's folder: is it whole, is it for what is wanted, and how a Runtime is opened from it."""

import hashlib
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.codegen_limits import KvFormat
from megakernel.compiled import Compiled
from megakernel.cpu_identity import CpuIdentity, this_cpu
from megakernel.manifest import (
    LIBRARY,
    PROGRAMS,
    STEP_TABLE,
    WEIGHTS,
    ArtifactDamagedError,
    ArtifactMismatchError,
    Manifest,
    check_entry,
    check_file,
    check_size,
    read_manifest,
)
from megakernel.program import Program
from megakernel.step_times import StepTable

_CHUNK_BYTES = 8 << 20


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What an artifact must be for, to be of use to one worker. None: any."""

    fingerprint: str
    kv_format: KvFormat | None
    num_workers: int | None


class Artifact(msgspec.Struct, frozen=True):
    """A folder whose manifest has been read; its other files only where `verify` says so."""

    folder: Path
    manifest: Manifest

    def check_for(self, wanted: Wanted, cpu: CpuIdentity | None = None) -> None:
        """Raises ArtifactMismatchError; `cpu` None: this machine's."""
        manifest = self.manifest
        if manifest.model_fingerprint != wanted.fingerprint:
            raise ArtifactMismatchError(
                f"{self.folder} is of the model {manifest.model} with the fingerprint "
                f"{manifest.model_fingerprint}, the model to serve has {wanted.fingerprint}: compile that one"
            )
        if reason := manifest.cpu.unfit_for(cpu or this_cpu()):
            raise ArtifactMismatchError(f"{self.folder} cannot run here: {reason}. Compile the model here")
        if wanted.kv_format not in (None, manifest.kv_format):
            raise ArtifactMismatchError(
                f"{self.folder} keeps KV as {manifest.kv_format}, wanted is {wanted.kv_format}: set "
                f"`model.kv_dtype` to {manifest.kv_format}, or compile with --kv-dtype {wanted.kv_format}"
            )
        if wanted.num_workers not in (None, manifest.num_workers):
            raise ArtifactMismatchError(
                f"{self.folder} is for {manifest.num_workers} threads, wanted are {wanted.num_workers}: set "
                f"`num_threads` to {manifest.num_workers}, or compile with --threads {wanted.num_workers}"
            )

    def verify(self) -> None:
        """Reads every file. Raises ArtifactDamagedError."""
        for name in self.manifest.files:
            check_file(self.folder, name, self.manifest)

    def step_table(self) -> StepTable:
        """Raises ArtifactDamagedError."""
        check_file(self.folder, STEP_TABLE, self.manifest)
        return msgspec.json.decode((self.folder / STEP_TABLE).read_bytes(), type=StepTable)

    def load(self) -> Compiled:
        """Programs and library are checked here, the weights while a Runtime reads them.

        The programs were proved when the artifact was built: the checksum stands for the proof. Raises
        ArtifactDamagedError, as does `Compiled.fill_weights`.
        """
        manifest = self.manifest
        for name in (PROGRAMS, LIBRARY):
            check_file(self.folder, name, manifest)
        check_size(self.folder, WEIGHTS, manifest)
        programs = msgspec.msgpack.decode((self.folder / PROGRAMS).read_bytes(), type=tuple[Program, ...])
        return Compiled(
            programs=programs,
            shape=manifest.shape,
            kv_format=manifest.kv_format,
            layout=manifest.layout,
            buffer_offsets=manifest.buffer_offsets,
            library=(self.folder / LIBRARY).absolute(),
            fill_weights=partial(_read_weights, self),
        )


def open_artifact(folder: Path) -> Artifact:
    """Reads the manifest alone. Raises ArtifactDamagedError, ArtifactMismatchError for another format."""
    return Artifact(folder, read_manifest(folder))


def _read_weights(artifact: Artifact, out: npt.NDArray[np.uint8]) -> None:
    """Straight into `out`, summed up on the way. Raises ArtifactDamagedError."""
    num_bytes = check_size(artifact.folder, WEIGHTS, artifact.manifest)
    assert len(out) == num_bytes, f"{len(out)} bytes for a file of {num_bytes}"
    digest = hashlib.blake2b(digest_size=32)
    view = out.data
    start = 0
    try:
        with (artifact.folder / WEIGHTS).open("rb", buffering=0) as file:
            while start < num_bytes:
                count = file.readinto(view[start : start + _CHUNK_BYTES])
                if not count:
                    break
                digest.update(view[start : start + count])
                start += count
    except OSError as error:
        raise ArtifactDamagedError(f"{artifact.folder / WEIGHTS}: {error.strerror}") from None
    check_entry(artifact.folder, WEIGHTS, artifact.manifest, digest.hexdigest())
