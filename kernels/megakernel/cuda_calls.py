"""What all SMs run, as one sequence of calls: an op's tiles, and of those each SM's.

A run is consecutive instructions of one op on a worker whose tiles are evenly spaced. A call is a run of
every worker that has one: SMs differ in literals alone, never in code. Layers whose calls differ only in
numbers become a loop. Nothing is lost: `instructions_of` gives back every instruction.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby

import msgspec

from megakernel.codegen_limits import CodegenError
from megakernel.memory import role_of
from megakernel.program import Instruction, Op, Opcode, PageRole, Program

_LONGEST_PATTERN = 16
"""Of a run's pages: entries before they repeat, and of what repeats."""
_K_BLOCKS = (128, 64, 32, 1)
_ORDER = (Opcode.EMBED, Opcode.LINEAR, Opcode.LINEAR_PARTIAL, Opcode.REDUCE, Opcode.ATTENTION)


class Operands(msgspec.Struct, frozen=True):
    """What an op's calls take beside their tiles: what must be equal in layers that share code, and numbers
    that may grow evenly from layer to layer."""

    key: tuple[object, ...]
    numbers: Mapping[str, int]


class WaitAt(msgspec.Struct, frozen=True):
    counter: int
    target: int
    arrivals: int
    """A step's, of the counter."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """Tile j of it is `first + j * stride`, numbered as `tile_number` does."""

    first: int
    count: int
    stride: int
    """0 for a single tile."""
    waits: tuple[WaitAt, ...]
    signal: int
    """-1: none."""
    pages: Mapping[PageRole, tuple[int, ...]]
    """First page, one a tile."""
    ahead: tuple[int, ...]
    """How many instructions before its own a tile's weights may be loaded, one a tile."""


class Call(msgspec.Struct, frozen=True, kw_only=True):
    op: int
    """Of a loop the first layer's."""
    opcode: Opcode
    columns: int
    """Of each tile of the call."""
    tile_columns: int
    """Of the op's tiles but the last."""
    num_parts: int
    block_k: int
    """K-tiles are cut at multiples of it."""
    numbers: Mapping[str, int]
    strides: Mapping[str, int]
    """What a layer adds to each number, in a loop."""
    runs: tuple[tuple[Run | None, ...], ...]
    """By layer of the loop (one line outside of loops), by worker."""

    def all_runs(self) -> Iterator[Run]:
        return (run for layer in self.runs for run in layer if run is not None)


class Loop(msgspec.Struct, frozen=True):
    """Layers [first, end)."""

    first: int
    end: int
    calls: tuple[Call, ...]


class Pattern(msgspec.Struct, frozen=True):
    """Entries that begin a sequence, then entries that repeat for ever."""

    beginning: int
    period: int

    @property
    def length(self) -> int:
        return self.beginning + self.period

    def index(self, j: int) -> int:
        return j if j < self.beginning else self.beginning + (j - self.beginning) % self.period


def pattern_of(values: Sequence[int]) -> Pattern:
    """The shortest that the sequence follows."""
    for length in range(1, len(values)):
        for period in range(1, length + 1):
            pattern = Pattern(length - period, period)
            if all(value == values[pattern.index(j)] for j, value in enumerate(values)):
                return pattern
    return Pattern(0, max(1, len(values)))


def calls_of(program: Program, describe: Callable[[Op], Operands]) -> list[Call | Loop]:
    """Raises CodegenError for instructions that are not op after op on every worker."""
    finder = _Finder(program, describe)
    layers = [list(group) for _, group in groupby(finder.calls(), key=lambda entry: entry[1].layer)]
    return list(_roll(layers))


def instructions_of(
    program: Program, parts: Iterable[Call | Loop], worker: int
) -> list[tuple[int, Opcode, int]]:
    """(op, opcode, tile number) of every instruction of a worker, in order."""
    found = []
    ops_a_layer = sum(op.layer == 0 for op in program.ops)
    for part in parts:
        calls = part.calls if isinstance(part, Loop) else (part,)
        for layer in range(len(calls[0].runs)):
            for call in calls:
                if run := call.runs[layer][worker]:
                    op = call.op + layer * ops_a_layer
                    found += [(op, call.opcode, run.first + j * run.stride) for j in range(run.count)]
    return found


