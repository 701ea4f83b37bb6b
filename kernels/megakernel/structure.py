"""Whether a program is well formed: ops fit their buffers, instructions fit their ops, workers the machine.

Order and coverage are not looked at here; both need every index and range to make sense.
"""

from megakernel.machine import Machine
from megakernel.program import (
    Epilogue,
    Instruction,
    Op,
    Opcode,
    OpKind,
    PageRole,
    Program,
    Prologue,
    Space,
    attention_columns,
    has_shared_heads,
    is_within_heads,
    max_splits,
    parts_of,
    split_blocks,
)
from megakernel.schedule_error import Hazard, ScheduleError, instruction_name


def check_structure(program: Program) -> None:
    _require(program.bucket > 0, f"a bucket of {program.bucket} rows")
    sizes = (program.split_tokens, program.swiglu_group, program.stats_span)
    _require(min(sizes) > 0, f"split_tokens, swiglu_group and stats_span are {sizes}, not all positive")
    geometry = program.geometry
    for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "max_context_tokens"):
        _require(getattr(geometry, name) > 0, f"geometry: {name} is {getattr(geometry, name)}")
    _require(
        geometry.num_heads % geometry.num_kv_heads == 0,
        f"{geometry.num_heads} heads cannot share {geometry.num_kv_heads} KV heads equally",
    )
    for index, buffer in enumerate(program.buffers):
        _require(buffer.index == index, f"buffer {buffer.name} is number {index} but says {buffer.index}")
        _require(buffer.columns > 0, f"buffer {buffer.name} has {buffer.columns} columns")
    _require(len(program.partial_buffers) == len(program.ops), "partial_buffers does not have an entry an op")
    for index, op in enumerate(program.ops):
        _require(op.index == index, f"op {op.name} is number {index} but says {op.index}")
        _check_op(program, op)
    for worker, sequence in enumerate(program.workers):
        for index, instruction in enumerate(sequence):
            problem = _instruction_problem(program, instruction)
            if problem:
                name = instruction_name(program, worker, index)
                raise ScheduleError(Hazard.STRUCTURE, f"{name}: {problem}")
    _check_k_tiles(program)
    _check_k_blocks(program)


def check_machine(program: Program, machine: Machine) -> None:
    _require(
        program.machine == machine.name, f"compiled for machine {program.machine!r}, not {machine.name!r}"
    )
    _require(
        len(program.workers) <= machine.num_workers,
        f"{len(program.workers)} workers, where {machine.name} has {machine.num_workers}",
    )


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ScheduleError(Hazard.STRUCTURE, otherwise)


def _check_op(program: Program, op: Op) -> None:
    for role, index, is_optional in (
        ("input", op.input, False),
        ("output", op.output, False),
        ("KV", op.kv, op.kind is not OpKind.ATTENTION and op.epilogue is not Epilogue.ROPE_APPEND),
        ("statistics", op.stats, op.epilogue is not Epilogue.LOGITS),
        ("partial", program.partial_buffers[op.index], True),
    ):
        known = range(-1 if is_optional else 0, len(program.buffers))
        _require(index in known, f"op {op.name}: {role} buffer {index} is not one of {len(program.buffers)}")
    for index in (op.output, program.partial_buffers[op.index], op.stats):
        is_input = index >= 0 and program.buffers[index].space is Space.INPUT
        _require(not is_input, f"op {op.name} writes input buffer {program.buffers[index].name}")
    for buffer, columns in _buffer_columns(program, op).items():
        actual = program.buffers[buffer]
        _require(
            actual.columns == columns,
            f"op {op.name}: buffer {actual.name} has {actual.columns} columns, {columns} are needed",
        )
    partial = program.partial_buffers[op.index]
    if partial >= 0:
        columns = program.buffers[partial].columns
        _require(
            op.kind is OpKind.LINEAR and columns % op.out_features == 0,
            f"op {op.name}: a partial buffer of {columns} columns for {op.out_features} features",
        )


