"""Files that may be made again: where they lie, and how one is written so that no reader sees half of it."""

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder for this system; not created here."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "headrace"


def read_if_there(path: Path) -> bytes | None:
    """None where the file is absent or cannot be read: then it is made again."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside `path` and renames. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
