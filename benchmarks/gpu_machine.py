"""What a figures file says of the GPU in hand."""

import platform
from importlib import metadata
from pathlib import Path

from megakernel.build import BuildError
from megakernel.cuda_build import find_nvcc
from megakernel.cuda_device import DeviceFacts
from megakernel.machine import Machine


def described(facts: DeviceFacts, machine: Machine) -> dict[str, str | int]:
    """What figures were measured on, for their file."""
    return {
        "gpu": facts.name,
        "architecture": facts.architecture,
        "sms": facts.num_sms,
        "memory_gib": round(facts.memory_bytes / 2**30),
        "planned_for": machine.name,
        "driver": _driver_version(),
        "nvcc": _nvcc_version(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
    }


def _driver_version() -> str:
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
    except OSError:
        return "unknown"
    return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), "unknown")


def _nvcc_version() -> str:
    try:
        lines = find_nvcc().version.strip().splitlines()
    except BuildError:
        return "none"
    return lines[-1] if lines else "unknown"
