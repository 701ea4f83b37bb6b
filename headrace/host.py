"""What this machine has, found out without importing torch."""

import os
from importlib import metadata
from pathlib import Path


def num_cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0))


def has_nvidia_device() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def has_cuda() -> bool:
    """A device, and a torch that is not built for CPUs alone."""
    if not has_nvidia_device():
        return False
    try:
        return not metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False