def _buffer_columns(program: Program, op: Op) -> dict[int, int]:
    geometry = program.geometry
    q_columns = geometry.num_heads * geometry.head_dim
    kv_columns = 2 * geometry.num_kv_heads * geometry.head_dim
    blocks = split_blocks(program.kind, max_splits(program), parts_of(program))
    attended = attention_columns(geometry, blocks)
    match op.kind:
        case OpKind.EMBED:
            return {op.input: 1, op.output: geometry.hidden_size}
        case OpKind.ATTENTION:
            return {op.input: q_columns, op.output: attended, op.kv: kv_columns}
        case OpKind.LINEAR:
            _require(min(op.in_features, op.out_features) > 0, f"op {op.name} has no features")
    is_combine = op.prologue is Prologue.COMBINE
    _require(not is_combine or op.in_features == q_columns, f"op {op.name}: {op.in_features} in features")
    columns = {op.input: attended if is_combine else op.in_features}
    match op.epilogue:
        case Epilogue.ROPE_APPEND:
            _require(op.out_features == q_columns + kv_columns, f"op {op.name}: {op.out_features} features")
            return {**columns, op.output: q_columns, op.kv: kv_columns}
        case Epilogue.SWIGLU:
            pair = 2 * program.swiglu_group
            _require(op.out_features % pair == 0, f"op {op.name}: {op.out_features} features, not of {pair}")
            return {**columns, op.output: op.out_features // 2}
        case Epilogue.LOGITS:
            spans = -(-op.out_features // program.stats_span)
            return {**columns, op.output: op.out_features, op.stats: 3 * spans}
        case _:
            return {**columns, op.output: op.out_features}


def _instruction_problem(program: Program, instruction: Instruction) -> str:
    """Empty where there is none."""
    if not 0 <= instruction.op < len(program.ops):
        return f"there are {len(program.ops)} ops"
    op = program.ops[instruction.op]
    allowed = _opcodes(program, op)
    if instruction.opcode not in allowed:
        return f"the op takes {' and '.join(opcode.name for opcode in allowed)}"
    if not 0 <= instruction.r0 < instruction.r1 <= program.bucket:
        return f"the bucket has {program.bucket} rows"
    width = _width(program, op)
    if not 0 <= instruction.n0 < instruction.n1 <= width:
        return f"the op's range is [0, {width})"
    grain = _grain(program, op)
    if instruction.n0 % grain or (instruction.n1 % grain and instruction.n1 != width):
        return f"the range does not start and end at multiples of {grain}"
    dim = program.geometry.head_dim
    if has_shared_heads(program, op) and not is_within_heads(instruction.n0, instruction.n1, dim):
        return f"the range is neither whole heads of {dim} nor an equal part of one"
    if not -1 <= instruction.signal < program.num_counters:
        return f"signals counter {instruction.signal}, of {program.num_counters}"
    for wait in instruction.waits:
        if not 0 <= wait.counter < program.num_counters or wait.target < 1:
            return f"waits for {wait.target} arrivals at counter {wait.counter}, of {program.num_counters}"
    return _part_problem(program, op, instruction)


def _part_problem(program: Program, op: Op, instruction: Instruction) -> str:
    num_tiles = 1
    if program.partial_buffers[op.index] >= 0:
        num_tiles = program.buffers[program.partial_buffers[op.index]].columns // op.out_features
    match instruction.opcode:
        case Opcode.LINEAR_ACCUMULATE:
            if not 0 <= instruction.k0 < instruction.k1 < op.in_features:
                return (
                    f"K range [{instruction.k0}, {instruction.k1}), which is to end within {op.in_features}"
                )
            if instruction.waits and instruction.k0:
                return "waits in the middle of a tile"
            if instruction.signal >= 0:
                return "signals in the middle of a tile"
        case Opcode.LINEAR | Opcode.REDUCE:
            is_whole = instruction.k0 == 0 or instruction.opcode is Opcode.LINEAR
            if not is_whole or instruction.k1 not in (0, op.in_features):
                return f"K range [{instruction.k0}, {instruction.k1}), which is to be the whole of K"
            if instruction.waits and instruction.k0:
                return "waits in the middle of a tile"
            if instruction.part or instruction.num_parts != num_tiles:
                return f"part {instruction.part} of {instruction.num_parts}, where there are {num_tiles}"
        case Opcode.LINEAR_PARTIAL:
            if not 0 <= instruction.k0 < instruction.k1 <= op.in_features:
                return f"K range [{instruction.k0}, {instruction.k1}) of {op.in_features}"
            if not 0 <= instruction.part < num_tiles:
                return f"the op has {num_tiles} K-tiles"
        case Opcode.ATTENTION:
            most = max_splits(program)
            if not 0 <= instruction.part < instruction.num_parts <= most:
                return f"of {instruction.num_parts} parts, where there are {most} splits"
            if program.kind == "cuda" and instruction.num_parts != (parts := parts_of(program)):
                return f"of {instruction.num_parts} parts, which are to be {parts}"
        case Opcode.EMBED:
            pass
    return ""


def _opcodes(program: Program, op: Op) -> tuple[Opcode, ...]:
    match op.kind:
        case OpKind.EMBED:
            return (Opcode.EMBED,)
        case OpKind.ATTENTION:
            return (Opcode.ATTENTION,)
        case OpKind.LINEAR:
            is_split = program.partial_buffers[op.index] >= 0
            if is_split:
                return (Opcode.LINEAR_PARTIAL, Opcode.REDUCE)
            return (Opcode.LINEAR, Opcode.LINEAR_ACCUMULATE) if program.kind == "cuda" else (Opcode.LINEAR,)


def _width(program: Program, op: Op) -> int:
    match op.kind:
        case OpKind.EMBED:
            return program.geometry.hidden_size
        case OpKind.ATTENTION:
            return program.geometry.num_kv_heads
        case OpKind.LINEAR:
            return op.out_features


def _grain(program: Program, op: Op) -> int:
    """What an instruction's range starts and ends at multiples of, for the epilogue's sake."""
    match op.epilogue:
        case Epilogue.ROPE_APPEND:
            return 1 if has_shared_heads(program, op) else program.geometry.head_dim
        case Epilogue.SWIGLU:
            return 2 * program.swiglu_group
        case Epilogue.LOGITS:
            return program.stats_span
        case _:
            return 1


def _check_k_tiles(program: Program) -> None:
    """An op's K-tiles are the same for all columns, ascending, and make up the whole of K."""
    tiles: dict[int, dict[int, tuple[int, int]]] = {}
    for worker, sequence in enumerate(program.workers):
        for index, instruction in enumerate(sequence):
            if instruction.opcode is not Opcode.LINEAR_PARTIAL:
                continue
            known = tiles.setdefault(instruction.op, {})
            mine = (instruction.k0, instruction.k1)
            if known.setdefault(instruction.part, mine) != mine:
                raise ScheduleError(
                    Hazard.COVERAGE,
                    f"{instruction_name(program, worker, index)}: K-tile {instruction.part} is [{mine[0]},"
                    f" {mine[1]}) here and {list(known[instruction.part])} elsewhere",
                )
    for number, parts in tiles.items():
        op = program.ops[number]
        edges = [0, *(k for part in sorted(parts) for k in parts[part]), op.in_features]
        if any(edges[i] != edges[i + 1] for i in range(0, len(edges), 2)):
            shown = ", ".join(f"{part}: {list(parts[part])}" for part in sorted(parts))
            raise ScheduleError(
                Hazard.COVERAGE, f"{op.name}: K-tiles {shown} do not make up [0, {op.in_features})"
            )


def _check_k_blocks(program: Program) -> None:
    """Blocks of K follow each other on their worker, from the first to the last of K, with the tile's input
    and output where they were; what of the input is in its pages covers each block."""
    for worker, sequence in enumerate(program.workers):
        held: Instruction | None = None
        for index, instruction in enumerate(sequence):
            is_linear = instruction.opcode in (Opcode.LINEAR, Opcode.LINEAR_ACCUMULATE)
            problem = ""
            if held is not None and not _goes_on(held, instruction):
                problem = f"is not the next block after K [{held.k0}, {held.k1})"
            elif is_linear and held is None and instruction.k0:
                problem = f"begins at {instruction.k0} of K"
            elif is_linear and instruction.x1:
                k1 = instruction.k1 or program.ops[instruction.op].in_features
                if not instruction.x0 <= instruction.k0 < k1 <= instruction.x1:
                    problem = f"has input [{instruction.x0}, {instruction.x1}) for K [{instruction.k0}, {k1})"
            if problem:
                name = instruction_name(program, worker, index)
                raise ScheduleError(Hazard.STRUCTURE, f"{name}: {problem}")
            held = instruction if instruction.opcode is Opcode.LINEAR_ACCUMULATE else None
        if held is not None:
            name = instruction_name(program, worker, len(sequence) - 1)
            raise ScheduleError(Hazard.STRUCTURE, f"{name}: is no tile's last")


def _goes_on(one: Instruction, next_one: Instruction) -> bool:
    def tile(i: Instruction) -> tuple[object, ...]:
        places = [(use.role, use.first) for use in i.pages if use.role is not PageRole.WEIGHTS]
        return i.op, i.n0, i.n1, i.r0, i.r1, places

    is_next = next_one.opcode in (Opcode.LINEAR, Opcode.LINEAR_ACCUMULATE) and next_one.k0 == one.k1
    return is_next and tile(one) == tile(next_one)
