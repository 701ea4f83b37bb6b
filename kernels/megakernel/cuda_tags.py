"""Which activations of a CUDA program are not plain floats: see kernels/include/cuda/tagged.h.

What only one op multiplies, and multiplies as it is, is stored in 16 bits. In steps of few rows values carry
their op's number: who reads them looks at the values themselves and waits for no counter, which takes more
bytes. In steps of more rows, what is normed next is stored a second time, as that op multiplies it.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.float_formats import FLOAT_BYTES, float_values
from megakernel.program import Epilogue, Instruction, Op, OpKind, Program, Prologue, Space

MOST_TAGGED_ROWS = 4
"""Of a bucket: all SMs read the whole input, and what tags save of a wait they cost in bytes of L2."""
PACKET_BYTES = 8
_ALIGNMENT = 256

Holds = Literal["floats", "pairs"]
"""A packet has a float, or two neighbours, rounded as the products of the op that reads them take them."""


class TaggedBuffer(msgspec.Struct, frozen=True):
    offset: int
    """Bytes into an artifact's tagged activations."""
    columns: int
    """Elements a row."""
    holds: Holds
    format: str
    """Of the matrices that pairs are multiplied by; "" of floats."""

    def num_bytes(self, rows: int) -> int:
        return rows * self.columns * PACKET_BYTES // (2 if self.holds == "pairs" else 1)


class Tags(msgspec.Struct, frozen=True):
    """Of one program."""

    num_ops: int
    buffers: Mapping[str, TaggedBuffer]
    """By the buffer's name; ATTENDED is what attention makes of its splits."""
    writers: Mapping[int, int]
    """By op with a tagged input: who wrote that."""
    held: Mapping[int, int]
    """By op that adds to its output: who wrote what it adds to."""
    counters: Mapping[int, frozenset[int]]
    """By op: those that it alone signals."""
    num_bytes: int
    pairs: Mapping[str, str]
    """By name: buffers of two bytes an element, where they would have floats, and the format of the matrices
    that they are multiplied by."""
    normed_by: Mapping[int, int]
    """By op that writes what is stored a second time: whose norm that is for."""

    def is_needless(self, op: int, counter: int) -> bool:
        """Whether a wait of the op for that counter says no more than its tagged input does."""
        return op in self.writers and counter in self.counters.get(self.writers[op], ())


ATTENDED = "attended"
"""Of the activations: attention's output of heads, splits merged."""
WEIGHTED, SQUARES = "weighted", "squares"
"""Of the activations: what is normed next, weighted and in 16 bits; sums of SQUARED_COLUMNS squares each."""


def op_of(tags: Tags, number: int, epoch: int) -> int:
    """Whose values carry the number, if that is of the epoch; else none of the program's: see Tag::of."""
    return ((number >> 1) - epoch * tags.num_ops) & 0x7FFFFFFF


def values_of(buffer: TaggedBuffer, packets: npt.NDArray[np.uint64]) -> npt.NDArray[np.float32]:
    """Without their numbers, in order."""
    low = (packets & 0xFFFFFFFF).astype(np.uint32)
    return (
        low.view(np.float32)
        if buffer.holds == "floats"
        else rounded_values(buffer.format, low.view(np.uint16))
    )


