"""One writer of a name at a time, on one machine, across processes and threads."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def try_locked(path: Path) -> Iterator[bool]:
    """Whether the lock was free, and is now ours. It ends with its process; its file does not stay behind."""
    handle = _taken(path)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)
            handle.close()


def _taken(path: Path) -> IO[bytes] | None:
    while True:
        handle = path.open("ab")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(path.stat(), os.fstat(handle.fileno())):
                return handle
        except BlockingIOError:
            handle.close()
            return None
        except FileNotFoundError:
            pass
        handle.close()  # its last holder removed it between our opening and locking: once more
