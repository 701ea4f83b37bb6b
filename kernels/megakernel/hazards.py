"""The brute-force oracle that the validator is tested against: slow, literal, for small programs only.

Shares no reasoning with the validator. Whether x always precedes y is found by asking whether y can run
though x never does; outputs are counted element by element; and `explore_states` walks every state that
any interleaving can reach.
"""

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.program import (
    Access,
    Instruction,
    Opcode,
    OpKind,
    Program,
    Space,
    has_shared_heads,
    reads_of,
    writes_of,
)

BoolMatrix = npt.NDArray[np.bool_]


def find_hazard(program: Program) -> str | None:
    """A sentence on the first hazard found; None where there is none."""
    instructions = [i for sequence in program.workers for i in sequence]
    for instruction in instructions:
        if _is_out_of_range(program, instruction):
            return f"out of range: {instruction}"
    order = greedy_order(program)
    if len(order) < len(instructions):
        return f"stuck after {len(order)} of {len(instructions)} instructions"
    found = _page_hazard(program) or _output_hazard(program, instructions) or _k_hazard(program, instructions)
    if found:
        return found
    can = runnable_without(program, order)
    return _race(program, instructions, can) or _race_of_heads(program, instructions, can)


def greedy_order(program: Program) -> list[int]:
    """Instructions, numbered worker after worker, in the order of a run; as far as it goes."""
    firsts = np.cumsum([0, *(len(sequence) for sequence in program.workers)]).tolist()
    arrivals, at, order = [0] * program.num_counters, [0] * len(program.workers), []
    moved = True
    while moved:
        moved = False
        for worker, sequence in enumerate(program.workers):
            while at[worker] < len(sequence) and _is_ready(sequence[at[worker]], arrivals):
                if sequence[at[worker]].signal >= 0:
                    arrivals[sequence[at[worker]].signal] += 1
                order.append(firsts[worker] + at[worker])
                at[worker] += 1
                moved = True
    return order


def runnable_without(program: Program, order: list[int]) -> BoolMatrix:
    """[y, x] true where y can run in some execution in which x never does. `order` is any complete run."""
    instructions = [i for sequence in program.workers for i in sequence]
    is_first = {0, *np.cumsum([len(sequence) for sequence in program.workers]).tolist()}
    signallers: dict[int, list[int]] = {}
    for number, instruction in enumerate(instructions):
        signallers.setdefault(instruction.signal, []).append(number)
    can = np.zeros((len(instructions), len(instructions)), dtype=np.bool_)
    while True:
        before = int(can.sum())
        for y in order:
            row = np.ones(len(can), dtype=np.bool_) if y in is_first else can[y - 1].copy()
            for wait in instructions[y].waits:
                row &= can[signallers.get(wait.counter, [])].sum(axis=0) >= wait.target
            row[y] = False
            can[y] = row
        if int(can.sum()) == before:
            return can


def explore_states(program: Program, max_states: int = 20_000) -> str | None:
    """Walks every reachable state: two conflicting instructions that may run at once, or an end too early.

    Says nothing of outputs or pages. Raises OverflowError where there are more than `max_states` states.
    """
    touched = [[_touched(program, i) for i in sequence] for sequence in program.workers]
    start = (0,) * len(program.workers)
    seen, pending = {start}, [start]
    end = tuple(len(sequence) for sequence in program.workers)
    while pending:
        state = pending.pop()
        arrivals = [0] * program.num_counters
        for sequence, index in zip(program.workers, state, strict=True):
            for instruction in sequence[:index]:
                if instruction.signal >= 0:
                    arrivals[instruction.signal] += 1
        ready = [
            worker
            for worker, index in enumerate(state)
            if index < end[worker] and _is_ready(program.workers[worker][index], arrivals)
        ]
        if not ready and state != end:
            return f"stuck at {state}"
        for i, first in enumerate(ready):
            for second in ready[i + 1 :]:
                if _do_conflict(touched[first][state[first]], touched[second][state[second]]):
                    return f"worker {first} and {second} race at {state}"
            following = (*state[:first], state[first] + 1, *state[first + 1 :])
            if following not in seen:
                seen.add(following)
                pending.append(following)
        if len(seen) > max_states:
            raise OverflowError(f"more than {max_states} states")
    return None


def _is_ready(instruction: Instruction, arrivals: list[int]) -> bool:
    return all(arrivals[wait.counter] >= wait.target for wait in instruction.waits)


def _is_out_of_range(program: Program, instruction: Instruction) -> bool:
    counters = [wait.counter for wait in instruction.waits]
    if not all(0 <= counter < program.num_counters for counter in counters):
        return True
    if instruction.signal >= program.num_counters:
        return True
    if not (0 <= instruction.r0 < instruction.r1 <= program.bucket and instruction.n0 < instruction.n1):
        return True
    accesses = (*reads_of(program, instruction), *writes_of(program, instruction))
    return any(
        not (0 <= access.c0 < access.c1 <= program.buffers[access.buffer].columns) for access in accesses
    )


