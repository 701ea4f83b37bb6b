"""How CUDA programs store activations for the linear ops that read them: kernels/include/cuda/rows.h.

Each is read by one op, and all SMs read all of it: so it is stored in 16 bits, as that op multiplies it. What
is normed is added to, too; it is stored in floats besides.
"""

from collections.abc import Mapping

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.codegen_limits import CodegenError
from megakernel.float_formats import float_values
from megakernel.program import Epilogue, Op, OpKind, Program, Prologue, Space

ATTENDED = "attended"
"""Of the activations: attention's output of heads, splits merged."""
WEIGHTED, SQUARES = "weighted", "squares"
"""Of the activations: what is normed next, weighted and in 16 bits; sums of SQUARED_COLUMNS squares each."""


class StoredActivations(msgspec.Struct, frozen=True):
    """Of one program."""

    formats: Mapping[int, str]
    """By op that writes what a linear op reads: of its elements of two bytes, BF16 or F16."""
    normed_by: Mapping[int, int]
    """By such an op whose reader norms it: the reader. Its own buffer then has floats, as the VM's."""

    def format_of(self, program: Program, name: str) -> str | None:
        """Of a buffer's elements, as the last op leaves them; None of floats."""
        writers = (op for op in self.formats if _written_by(program, program.ops[op]) == name)
        last = max(writers, default=None)
        return None if last is None or last in self.normed_by else self.formats[last]


def stored_activations(program: Program, formats: Mapping[int, str]) -> StoredActivations:
    """`formats`: of each op's matrices, "" where it has none. Raises CodegenError."""
    readers = _readers(program)
    for written, reader in readers.items():
        op, is_normed = program.ops[written], reader.prologue is Prologue.RMS_NORM
        if is_normed != _is_added_to(op):
            how = "normed" if is_normed else "multiplied as it is"
            raise CodegenError(f"{op.name}: its output cannot be {how}, as {reader.name} would have it")
    return StoredActivations(
        formats={written: _rounded_as(formats[reader.index]) for written, reader in readers.items()},
        normed_by={
            written: reader.index
            for written, reader in readers.items()
            if reader.prologue is Prologue.RMS_NORM
        },
    )


def _rounded_as(format: str) -> str:
    """What is multiplied by matrices of the format: all but F16's are BF16 to the tensor cores."""
    return "F16" if format == "F16" else "BF16"


def rounded_values(format: str, halves: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """What matrices of the format are multiplied by."""
    raw = np.ascontiguousarray(halves).reshape(-1).view(np.uint8)
    return float_values(raw, _rounded_as(format)).reshape(halves.shape)


def read_by(program: Program, op: Op) -> str:
    """What its prologue reads; "" for none."""
    if op.kind is not OpKind.LINEAR:
        return ""
    return ATTENDED if op.prologue is Prologue.COMBINE else program.buffers[op.input].name


def _written_by(program: Program, op: Op) -> str:
    if op.kind is OpKind.ATTENTION:
        return ATTENDED
    buffer = program.buffers[op.output]
    return buffer.name if buffer.space is Space.ACTIVATION else ""


def _readers(program: Program) -> dict[int, Op]:
    """By op that writes it: what a linear op reads. Raises CodegenError where two read it, or none has
    written it."""
    last: dict[str, int] = {}
    found: dict[int, Op] = {}
    for op in program.ops:
        if name := read_by(program, op):
            if name not in last:
                raise CodegenError(f"{op.name} reads {name}, which no op before it writes")
            if (other := found.setdefault(last[name], op)) is not op:
                raise CodegenError(f"{other.name} and {op.name} read {name}: only one may")
        last[_written_by(program, op)] = op.index
    return found


def _is_added_to(op: Op) -> bool:
    return op.kind is OpKind.EMBED or op.epilogue is Epilogue.RESIDUAL
