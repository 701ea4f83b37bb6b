"""Which machine description fits the GPU in hand."""

from megakernel.cuda_build import runs_on
from megakernel.cuda_device import DeviceFacts
from megakernel.machine import Machine, MachineError, load_machine

MACHINE_OF = {"H100": "h100", "H200": "h200", "GH200": "h100", "L20": "l20", "L4": "l4", "4090": "rtx4090"}
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
    if tuple(map(runs_on, machine.vector_units)) != (facts.architecture,):
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