def _page_hazard(program: Program) -> str | None:
    for worker, sequence in enumerate(program.workers):
        for now in range(len(sequence)):
            held: set[int] = set()
            for index, instruction in enumerate(sequence):
                for use in instruction.pages:
                    if use.live_from > index:
                        return f"worker {worker}, instruction {index}: pages held from after its end"
                    if not use.live_from <= now <= index:
                        continue
                    mine = set(range(use.first, use.first + use.count))
                    if mine & held or not mine <= set(range(program.num_pages)):
                        return f"worker {worker}, instruction {now}: pages {sorted(mine)} of {index}"
                    held |= mine
    return None


def _output_hazard(program: Program, instructions: list[Instruction]) -> str | None:
    """Every element of what an op writes is written exactly once by it."""
    counts: dict[tuple[int, int, int], npt.NDArray[np.int32]] = {}
    for op in program.ops:
        outputs = {op.output, op.stats, op.kv if op.kind == "linear" else -1} - {-1}
        partial = program.partial_buffers[op.index]
        for step, buffer in [(int(partial >= 0), b) for b in outputs] + [(0, partial)] * (partial >= 0):
            size = (program.buffers[buffer].columns, program.bucket)
            counts[op.index, step, buffer] = np.zeros(size, dtype=np.int32)
    for instruction in instructions:
        step = int(instruction.opcode is Opcode.REDUCE)
        for a in writes_of(program, instruction):
            if (instruction.op, step, a.buffer) not in counts:
                return f"unexpected write: {instruction}"
            counts[instruction.op, step, a.buffer][a.c0 : a.c1, a.r0 : a.r1] += 1
    wrong = [key for key, count in counts.items() if (count != 1).any()]
    return f"op {wrong[0][0]} does not write each element once" if wrong else None


def _k_hazard(program: Program, instructions: list[Instruction]) -> str | None:
    """Every element of K goes into every sum exactly once."""
    for op in program.ops:
        if op.kind is not OpKind.LINEAR:
            continue
        count = np.zeros((program.bucket, op.out_features, op.in_features), dtype=np.int32)
        for i in instructions:
            if i.op == op.index and i.opcode is not Opcode.REDUCE:
                count[i.r0 : i.r1, i.n0 : i.n1, i.k0 : i.k1 or op.in_features] += 1
        if (count != 1).any():
            return f"{op.name} does not sum each product once"
    return None


def _race(program: Program, instructions: list[Instruction], can: BoolMatrix) -> str | None:
    """Of two conflicting instructions, that of the earlier op must always run first."""
    entries = [
        (number, access, is_write)
        for number, instruction in enumerate(instructions)
        for accesses, is_write in (
            (reads_of(program, instruction), False),
            (writes_of(program, instruction), True),
        )
        for access in accesses
        if program.buffers[access.buffer].space is not Space.INPUT
    ]
    table = np.array([(n, a.buffer, a.c0, a.c1, a.r0, a.r1, w) for n, a, w in entries]).T
    number, buffer, c0, c1, r0, r1, is_write = (column[:, None] for column in table)
    overlap = (buffer == buffer.T) & (c0 < c1.T) & (c1 > c0.T) & (r0 < r1.T) & (r1 > r0.T)
    overlap &= (is_write + is_write.T > 0) & (number != number.T)
    first, second = np.nonzero(overlap)
    for x, y in {(int(table[0, i]), int(table[0, j])) for i, j in zip(first, second, strict=True)}:
        before, after = _rank(instructions[x]), _rank(instructions[y])
        if before == after or (before < after and can[y, x]):
            return f"nothing orders {instructions[x]} before {instructions[y]}"
    return None


def _race_of_heads(program: Program, instructions: list[Instruction], can: BoolMatrix) -> str | None:
    """Any of a head's instructions may write all of it, from sums in memory that all such ops share."""
    dim = program.geometry.head_dim
    finishing = [
        (number, one)
        for number, one in enumerate(instructions)
        if has_shared_heads(program, program.ops[one.op]) and one.opcode is not Opcode.LINEAR_PARTIAL
    ]
    for x, first in finishing:
        heads = set(range(first.n0 // dim, -(-first.n1 // dim)))
        written = tuple(
            msgspec.structs.replace(a, c0=a.c0 // dim * dim, c1=-(-a.c1 // dim) * dim)
            for a in writes_of(program, first)
        )
        for y, second in enumerate(instructions):
            if _rank(first) >= _rank(second) or not can[y, x]:
                continue
            shares_sums = any(other is second for _, other in finishing) and not heads.isdisjoint(
                range(second.n0 // dim, -(-second.n1 // dim))
            )
            if shares_sums or _do_conflict(((), written), _touched(program, second)):
                return f"nothing orders a head of {first} before {second}"
    return None


def _rank(instruction: Instruction) -> tuple[int, bool]:
    return instruction.op, instruction.opcode is Opcode.REDUCE


_Touched = tuple[tuple[Access, ...], tuple[Access, ...]]


def _touched(program: Program, instruction: Instruction) -> _Touched:
    return reads_of(program, instruction), writes_of(program, instruction)


def _do_conflict(first: _Touched, second: _Touched) -> bool:
    def meet(a: Access, b: Access) -> bool:
        is_apart = a.c1 <= b.c0 or b.c1 <= a.c0 or a.r1 <= b.r0 or b.r1 <= a.r0
        return a.buffer == b.buffer and not is_apart

    pairs = [(w, a) for w in first[1] for a in (*second[0], *second[1])]
    pairs += [(a, w) for a in first[0] for w in second[1]]
    return any(meet(a, b) for a, b in pairs)
