"""The frozen program: what the compiler ends in, and all that validator, VM and both backends read.

A program is for one model, one machine and one row bucket. It is a graph of ops (what is computed), one
instruction sequence a worker (who computes which tile, in which order), and counters (who waits for whom).
Nothing is decided when it runs: the only run-time values are row data and lengths.

The order of arithmetic is part of the program, so that a row's result is the same bits in every program of
an artifact: K-tiles of a linear op are summed in ascending order, attention is split by absolute position
every `split_tokens` and its splits are combined in ascending order. Neither depends on bucket or workers.
"""

from enum import IntEnum, StrEnum
from typing import Literal

import msgspec


class OpKind(StrEnum):
    """What a graph node computes. Shapes are per row; `x` is the input row."""

    EMBED = "embed"
    """hidden = embedding[token id]."""
    LINEAR = "linear"
    """prologue(x), times weights, epilogue: see Prologue and Epilogue."""
    ATTENTION = "attention"
    """For each head and split of the row's positions: max score, sum of exponentials, weighted values."""


class Prologue(StrEnum):
    """What a linear op does to its whole input row before multiplying; each worker does it for itself."""

    NONE = "none"
    RMS_NORM = "rms_norm"
    """Root-mean-square norm with the op's norm weight."""
    COMBINE = "combine"
    """Merge the attention splits of each head, ascending, into the head's output."""


class Epilogue(StrEnum):
    """What a linear op does with a finished tile of its output columns."""

    STORE = "store"
    ROPE_APPEND = "rope_append"
    """Columns are Q heads, then K heads, then V heads: add bias, norm Q and K heads (QK norm), rotate Q and
    K, scale Q by head_dim ** -0.5; Q goes to the output buffer, K and V to the row's slot of the KV pool.

    On CUDA several tiles may make up a head (`fits_heads`): the instruction that brings the last of its sums
    finishes it. Each counts as writing its own columns all the same; but a column is there, and stays as it
    is, only once all tiles of its head are done. So who touches one of a head's columns next must come after
    all of them: the validator sees to that."""
    RESIDUAL = "residual"
    """Add to the output buffer (the hidden state) in place."""
    SWIGLU = "swiglu"
    """Columns alternate gate and up in groups of `Program.swiglu_group`: silu(gate) * up."""
    LOGITS = "logits"
    """Store the logits, and for every `Program.stats_span` columns, counted from column 0: the maximum (a NaN
    where there is one), its column (the lowest of equals), and the log-sum-exp. Of a row that the step
    restricts to allowed tokens only their logits, the same bits, and no statistics."""


class Space(StrEnum):
    ACTIVATION = "activation"
    """[bucket, columns] float32, between ops."""
    KV = "kv"
    """Of one layer: columns are K heads, then V heads, in head_dim each; rows are the step's rows. Only what
    the step appends: the committed context is never written while it is read."""
    INPUT = "input"
    OUTPUT = "output"


