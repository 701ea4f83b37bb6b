"""A compiled catalogue from the router that has it, onto this machine: whole and checked, or not at all."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import grpc

from cluster.catalogue.file_format import CatalogueFileError, MappedFile
from cluster.messages import CatalogueRef
from cluster.transfer.channels import CHANNEL_OPTIONS
from cluster.wire import headrace_pb2 as pb
from cluster.wire.headrace_pb2_grpc import CataloguesStub

CHUNK_BYTES = 1024 * 1024
MAX_FETCHED_BYTES = 64 * 1024**3
FETCH_TIMEOUT_S = 600.0


class FetchError(Exception):
    """The catalogue could not be had; the message says why. Another worker may have it."""


def fetch_catalogue(ref: CatalogueRef, target: Path, *, timeout_s: float = FETCH_TIMEOUT_S) -> None:
    """Blocks; for a thread that may. Afterwards `target` is the catalogue, or as it was.

    Raises FetchError.
    """
    if not ref.fetch_address:
        raise FetchError(f"catalogue `{ref.name}` is not on this machine, and nobody is named who serves it")
    if not 0 < ref.num_bytes <= MAX_FETCHED_BYTES:
        raise FetchError(f"catalogue `{ref.name}` of {ref.num_bytes} bytes; at most {MAX_FETCHED_BYTES}")
    part = target.with_name(f".{target.name}.{secrets.token_hex(6)}.part")
    try:
        with part.open("xb") as file:
            _receive(ref, file, timeout_s)
            file.flush()
            os.fsync(file.fileno())
        _check(ref, part)
        os.replace(part, target)
    except OSError as error:
        raise FetchError(
            f"catalogue `{ref.name}` cannot be kept in {target.parent}: {error.strerror}"
        ) from None
    finally:
        part.unlink(missing_ok=True)


def _receive(ref: CatalogueRef, file: BinaryIO, timeout_s: float) -> None:
    _reserve(file, ref.num_bytes)
    num_bytes = 0
    for data in _chunks(ref, timeout_s):
        num_bytes += len(data)
        if num_bytes > ref.num_bytes:
            raise FetchError(f"catalogue `{ref.name}`: more than the {ref.num_bytes} bytes announced")
        file.write(data)
    if num_bytes != ref.num_bytes:
        raise FetchError(f"catalogue `{ref.name}`: {num_bytes} bytes of {ref.num_bytes}")


def _reserve(file: BinaryIO, num_bytes: int) -> None:
    """Find out now that a disk is full, not after minutes."""
    try:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _chunks(ref: CatalogueRef, timeout_s: float) -> Iterator[bytes]:
    request = pb.FetchCatalogueRequest(name=ref.name, version=ref.version, checksum=ref.checksum)
    with contextlib.closing(grpc.insecure_channel(ref.fetch_address, CHANNEL_OPTIONS)) as channel:
        call = CataloguesStub(channel).Fetch(request, timeout=timeout_s)
        try:
            for chunk in call:
                yield chunk.data
        except grpc.RpcError as error:
            message = f"catalogue `{ref.name}` from {ref.fetch_address}: {call.code().name}: {call.details()}"
            raise FetchError(message) from error
        finally:
            call.cancel()


def _check(ref: CatalogueRef, path: Path) -> None:
    try:
        checksum = MappedFile(path, verify=True).preamble.checksum
    except CatalogueFileError as error:
        raise FetchError(f"catalogue `{ref.name}` came damaged: {error}") from None
    if checksum != ref.checksum:
        raise FetchError(
            f"catalogue `{ref.name}`: the file has checksum {checksum}, {ref.checksum} was asked for"
        )