class _Key(msgspec.Struct, frozen=True):
    """Of a call: equal where two layers' code is."""

    layer: int
    alike: tuple[object, ...]


class _Finder:
    def __init__(self, program: Program, describe: Callable[[Op], Operands]) -> None:
        self.program = program
        self.operands = [describe(op) for op in program.ops]
        self.arrivals = [0] * program.num_counters
        self.widths: dict[tuple[int, Opcode], int] = {}
        bounds: dict[int, set[tuple[int, int, int, int]]] = {}
        for instruction in (i for worker in program.workers for i in worker):
            if instruction.signal >= 0:
                self.arrivals[instruction.signal] += 1
            tile = instruction.op, instruction.opcode
            self.widths[tile] = max(self.widths.get(tile, 0), instruction.n1 - instruction.n0)
            if instruction.opcode is Opcode.LINEAR_PARTIAL:
                bound = instruction.part, instruction.num_parts, instruction.k0, instruction.k1
                bounds.setdefault(instruction.op, set()).add(bound)
        self.blocks = {op: _block_k(program.ops[op], found) for op, found in bounds.items()}

    def calls(self) -> Iterator[tuple[Call, _Key]]:
        """Op by op."""
        num_workers = len(self.program.workers)
        found: dict[tuple[int, int], list[tuple[int, list[Run | None]]]] = {}
        parts: dict[tuple[int, int], int] = {}
        for worker, instructions in enumerate(self.program.workers):
            place, slot = (-1, 0), 0
            for run, first in self._runs(instructions):
                at = first.op, _ORDER.index(first.opcode)
                if at < place:
                    name = self.program.ops[first.op].name
                    raise CodegenError(f"worker {worker} returns to {name} after a later op")
                slot = slot if at == place else 0
                place = at
                parts[at] = first.num_parts
                slots, columns = found.setdefault(at, []), first.n1 - first.n0
                while slot < len(slots) and slots[slot][0] != columns:
                    slot += 1
                if slot == len(slots):
                    slots.append((columns, [None] * num_workers))
                slots[slot][1][worker] = run
                slot += 1
        for (op, order), slots in sorted(found.items()):
            for columns, runs in slots:
                yield self._call(op, _ORDER[order], columns, parts[op, order], runs)

    def _call(
        self, index: int, opcode: Opcode, columns: int, num_parts: int, runs: list[Run | None]
    ) -> tuple[Call, _Key]:
        op, operands = self.program.ops[index], self.operands[index]
        call = Call(
            op=index,
            opcode=opcode,
            columns=columns,
            tile_columns=self.widths[index, opcode],
            num_parts=num_parts,
            block_k=self.blocks.get(index, 0),
            numbers=operands.numbers,
            strides={},
            runs=(tuple(runs),),
        )
        code = opcode, columns, call.tile_columns, num_parts, call.block_k
        return call, _Key(op.layer, (role_of(op), op.input, op.output, *operands.key, *code))

    def _runs(self, worker: Sequence[Instruction]) -> Iterator[tuple[Run, Instruction]]:
        """With each its first instruction."""
        start = 0
        while start < len(worker):
            end = self._even_end(worker, start)
            while not _pages_repeat(worker, start, end):
                end -= 1
            yield self._run(worker, start, end), worker[start]
            start = end

    def _even_end(self, worker: Sequence[Instruction], start: int) -> int:
        """Where the run from `start` ends at the latest."""
        first, stride = worker[start], None
        for end in range(start + 1, len(worker)):
            before, next_one = worker[end - 1], worker[end]
            step = self.tile_number(next_one) - self.tile_number(before)
            is_alike = (
                (next_one.op, next_one.opcode) == (first.op, first.opcode)
                and next_one.n1 - next_one.n0 == first.n1 - first.n0
                and not next_one.waits
                and before.signal < 0
                and step > 0
                and (stride is None or step == stride)
            )
            if not is_alike:
                return end
            stride = step
        return len(worker)

    def tile_number(self, instruction: Instruction) -> int:
        """Columns ascending, of each its K-tiles; of attention splits ascending, of each its KV heads."""
        if instruction.opcode is Opcode.ATTENTION:
            if instruction.n1 - instruction.n0 != 1:
                raise CodegenError("CUDA's attention takes one KV head a tile")
            return instruction.part * self.program.geometry.num_kv_heads + instruction.n0
        column = instruction.n0 // self.widths[instruction.op, instruction.opcode]
        if instruction.opcode is Opcode.LINEAR_PARTIAL:
            return column * instruction.num_parts + instruction.part
        return column

    def _run(self, worker: Sequence[Instruction], start: int, end: int) -> Run:
        run, first = worker[start:end], worker[start]
        return Run(
            first=self.tile_number(first),
            count=len(run),
            stride=self.tile_number(run[1]) - self.tile_number(run[0]) if len(run) > 1 else 0,
            waits=tuple(
                WaitAt(wait.counter, wait.target, self.arrivals[wait.counter]) for wait in first.waits
            ),
            signal=run[-1].signal,
            pages={role: tuple(pages) for role in PageRole if (pages := _first_pages(run, role))},
            ahead=tuple(_distances(run, start)),
        )