class Buffer(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    name: str
    space: Space
    columns: int
    """Elements a row."""


class Op(msgspec.Struct, frozen=True, kw_only=True):
    """One graph node, with everything its tiles have in common."""

    index: int
    kind: OpKind
    name: str
    """Such as `layers.3.qkv`; what traces, reports and errors call it."""
    layer: int
    """-1 outside the layers."""
    input: int
    """Buffer index."""
    output: int
    """Buffer index; for ROPE_APPEND the Q buffer."""
    kv: int = -1
    """The layer's KV buffer, for ROPE_APPEND (written) and ATTENTION (read)."""
    stats: int = -1
    """For LOGITS: the buffer of (maximum, column, log-sum-exp) by span."""
    in_features: int = 0
    out_features: int = 0
    weights: tuple[str, ...] = ()
    """Names in `megakernel.model.weights`, concatenated by rows (Q, K, V) or, for SWIGLU, alternated."""
    biases: tuple[str, ...] = ()
    norm: str = ""
    """Weight of the RMS_NORM prologue."""
    head_norms: tuple[str, ...] = ()
    """(q_norm, k_norm) where the model norms heads."""
    prologue: Prologue = Prologue.NONE
    epilogue: Epilogue = Epilogue.STORE


class Opcode(IntEnum):
    """What one instruction does."""

    EMBED = 0
    LINEAR = 1
    """Columns [n0, n1) over the whole of K, through the epilogue; where a tile's weights come in blocks of K,
    over the last, [k0, k1), after a LINEAR_ACCUMULATE for each other one."""
    LINEAR_PARTIAL = 2
    """Columns [n0, n1) over [k0, k1): the sum goes to K-tile `part` of the op's partial buffer."""
    REDUCE = 3
    """Sum the parts of columns [n0, n1) ascending, through the epilogue."""
    ATTENTION = 4
    """KV heads [n0, n1), those splits whose block (`split_block`) is `part` modulo `num_parts`."""
    LINEAR_ACCUMULATE = 5
    """Columns [n0, n1) over [k0, k1): added to sums that the worker keeps for its next instruction, which
    goes on with the same tile."""


class PageRole(StrEnum):
    WEIGHTS = "weights"
    INPUT = "input"
    OUTPUT = "output"


class PageUse(msgspec.Struct, frozen=True):
    """Scratch pages [first, first + count) of the worker, held from the start of instruction `live_from` (in
    the worker's order: earlier than its own, where weights are loaded ahead) to the end of its own."""

    role: PageRole
    first: int
    count: int
    live_from: int


class Wait(msgspec.Struct, frozen=True):
    """Before the instruction: until `counter` has reached `target` arrivals in this step."""

    counter: int
    target: int


class Instruction(msgspec.Struct, frozen=True, kw_only=True):
    """A tile of an op on one worker. Ranges are half-open."""

    opcode: Opcode
    op: int
    n0: int
    n1: int
    k0: int = 0
    k1: int = 0
    part: int = 0
    num_parts: int = 1
    x0: int = 0
    x1: int = 0
    """Of a linear tile's input, what of K is in its pages; 0, 0: all."""
    r0: int = 0
    r1: int
    """Rows of the bucket."""
    waits: tuple[Wait, ...] = ()
    signal: int = -1
    """Counter that gets one arrival when the instruction's writes are visible; -1: none."""
    pages: tuple[PageUse, ...] = ()


class Geometry(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of the model that ops share."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context_tokens: int
    rms_norm_eps: float


class Program(msgspec.Struct, frozen=True, kw_only=True):
    model_fingerprint: str
    machine: str
    bucket: int
    geometry: Geometry
    split_tokens: int
    swiglu_group: int
    stats_span: int
    buffers: tuple[Buffer, ...]
    ops: tuple[Op, ...]
    partial_buffers: tuple[int, ...]
    """By op: the buffer of its K-tiles ([bucket, parts * out_features]), or -1."""
    workers: tuple[tuple[Instruction, ...], ...]
    """Each worker's instructions, in order."""
    num_counters: int
    num_pages: int
    page_bytes: int
    kind: Literal["cpu", "cuda"] = "cpu"
    """Whose kernels run it (`Machine.kind`): what a tile needs of scratch memory is theirs to say."""


class Access(msgspec.Struct, frozen=True):
    """A rectangle of a buffer: columns [c0, c1) of rows [r0, r1)."""

    buffer: int
    c0: int
    c1: int
    r0: int
    r1: int


def max_splits(program: Program) -> int:
    return -(-program.geometry.max_context_tokens // program.split_tokens)


def attention_parts(num_workers: int, num_splits: int) -> int:
    """Instructions that the splits of one group of KV heads are dealt to."""
    return min(num_workers, num_splits)


def parts_of(program: Program) -> int:
    return attention_parts(len(program.workers), max_splits(program))


def split_blocks(kind: str, num_splits: int, num_parts: int) -> int:
    """Of an attention output buffer: one a split, and on CUDA whole rounds of parts."""
    return -(-num_splits // num_parts) * num_parts if kind == "cuda" else num_splits


def row_step(program: Program) -> int:
    """How many parts on the next row's first split is: 0, or so many that a step's rows spread over all."""
    if program.kind != "cuda":
        return 0
    # So many parts of all KV heads are one instruction a worker.
    return max(1, len(program.workers) // program.geometry.num_kv_heads // program.bucket)


def split_block(program: Program, row: int, split: int) -> int:
    """Where in an attention output buffer a row's split lies."""
    blocks = split_blocks(program.kind, max_splits(program), parts_of(program))
    return (split + row * row_step(program)) % blocks


def attention_columns(geometry: Geometry, num_blocks: int) -> int:
    """Columns of an attention output buffer: for each block and head, maximum, sum, and head_dim values."""
    return num_blocks * geometry.num_heads * (geometry.head_dim + 2)


def fits_heads(columns: int, head_dim: int) -> bool:
    """Whether tiles of so many columns are whole heads, or several of them exactly one; always, where there
    are no heads (0)."""
    return head_dim == 0 or columns % head_dim == 0 or head_dim % columns == 0


def is_within_heads(n0: int, n1: int, head_dim: int) -> bool:
    """Whether columns [n0, n1) are whole heads, or one of a head's equal parts."""
    return fits_heads(n1 - n0, head_dim) and n0 % min(n1 - n0, head_dim) == 0


def has_shared_heads(program: Program, op: Op) -> bool:
    """Whether a head of the op may be of several instructions."""
    return program.kind == "cuda" and op.epilogue is Epilogue.ROPE_APPEND


def reads_of(program: Program, instruction: Instruction) -> tuple[Access, ...]:
    """What an instruction reads of buffers. Weights and the committed context are constant in a step."""
    op = program.ops[instruction.op]
    rows = (instruction.r0, instruction.r1)
    match instruction.opcode:
        case Opcode.EMBED:
            return (Access(op.input, 0, program.buffers[op.input].columns, *rows),)
        case Opcode.ATTENTION:
            return _attention_reads(program, instruction, op)
        case Opcode.REDUCE:
            parts = _parts(program, op, instruction, range(instruction.num_parts))
            return parts + _residual(op, instruction)
        case Opcode.LINEAR_PARTIAL if op.prologue is Prologue.NONE:
            return (Access(op.input, instruction.k0, instruction.k1, *rows),)
        case _:
            whole = (Access(op.input, 0, program.buffers[op.input].columns, *rows),)
            return whole + (_residual(op, instruction) if instruction.opcode is Opcode.LINEAR else ())


def writes_of(program: Program, instruction: Instruction) -> tuple[Access, ...]:
    """What an instruction writes."""
    op = program.ops[instruction.op]
    rows = (instruction.r0, instruction.r1)
    match instruction.opcode:
        case Opcode.EMBED:
            return (Access(op.output, instruction.n0, instruction.n1, *rows),)
        case Opcode.ATTENTION:
            return _attention_writes(program, instruction, op)
        case Opcode.LINEAR_PARTIAL:
            return _parts(program, op, instruction, (instruction.part,))
        case Opcode.LINEAR_ACCUMULATE:
            return ()
        case _:
            return _epilogue_writes(program, instruction, op)


def _residual(op: Op, instruction: Instruction) -> tuple[Access, ...]:
    if op.epilogue is not Epilogue.RESIDUAL:
        return ()
    return (Access(op.output, instruction.n0, instruction.n1, instruction.r0, instruction.r1),)


def _parts(
    program: Program, op: Op, instruction: Instruction, parts: range | tuple[int, ...]
) -> tuple[Access, ...]:
    buffer = program.partial_buffers[op.index]
    return tuple(
        Access(
            buffer,
            part * op.out_features + instruction.n0,
            part * op.out_features + instruction.n1,
            instruction.r0,
            instruction.r1,
        )
        for part in parts
    )


def _epilogue_writes(program: Program, instruction: Instruction, op: Op) -> tuple[Access, ...]:
    n0, n1, rows = instruction.n0, instruction.n1, (instruction.r0, instruction.r1)
    match op.epilogue:
        case Epilogue.ROPE_APPEND:
            q_columns = program.geometry.num_heads * program.geometry.head_dim
            queries = (Access(op.output, n0, min(n1, q_columns), *rows),) if n0 < q_columns else ()
            first_kv = max(n0, q_columns)
            appended = (Access(op.kv, first_kv - q_columns, n1 - q_columns, *rows),) if n1 > first_kv else ()
            return queries + appended
        case Epilogue.SWIGLU:
            return (Access(op.output, n0 // 2, n1 // 2, *rows),)
        case Epilogue.LOGITS:
            span = program.stats_span
            stats = Access(op.stats, 3 * (n0 // span), 3 * -(-n1 // span), *rows)
            return (Access(op.output, n0, n1, *rows), stats)
        case _:
            return (Access(op.output, n0, n1, *rows),)


def _attention_reads(program: Program, instruction: Instruction, op: Op) -> tuple[Access, ...]:
    geometry, rows = program.geometry, (instruction.r0, instruction.r1)
    group = geometry.num_heads // geometry.num_kv_heads
    dim = geometry.head_dim
    values = geometry.num_kv_heads * dim
    # A row may attend to any row of the step, its ancestors, whatever rows the instruction computes.
    step = (0, program.bucket)
    return (
        Access(op.input, instruction.n0 * group * dim, instruction.n1 * group * dim, *rows),
        Access(op.kv, instruction.n0 * dim, instruction.n1 * dim, *step),
        Access(op.kv, values + instruction.n0 * dim, values + instruction.n1 * dim, *step),
    )


def _attention_writes(program: Program, instruction: Instruction, op: Op) -> tuple[Access, ...]:
    geometry = program.geometry
    group = geometry.num_heads // geometry.num_kv_heads
    head = geometry.head_dim + 2
    blocks = program.buffers[op.output].columns // (geometry.num_heads * head)
    return tuple(
        Access(
            op.output,
            (block * geometry.num_heads + instruction.n0 * group) * head,
            (block * geometry.num_heads + instruction.n1 * group) * head,
            instruction.r0,
            instruction.r1,
        )
        for block in range(instruction.part, blocks, instruction.num_parts)
    )
