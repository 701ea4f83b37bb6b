"""One writer of a folder at a time, on one machine, and folders that are in use are not removed."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megakernel.artifact import Progress

_RETRY_S = 0.2


@contextmanager
def locked(folder: Path, progress: Progress | None = None) -> Iterator[None]:
    """Waits for whoever writes `folder`, telling `progress`, whose exceptions end the wait. Nothing stays
    behind: the lock is a file beside the folder, and its holder removes it. Raises OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    with _taken(path, progress):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _taken(path: Path, progress: Progress | None) -> IO[bytes]:
    while True:
        file = path.open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, file):
                return file
        except BlockingIOError:
            if progress is not None:
                try:
                    progress("waiting for another process to compile it", 0.0)
                except BaseException:
                    file.close()
                    raise
            time.sleep(_RETRY_S)
        file.close()


def _is_still(path: Path, file: IO[bytes]) -> bool:
    """Not removed by its last holder between our opening and locking it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def hold(file: Path) -> IO[bytes]:
    """Keeps `is_held` true until what is returned is closed. Raises OSError."""
    handle = file.open("rb")
    fcntl.flock(handle, fcntl.LOCK_SH)
    return handle


def is_held(file: Path) -> bool:
    """Raises OSError."""
    with file.open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
