"""Which machine description fits the GPU in hand, and what a figures file says of it."""

import platform
from importlib import metadata
from pathlib import Path

from megakernel.build import BuildError
from megakernel.cuda_build import find_nvcc
from megakernel.cuda_device import DeviceFacts
from megakernel.machine import Machine, MachineError, load_machine

MACHINE_OF = {"H100": "h100", "H200": "h100", "GH200": "h100", "L20": "l20", "L4": "l4", "4090": "rtx4090"}
"""By a word of the GPU's name; descriptions are packaged under `megakernel/machines`."""


def pick_machine(facts: DeviceFacts, path: str | None = None) -> Machine:
    """`path`: of a description that was written for this GPU. Raises MachineError where none fits."""
    machine = load_machine(path) if path else _packaged(facts)
    problems = []
    if machine.num_workers > facts.num_sms:
        problems.append(f"it has {facts.num_sms} SMs, {machine.name} {machine.num_workers}")
    if machine.scratch_bytes > facts.shared_bytes:
        problems.append(
            f"its blocks have {facts.shared_bytes} bytes of shared memory, there {machine.scratch_bytes}"
        )
    if machine.vector_units != (facts.architecture,):
        problems.append(f"it is {facts.architecture}, {machine.name} {' '.join(machine.vector_units)}")
    if problems:
        raise MachineError(f"{facts.name} is no {machine.name}: {'; '.join(problems)}. {_HOW_TO_DESCRIBE}")
    return machine


_HOW_TO_DESCRIBE = (
    "Describe it: copy the nearest of megakernel/machines/*.json, set num_workers to its SMs, scratch_bytes "
    "to what a block may have of shared memory, bandwidth_gb_s and vector_units (docs/machines.md), and give "
    "the file as --machine FILE.json"
)


def _packaged(facts: DeviceFacts) -> Machine:
    words = facts.name.upper().split()
    for word, name in MACHINE_OF.items():
        if word in words:
            return load_machine(name)
    raise MachineError(
        f"no description is packaged of {facts.name} ({facts.num_sms} SMs). {_HOW_TO_DESCRIBE}"
    )


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
