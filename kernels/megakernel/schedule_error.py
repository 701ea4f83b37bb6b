"""What a schedule is refused for, and how an error names an instruction of it."""

from enum import StrEnum

from megakernel.program import Opcode, Program


class Hazard(StrEnum):
    STRUCTURE = "structure"
    """A range, index or opcode that makes no sense."""
    COVERAGE = "coverage"
    """Part of an op's output is computed never or twice."""
    DEADLOCK = "deadlock"
    SCRATCH = "scratch"
    """Two uses of a page at once, or a page that does not exist."""
    RAW = "read after write"
    WAR = "write after read"
    WAW = "write after write"


class ScheduleError(ValueError):
    """A program that must not run; the message names the instructions and what they would do."""

    def __init__(self, hazard: Hazard, message: str) -> None:
        super().__init__(f"{hazard}: {message}")
        self.hazard = hazard


def instruction_name(program: Program, worker: int, index: int) -> str:
    """Such as `layers.0.qkv LINEAR columns [0, 32) rows [0, 1) (worker 3, instruction 12)`."""
    instruction = program.workers[worker][index]
    is_known = 0 <= instruction.op < len(program.ops)
    op = program.ops[instruction.op].name if is_known else f"op {instruction.op}"
    columns = "heads" if instruction.opcode is Opcode.ATTENTION else "columns"
    parts = ""
    if instruction.opcode in (Opcode.LINEAR_PARTIAL, Opcode.ATTENTION):
        parts = f" part {instruction.part}"
    if instruction.opcode is Opcode.LINEAR_ACCUMULATE or (
        instruction.opcode is Opcode.LINEAR and instruction.k0
    ):
        parts = f" K [{instruction.k0}, {instruction.k1})"
    return (
        f"{op} {instruction.opcode.name} {columns} [{instruction.n0}, {instruction.n1})"
        f" rows [{instruction.r0}, {instruction.r1}){parts} (worker {worker}, instruction {index})"
    )
