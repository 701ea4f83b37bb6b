"""What a figures file says of the GPU in hand."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from megakernel.build import BuildError
from megakernel.cuda_build import find_nvcc
from megakernel.cuda_device import DeviceFacts
from megakernel.machine import Machine


def described(facts: DeviceFacts, machine: Machine | None) -> dict[str, str | int]:
    """What figures were measured on, for their file. `machine`: what kernels were planned for."""
    return {
        "gpu": facts.name,
        "architecture": facts.architecture,
        "sms": facts.num_sms,
        "memory_gib": round(facts.memory_bytes / 2**30),
        **({"planned_for": machine.name} if machine is not None else {}),
        "driver": _driver_version(),
        "nvcc": _nvcc_version(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
    }


def described_run(
    facts: DeviceFacts, machine: Machine | None, torch_cuda: str | None = None
) -> dict[str, str | int]:
    """`described`, and what differs from run to run. `torch_cuda`: the toolkit that torch was built with,
    where torch has a part in it."""
    clock = _asked_of_gpu("clocks.max.sm")
    return {
        **described(facts, machine),
        **({"cuda": torch_cuda} if torch_cuda else {}),
        **({"max_clock_mhz": int(clock.split()[0])} if clock[:1].isdigit() else {}),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _driver_version() -> str:
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
    except OSError:
        words = []
    found = next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), "")
    return found or _asked_of_gpu("driver_version") or "unknown"


def _asked_of_gpu(field: str) -> str:
    """What nvidia-smi tells of the first GPU; empty where it is not there, or does not know."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _nvcc_version() -> str:
    try:
        lines = find_nvcc().version.strip().splitlines()
    except BuildError:
        return "none"
    return lines[-1] if lines else "unknown"
