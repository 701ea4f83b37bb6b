"""What all SMs run, as one sequence of calls: an op's tiles, and of those each SM's.

A run is consecutive instructions of one op on a worker whose tiles are evenly spaced. A call is a run of
every worker that has one: SMs differ in literals alone, never in code. Layers whose calls differ only in
numbers become a loop. Nothing is lost: `instructions_of` gives back every instruction.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby

import msgspec

from megakernel.codegen_limits import CodegenError
from megakernel.cuda_constants import ROW_CHUNK
from megakernel.memory import role_of
from megakernel.program import Instruction, Op, Opcode, PageRole, Program

_LONGEST_PATTERN = 32
"""Of a run's pages: entries before they repeat, and of what repeats."""
_ORDER = (Opcode.EMBED, Opcode.LINEAR, Opcode.ATTENTION)


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
    """First page, one a tile; of weights one a load."""
    ahead: tuple[int, ...]
    """How many instructions before its own a load's weights may be loaded, one a load."""


class Call(msgspec.Struct, frozen=True, kw_only=True):
    op: int
    """Of a loop the first layer's."""
    opcode: Opcode
    columns: int
    """Of each tile of the call."""
    tile_columns: int
    """Of the op's tiles but the last."""
    num_loads: int
    """Instructions of a tile: blocks of K."""
    load_k: int
    input_k: int
    """Of K, what a load of weights covers and what of the input is staged at once, but for the last ones."""
    row_chunks: int
    """Tiles with the same columns: rows are taken chunk by chunk, by each tile of several loads."""
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
    """(op, opcode, tile number) of every tile of a worker, in order."""
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
        for instruction in (i for worker in program.workers for i in worker):
            if instruction.signal >= 0:
                self.arrivals[instruction.signal] += 1
            tile = instruction.op, _kind(instruction)
            self.widths[tile] = max(self.widths.get(tile, 0), instruction.n1 - instruction.n0)

    def calls(self) -> Iterator[tuple[Call, _Key]]:
        """Op by op."""
        num_workers = len(self.program.workers)
        found: dict[tuple[int, int], list[tuple[_Tile, list[Run | None]]]] = {}
        for worker, instructions in enumerate(self.program.workers):
            place, slot = (-1, 0), 0
            for run, tile in self._runs(instructions):
                at = tile.first.op, _ORDER.index(_kind(tile.first))
                if at < place:
                    name = self.program.ops[tile.first.op].name
                    raise CodegenError(f"worker {worker} returns to {name} after a later op")
                slot = slot if at == place else 0
                place = at
                slots = found.setdefault(at, [])
                while slot < len(slots) and slots[slot][0].shape != tile.shape:
                    slot += 1
                if slot == len(slots):
                    slots.append((tile, [None] * num_workers))
                slots[slot][1][worker] = run
                slot += 1
        for (op, _), slots in sorted(found.items()):
            for tile, runs in slots:
                yield self._call(op, tile, runs)

    def _call(self, index: int, tile: "_Tile", runs: list[Run | None]) -> tuple[Call, _Key]:
        op, operands, first = self.program.ops[index], self.operands[index], tile.first
        opcode = _kind(first)
        call = Call(
            op=index,
            opcode=opcode,
            columns=first.n1 - first.n0,
            tile_columns=self.widths[index, opcode],
            num_loads=len(tile.instructions),
            load_k=first.k1 or op.in_features,
            input_k=first.x1 or op.in_features,
            row_chunks=self._row_chunks(first),
            numbers=operands.numbers,
            strides={},
            runs=(tuple(runs),),
        )
        code = opcode, call.tile_columns, *tile.shape, call.row_chunks
        return call, _Key(op.layer, (role_of(op), op.input, op.output, *operands.key, *code))

    def _runs(self, worker: Sequence[Instruction]) -> Iterator[tuple[Run, "_Tile"]]:
        """With each its first tile."""
        tiles = list(_tiles(worker))
        start = 0
        while start < len(tiles):
            end = self._even_end(tiles, start)
            while not _pages_repeat(tiles[start:end]):
                end -= 1
            yield self._run(tiles[start:end]), tiles[start]
            start = end

    def _even_end(self, tiles: Sequence["_Tile"], start: int) -> int:
        """Where the run from `start` ends at the latest."""
        first, stride = tiles[start], None
        for end in range(start + 1, len(tiles)):
            before, next_one = tiles[end - 1], tiles[end]
            step = self.tile_number(next_one.first) - self.tile_number(before.first)
            is_alike = (
                (next_one.first.op, _kind(next_one.first)) == (first.first.op, _kind(first.first))
                and next_one.shape == first.shape
                and not next_one.first.waits
                and before.last.signal < 0
                and step > 0
                and (stride is None or step == stride)
            )
            if not is_alike:
                return end
            stride = step
        return len(tiles)

    def tile_number(self, instruction: Instruction) -> int:
        """Columns ascending, of each its chunks of rows; of attention splits ascending, of each its heads."""
        if instruction.opcode is Opcode.ATTENTION:
            if instruction.n1 - instruction.n0 != 1:
                raise CodegenError("CUDA's attention takes one KV head a tile")
            return instruction.part * self.program.geometry.num_kv_heads + instruction.n0
        column = instruction.n0 // self.widths[instruction.op, _kind(instruction)]
        return column * self._row_chunks(instruction) + instruction.r0 // ROW_CHUNK

    def _row_chunks(self, instruction: Instruction) -> int:
        is_whole = (instruction.r0, instruction.r1) == (0, self.program.bucket)
        return 1 if is_whole else -(-self.program.bucket // ROW_CHUNK)

    def _run(self, tiles: Sequence["_Tile"]) -> Run:
        first, second = tiles[0].first, tiles[1].first if len(tiles) > 1 else None
        return Run(
            first=self.tile_number(first),
            count=len(tiles),
            stride=self.tile_number(second) - self.tile_number(first) if second is not None else 0,
            waits=tuple(
                WaitAt(wait.counter, wait.target, self.arrivals[wait.counter]) for wait in first.waits
            ),
            signal=tiles[-1].last.signal,
            pages={role: tuple(pages) for role in PageRole if (pages := _first_pages(tiles, role))},
            ahead=tuple(_distances(tiles)),
        )


class _Tile(msgspec.Struct, frozen=True):
    """One instruction, or the blocks of K of a linear tile."""

    index: int
    """Of the first, on its worker."""
    instructions: tuple[Instruction, ...]

    @property
    def first(self) -> Instruction:
        return self.instructions[0]

    @property
    def last(self) -> Instruction:
        return self.instructions[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Equal where one loop can take both."""
        first = self.first
        sizes = first.n1 - first.n0, first.k1, first.x1, len(self.instructions)
        return sizes if first.opcode in _LINEAR else sizes[:1]


_LINEAR = (Opcode.LINEAR, Opcode.LINEAR_ACCUMULATE)


def _kind(instruction: Instruction) -> Opcode:
    """Of the whole tile. Raises CodegenError for what no kernel does."""
    kind = Opcode.LINEAR if instruction.opcode is Opcode.LINEAR_ACCUMULATE else instruction.opcode
    if kind not in _ORDER:
        raise CodegenError("CUDA kernels take K whole, in blocks that one worker sums")
    return kind


def _tiles(worker: Sequence[Instruction]) -> Iterator[_Tile]:
    start = 0
    for index, instruction in enumerate(worker):
        if instruction.opcode is not Opcode.LINEAR_ACCUMULATE:
            yield _Tile(start, tuple(worker[start : index + 1]))
            start = index + 1


def _first_pages(tiles: Sequence[_Tile], role: PageRole) -> list[int]:
    """One a tile, of weights one a load, or none at all."""
    holders = [
        instruction
        for tile in tiles
        for instruction in (tile.instructions if role is PageRole.WEIGHTS else (tile.first,))
    ]
    return [use.first for instruction in holders for use in instruction.pages if use.role is role]


def _distances(tiles: Sequence[_Tile]) -> list[int]:
    return [
        index - use.live_from
        for tile in tiles
        for index, instruction in enumerate(tile.instructions, tile.index)
        for use in instruction.pages
        if use.role is PageRole.WEIGHTS
    ]


def _pages_repeat(tiles: Sequence[_Tile]) -> bool:
    lists = [_first_pages(tiles, role) for role in PageRole] + [_distances(tiles)]
    num_loads = sum(len(tile.instructions) for tile in tiles)
    return all(
        len(values) in (0, len(tiles), num_loads) and pattern_of(values).length <= _LONGEST_PATTERN
        for values in lists
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