def rounded_values(format: str, halves: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """What matrices of the format are multiplied by."""
    raw = np.ascontiguousarray(halves).reshape(-1).view(np.uint8)
    return float_values(raw, "F16" if format == "F16" else "BF16").reshape(halves.shape)


def numbers_of(packets: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    return (packets >> 32).astype(np.uint32)


def tags_of(program: Program, formats: Mapping[int, str], start: int, most_rows: int) -> Tags:
    """None is tagged of a program of more than `most_rows`. `formats`: of each op's matrices, "" where it has
    none; `start`: bytes of earlier programs' buffers."""
    found = dict(_buffers(program, formats))
    pairs = {}
    if program.bucket > most_rows:
        pairs = {name: buffer.format for name, buffer in found.items() if buffer.holds == "pairs"}
        found = {}
    buffers, end = {}, start
    for name, buffer in found.items():
        buffers[name] = msgspec.structs.replace(buffer, offset=end)
        end += -(-buffer.num_bytes(program.bucket) // _ALIGNMENT) * _ALIGNMENT
    writers, held = {}, {}
    last: dict[str, int] = {}
    for op in program.ops:
        if (source := read_by(program, op)) in buffers:
            writers[op.index] = last[source]
        if (target := written_by(program, op)) in buffers:
            if op.epilogue is Epilogue.RESIDUAL and op.kind is OpKind.LINEAR:
                held[op.index] = last[target]
            last[target] = op.index
    return Tags(
        num_ops=len(program.ops),
        buffers=buffers,
        writers=writers,
        held=held,
        counters=_counters(program),
        num_bytes=end - start,
        pairs=pairs,
        normed_by=_normed_by(program, formats, buffers),
    )


def without_needless(program: Program, tags: Tags) -> Program:
    """The waits in whose place values tell, and signals that nobody waits for any more, left out."""

    def kept(instruction: Instruction) -> Instruction:
        waits = tuple(w for w in instruction.waits if not tags.is_needless(instruction.op, w.counter))
        return msgspec.structs.replace(instruction, waits=waits)

    workers = [[kept(instruction) for instruction in worker] for worker in program.workers]
    awaited = {wait.counter for worker in workers for instruction in worker for wait in instruction.waits}

    def told(instruction: Instruction) -> Instruction:
        return (
            instruction if instruction.signal in awaited else msgspec.structs.replace(instruction, signal=-1)
        )

    return msgspec.structs.replace(
        program, workers=tuple(tuple(told(instruction) for instruction in worker) for worker in workers)
    )


def read_by(program: Program, op: Op) -> str:
    """What its prologue reads; "" for none."""
    if op.kind is not OpKind.LINEAR:
        return ""
    return ATTENDED if op.prologue is Prologue.COMBINE else program.buffers[op.input].name


def written_by(program: Program, op: Op) -> str:
    if op.kind is OpKind.ATTENTION:
        return ATTENDED
    buffer = program.buffers[op.output]
    return buffer.name if buffer.space is Space.ACTIVATION else ""


def _buffers(program: Program, formats: Mapping[int, str]) -> Iterator[tuple[str, TaggedBuffer]]:
    """Those that only ops write and read that can."""
    for name in dict.fromkeys(written_by(program, op) for op in program.ops):
        writing = [op for op in program.ops if name and written_by(program, op) == name]
        reading = [op for op in program.ops if read_by(program, op) == name]
        if not writing or not reading:
            continue
        if all(_writes_floats(op) for op in writing) and all(
            op.prologue is Prologue.RMS_NORM for op in reading
        ):
            yield name, TaggedBuffer(0, reading[0].in_features, "floats", "")
        is_rounded = all(op.prologue is not Prologue.RMS_NORM for op in reading)
        rounded_as = {"f16" if formats[op.index] == "F16" else "bf16" for op in reading}
        if all(_writes_pairs(op) for op in writing) and is_rounded and len(rounded_as) == 1:
            yield name, TaggedBuffer(0, reading[0].in_features, "pairs", formats[reading[0].index])


def _normed_by(program: Program, formats: Mapping[int, str], tagged: Collection[str]) -> dict[int, int]:
    """Of ops whose output one op reads before it is written again, as a norm's input, and multiplies by
    floats: kernels of quantized weights have no registers left for it."""
    found: dict[int, int] = {}
    last: dict[str, int] = {}
    readers: dict[int, list[Op]] = {}
    for op in program.ops:
        if source := read_by(program, op):
            readers.setdefault(last.get(source, -1), []).append(op)
        last[written_by(program, op)] = op.index
    for op in program.ops:
        if not _writes_floats(op) or written_by(program, op) in tagged:
            continue
        match readers.get(op.index, []):
            case [reader] if reader.prologue is Prologue.RMS_NORM and formats[reader.index] in FLOAT_BYTES:
                found[op.index] = reader.index
    return found


def _writes_floats(op: Op) -> bool:
    return op.kind is OpKind.EMBED or (op.kind is OpKind.LINEAR and op.epilogue is Epilogue.RESIDUAL)


def _writes_pairs(op: Op) -> bool:
    return op.kind is OpKind.ATTENTION or (op.kind is OpKind.LINEAR and op.epilogue is Epilogue.SWIGLU)


def _counters(program: Program) -> dict[int, frozenset[int]]:
    signalling: dict[int, set[int]] = {}
    for instruction in _instructions(program):
        if instruction.signal >= 0:
            signalling.setdefault(instruction.signal, set()).add(instruction.op)
    found: dict[int, frozenset[int]] = {}
    for counter, ops in signalling.items():
        if len(ops) == 1:
            (op,) = ops
            found[op] = found.get(op, frozenset()) | {counter}
    return found


def _instructions(program: Program) -> Iterator[Instruction]:
    return (instruction for worker in program.workers for instruction in worker)
