"""What an instruction costs wherever it is placed: bytes to load, microseconds to compute."""

from collections.abc import Mapping

import msgspec

from megakernel.footprint import num_k
from megakernel.machine import Machine, MachineError
from megakernel.program import Instruction, Op, Opcode, Program, Prologue, row_step
from megakernel.weight_formats import activation_bits, column_bits, op_formats

DEFAULT_CONTEXT_TOKENS = 512
_KV_ELEMENT_BYTES = 2
_FLOAT_BYTES = 4
CACHE_SPEEDUP = 4.0
"""Activations come from a shared cache: so much faster than a worker reads memory."""
_UNKNOWN_RATE_FORMAT = "BF16"


class Work(msgspec.Struct, frozen=True):
    """What an instruction costs wherever it is placed."""

    load_bytes: float
    compute_us: float
    prologue_us: float
    """Once for a run of instructions of one op: reading and preparing its input rows."""
    refill_us: float = 0.0
    """For another K-tile of the rows in such a run."""
    latency_us: float = 0.0
    """Its own reads after the first, of which each begins when the one before has come."""
    is_direct: bool = False
    """Whether it loads its bytes itself once its waits are satisfied, past the loader."""


def work_of(
    program: Program,
    machine: Machine,
    instruction: Instruction,
    formats: Mapping[str, str] | None = None,
    context_tokens: int = DEFAULT_CONTEXT_TOKENS,
    *,
    is_shared: bool = True,
) -> Work:
    """Bytes and times of one instruction; every row attends to `context_tokens` positions, all rows to the
    same ones if the context `is_shared`."""
    op = program.ops[instruction.op]
    stored = op_formats(op, formats)
    rows = instruction.r1 - instruction.r0
    columns = instruction.n1 - instruction.n0
    match instruction.opcode:
        case Opcode.EMBED:
            bits = column_bits(op, program.geometry, stored, instruction.n0, instruction.n1)
            return Work(rows * bits / 8, 0.0, 0.0)
        case Opcode.REDUCE:
            sums = instruction.num_parts * rows * columns * _FLOAT_BYTES
            return Work(0.0, _cached_read_us(machine, sums), 0.0)
        case Opcode.ATTENTION:
            return _attention_work(program, machine, instruction, context_tokens, is_shared)
        case _:
            k = num_k(op, instruction)
            bits = column_bits(op, program.geometry, stored, instruction.n0, instruction.n1)
            compute_us = max(
                k * columns * grouped_rows(rows, machine) / macs_per_us(machine, name) for name in stored
            )
            read = k if op.prologue is Prologue.NONE else program.buffers[op.input].columns
            if op.prologue is Prologue.COMBINE:
                # On a GPU attention has merged the splits.
                read = k if machine.kind == "cuda" else combined_columns(program, context_tokens)
            kept = rows * k * activation_bits(stored) / 8
            prologue_us = _cached_read_us(machine, rows * read * _FLOAT_BYTES + kept)
            refill_us = _stream_us(machine, rows * k * _FLOAT_BYTES)
            if machine.prepared_per_us is not None:
                prologue_us = max(prologue_us, rows * read / machine.prepared_per_us)
                refill_us = max(refill_us, rows * k / machine.prepared_per_us)
            return Work(k * bits / 8, compute_us, prologue_us, refill_us)