def _block_k(op: Op, bounds: set[tuple[int, int, int, int]]) -> int:
    """The block that cuts K as its K-tiles are cut."""
    for block in _K_BLOCKS:
        count = -(-op.in_features // block)
        if all(
            (k0, k1)
            == (
                block * (count * part // parts),
                min(op.in_features, block * (count * (part + 1) // parts)),
            )
            for part, parts, k0, k1 in bounds
        ):
            return block
    raise CodegenError(f"{op.name}: its K-tiles are not cut evenly")


def _first_pages(run: Sequence[Instruction], role: PageRole) -> list[int]:
    """One a tile, or none at all."""
    return [use.first for instruction in run for use in instruction.pages if use.role is role]


def _distances(run: Sequence[Instruction], start: int) -> list[int]:
    return [
        index - use.live_from
        for index, instruction in enumerate(run, start)
        for use in instruction.pages
        if use.role is PageRole.WEIGHTS
    ]


def _pages_repeat(worker: Sequence[Instruction], start: int, end: int) -> bool:
    run = worker[start:end]
    lists = [_first_pages(run, role) for role in PageRole] + [_distances(run, start)]
    return all(
        len(values) in (0, len(run)) and pattern_of(values).length <= _LONGEST_PATTERN for values in lists
    )


_Layer = list[tuple[Call, _Key]]


def _roll(layers: Sequence[_Layer]) -> Iterator[Call | Loop]:
    at = 0
    while at < len(layers):
        end, strides = _alike_until(layers, at)
        calls = tuple(
            msgspec.structs.replace(
                call, strides=stride, runs=tuple(layer[index][0].runs[0] for layer in layers[at:end])
            )
            for index, ((call, _), stride) in enumerate(zip(layers[at], strides, strict=True))
        )
        first = layers[at][0][1].layer
        if end - at > 1:
            yield Loop(first, first + end - at, calls)
        else:
            yield from calls
        at = end


def _alike_until(layers: Sequence[_Layer], at: int) -> tuple[int, list[dict[str, int]]]:
    """The end of the layers that one loop from `at` does, and by call what a layer adds to its numbers."""
    if at + 1 == len(layers) or not _is_same_code(layers[at], layers[at + 1]):
        return at + 1, [{} for _ in layers[at]]
    strides = [
        {name: second.numbers[name] - value for name, value in first.numbers.items()}
        for (first, _), (second, _) in zip(layers[at], layers[at + 1], strict=True)
    ]
    end = at + 1
    while end < len(layers) and _is_same_code(layers[at], layers[end]):
        expected = [
            {name: value + (end - at) * stride[name] for name, value in call.numbers.items()}
            for (call, _), stride in zip(layers[at], strides, strict=True)
        ]
        if [call.numbers for call, _ in layers[end]] != expected:
            break
        end += 1
    return end, strides


def _is_same_code(one: _Layer, other: _Layer) -> bool:
    return one[0][1].layer >= 0 and [key.alike for _, key in one] == [key.alike for _, key in other]
