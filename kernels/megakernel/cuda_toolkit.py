"""Where NVIDIA's command line tools lie: a toolkit of the system, or the wheels of the extra `cuda-tools`."""

import functools
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megakernel.build import BuildError

_WHEEL_FOLDERS = ("cu13",)
"""In the package `nvidia`: what wheels of one major version share."""


class ToolMissingError(BuildError):
    """No such tool; the message says what brings it."""


def find_tool(name: str) -> Path:
    """CUDA_HOME first, which somebody chose; then the path, then wheels. Raises ToolMissingError."""
    for path in _candidates(name):
        if path.is_file() and os.access(path, os.X_OK):
            return path
    raise ToolMissingError(
        f"no {name}: neither CUDA_HOME nor the path has it. Install a CUDA toolkit of version 13, or the "
        "wheels with it: pip install 'headrace[cuda-tools]'"
    )


def _candidates(name: str) -> Iterator[Path]:
    if home := os.environ.get("CUDA_HOME"):
        yield Path(home) / "bin" / name
    if found := shutil.which(name):
        yield Path(found)
    yield from (folder / "bin" / name for folder in _wheel_folders())


@functools.lru_cache(maxsize=1)
def _wheel_folders() -> tuple[Path, ...]:
    package = importlib.util.find_spec("nvidia")
    roots = package.submodule_search_locations if package is not None else None
    return tuple(Path(root) / folder for root in roots or () for folder in _WHEEL_FOLDERS)