def grouped_rows(rows: int, machine: Machine) -> int:
    """Rows as they are paid for: whole groups."""
    return -(-rows // machine.row_group) * machine.row_group


def macs_per_us(machine: Machine, weight_format: str) -> float:
    """A worker's rate for a format, that of BF16 where the machine does not state it. Raises MachineError."""
    rate = machine.macs_per_us.get(weight_format) or machine.macs_per_us.get(_UNKNOWN_RATE_FORMAT)
    if rate is None:
        raise MachineError(
            f"machine {machine.name!r} states no rate for {weight_format} nor {_UNKNOWN_RATE_FORMAT}"
        )
    return rate


def combined_columns(program: Program, context_tokens: int) -> int:
    """Columns of attention's output that hold something at this context."""
    geometry = program.geometry
    return num_splits(program, context_tokens) * geometry.num_heads * (geometry.head_dim + 2)


def num_splits(program: Program, context_tokens: int) -> int:
    tokens = min(context_tokens, program.geometry.max_context_tokens)
    return max(1, -(-tokens // program.split_tokens))


def _attention_work(
    program: Program, machine: Machine, instruction: Instruction, context_tokens: int, is_shared: bool
) -> Work:
    """Its splits' share of the context."""
    if machine.kind == "cuda":
        return _direct_attention_work(program, machine, instruction, context_tokens, is_shared)
    geometry = program.geometry
    rows = instruction.r1 - instruction.r0
    splits = range(instruction.part, num_splits(program, context_tokens), instruction.num_parts)
    tokens = sum(_split_length(program, context_tokens, split) for split in splits)
    kv_heads = instruction.n1 - instruction.n0
    elements = 2 * tokens * kv_heads * geometry.head_dim
    num_contexts = 1 if is_shared else rows
    load_bytes = elements * num_contexts * _KV_ELEMENT_BYTES
    group = geometry.num_heads // geometry.num_kv_heads
    rate = machine.attention_macs_per_us or macs_per_us(machine, "F16")
    compute_us = elements * group * rows / rate
    queries_us = _cached_read_us(machine, rows * kv_heads * group * geometry.head_dim * _FLOAT_BYTES)
    return Work(load_bytes, compute_us, queries_us)


def _direct_attention_work(
    program: Program, machine: Machine, instruction: Instruction, context_tokens: int, is_shared: bool
) -> Work:
    """A GPU's: its splits of all rows, one after the other; then those of a row are merged."""
    geometry = program.geometry
    step = row_step(program.kind, program.bucket, instruction.num_parts)
    splits = num_splits(program, context_tokens)
    own = [
        (row, split)
        for row in range(instruction.r0, instruction.r1)
        for split in range(
            (instruction.part - row * step) % instruction.num_parts, splits, instruction.num_parts
        )
    ]
    if not own:
        return Work(0.0, 0.0, 0.0)
    kv_heads = instruction.n1 - instruction.n0
    heads = kv_heads * geometry.num_heads // geometry.num_kv_heads
    token_elements = 2 * kv_heads * geometry.head_dim
    tokens = sum(_split_length(program, context_tokens, split) for _, split in own)
    # Of rows that share a context, the first brings it to the cache.
    is_first = [row == instruction.r0 or not is_shared for row, _ in own]
    first_tokens = sum(
        _split_length(program, context_tokens, split)
        for (_, split), is_own in zip(own, is_first, strict=True)
        if is_own
    )
    rate = machine.attention_macs_per_us or macs_per_us(machine, "F16")
    compute_us = token_elements * tokens * (heads // kv_heads) / rate
    queries_us = _cached_read_us(machine, len(own) * heads * geometry.head_dim * _FLOAT_BYTES)
    again_us = _stream_us(machine, token_elements * (tokens - first_tokens) * _KV_ELEMENT_BYTES)
    waits_us = (len(own) - 1) * machine.load_latency_us
    merged_bytes = splits * heads * (geometry.head_dim + 2) * _FLOAT_BYTES
    merge_us = machine.load_latency_us + _cached_read_us(machine, merged_bytes) if splits > 1 else 0.0
    return Work(
        token_elements * first_tokens * _KV_ELEMENT_BYTES,
        compute_us,
        0.0,
        latency_us=queries_us + again_us + waits_us + merge_us,
        is_direct=True,
    )


def _split_length(program: Program, context_tokens: int, split: int) -> int:
    return min(program.split_tokens, context_tokens - split * program.split_tokens)


def _cached_read_us(machine: Machine, num_bytes: float) -> float:
    if not num_bytes:
        return 0.0
    return machine.load_latency_us + _stream_us(machine, num_bytes)


def _stream_us(machine: Machine, num_bytes: float) -> float:
    return num_bytes / (machine.worker_bandwidth_gb_s * 1e3 * CACHE_SPEEDUP)


class WorkTable:
    """Work by instruction, computed once for tiles that are alike in all layers."""

    def __init__(
        self,
        program: Program,
        machine: Machine,
        formats: Mapping[str, str] | None,
        context_tokens: int,
        *,
        is_shared: bool = True,
    ) -> None:
        self._program = program
        self._machine = machine
        self._formats = formats
        self._context_tokens = context_tokens
        self._is_shared = is_shared
        self._alike = [_alike(op, formats) for op in program.ops]
        self._known: dict[tuple[object, ...], Work] = {}

    def __call__(self, instruction: Instruction) -> Work:
        key = (
            self._alike[instruction.op],
            instruction.opcode,
            instruction.n0,
            instruction.n1,
            instruction.k1 - instruction.k0,
            instruction.part if instruction.opcode is Opcode.ATTENTION else 0,
            instruction.num_parts,
            instruction.r1 - instruction.r0,
        )
        work = self._known.get(key)
        if work is None:
            work = self._known[key] = work_of(
                self._program,
                self._machine,
                instruction,
                self._formats,
                self._context_tokens,
                is_shared=self._is_shared,
            )
        return work


def _alike(op: Op, formats: Mapping[str, str] | None) -> tuple[object, ...]:
    return (op.kind, op.prologue, op.epilogue, op.in_features, op.out_features, op_formats(op, formats))


def step_bytes(
    program: Program,
    machine: Machine,
    formats: Mapping[str, str] | None = None,
    context_tokens: int = DEFAULT_CONTEXT_TOKENS,
    *,
    is_shared: bool = True,
) -> float:
    """Of weights and KV, what a step must read."""
    works = WorkTable(program, machine, formats, context_tokens, is_shared=is_shared)
    return sum(works(instruction).load_bytes for worker in program.workers for instruction in worker)
