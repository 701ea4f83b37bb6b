"""What is alike in a program's instruction sequences: runs of tiles, layers, and workers.

A run is consecutive instructions of one op on a worker whose tiles are evenly spaced. Workers whose runs
differ only in the first tile share a path, layers whose runs differ only in operands that grow evenly from
layer to layer become a loop. Nothing is lost: `instructions_of_path` gives back every instruction.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

import msgspec

from megakernel.codegen_limits import CodegenError
from megakernel.memory import role_of
from megakernel.program import Instruction, Op, Opcode, PageRole, Program

_MOST_PAGES_IN_TURN = 4
_K_BLOCKS = (128, 64, 32, 1)


class Operands(msgspec.Struct, frozen=True):
    """What an op's calls take beside their tiles: what must be equal in layers that share code, and numbers
    that may grow from layer to layer."""

    key: tuple[object, ...]
    numbers: Mapping[str, int]


class WaitAt(msgspec.Struct, frozen=True):
    operand: str
    """The counter's."""
    target: int
    arrivals: int
    """A step's, of the counter."""


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A run. Tile j of it is `first + j * tile_stride`, numbered as `tile_number` does."""

    op: int
    """Of a loop the first layer's."""
    opcode: Opcode
    count: int
    columns: int
    """Of each tile of the run."""
    tile_columns: int
    """Of the op's tiles but the last."""
    num_parts: int
    tile_stride: int
    block_k: int
    """K-tiles are cut at multiples of it, as `k_bounds` does."""
    waits: tuple[WaitAt, ...]
    has_signal: bool
    weight_pages: tuple[int, ...]
    """First page of tile j: entry j modulo their number. Empty: none."""
    input_pages: tuple[int, ...]
    output_pages: tuple[int, ...]
    ahead: tuple[int, ...]
    """How many instructions before its own tile j's weights may be loaded; in turn as pages are."""
    numbers: Mapping[str, int]
    strides: Mapping[str, int]
    """What a layer adds to each number, in a loop."""
    first_tiles: tuple[int, ...] = ()
    """By worker of the path."""


class Loop(msgspec.Struct, frozen=True):
    """Layers [first, end)."""

    first: int
    end: int
    calls: tuple[Call, ...]


class Path(msgspec.Struct, frozen=True):
    workers: tuple[int, ...]
    parts: tuple[Call | Loop, ...]

    def calls(self) -> Iterator[Call]:
        for part in self.parts:
            yield from part.calls if isinstance(part, Loop) else (part,)


def paths_of(program: Program, describe: Callable[[Op], Operands]) -> list[Path]:
    """Every worker is on exactly one path. Raises CodegenError for tiles that have no even order."""
    finder = _Finder(program, describe)
    by_runs: dict[tuple[object, ...], list[int]] = {}
    runs_of = [finder.runs(worker) for worker in program.workers]
    for worker, runs in enumerate(runs_of):
        key = tuple((run.key, tuple(run.call.numbers.items())) for run in runs)
        by_runs.setdefault(key, []).append(worker)
    return [
        Path(tuple(workers), tuple(_roll([runs_of[worker] for worker in workers])))
        for workers in by_runs.values()
    ]


class _Run(msgspec.Struct, frozen=True):
    key: tuple[object, ...]
    """Equal where two runs' code is, but for first tile and numbers."""
    layer: int
    first_tile: int
    call: Call


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

    def runs(self, worker: Sequence[Instruction]) -> list[_Run]:
        runs: list[_Run] = []
        start = 0
        while start < len(worker):
            end = self._even_end(worker, start)
            while not _pages_repeat(worker, start, end):
                end -= 1
            runs.append(self._run(worker, start, end))
            start = end
        return runs

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

    def _run(self, worker: Sequence[Instruction], start: int, end: int) -> _Run:
        program, first = self.program, worker[start]
        op, operands = program.ops[first.op], self.operands[first.op]
        numbers = dict(operands.numbers)
        waits = []
        for index, wait in enumerate(first.waits):
            numbers[f"wait{index}"] = wait.counter
            waits.append(WaitAt(f"wait{index}", wait.target, self.arrivals[wait.counter]))
        signal = worker[end - 1].signal
        if signal >= 0:
            numbers["signal"] = signal
        run = worker[start:end]
        stride = self.tile_number(run[1]) - self.tile_number(run[0]) if len(run) > 1 else 0
        call = Call(
            op=first.op,
            opcode=first.opcode,
            count=len(run),
            columns=first.n1 - first.n0,
            tile_columns=self.widths[first.op, first.opcode],
            num_parts=first.num_parts,
            tile_stride=stride,
            block_k=self.blocks.get(first.op, 0),
            waits=tuple(waits),
            has_signal=signal >= 0,
            weight_pages=_repeating(_first_pages(run, PageRole.WEIGHTS)),
            input_pages=_repeating(_first_pages(run, PageRole.INPUT)),
            output_pages=_repeating(_first_pages(run, PageRole.OUTPUT)),
            ahead=_repeating(_distances(run, start)),
            numbers=numbers,
            strides={},
        )
        alike = msgspec.structs.replace(call, op=-1, numbers={})
        key = (role_of(op), op.layer < 0, op.input, op.output, *operands.key, *msgspec.structs.astuple(alike))
        return _Run(_hashable(key), op.layer, self.tile_number(first), call)


def _hashable(key: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(tuple(sorted(item.items())) if isinstance(item, dict) else item for item in key)


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


def _repeating(values: Sequence[int]) -> tuple[int, ...]:
    """The shortest beginning that the rest repeats."""
    for period in range(1, len(values)):
        if all(value == values[index % period] for index, value in enumerate(values)):
            return tuple(values[:period])
    return tuple(values)


def _pages_repeat(worker: Sequence[Instruction], start: int, end: int) -> bool:
    run = worker[start:end]
    lists = [_first_pages(run, role) for role in PageRole] + [_distances(run, start)]
    return all(
        len(values) in (0, len(run)) and len(_repeating(values)) <= _MOST_PAGES_IN_TURN for values in lists
    )


def _roll(runs_by_worker: Sequence[Sequence[_Run]]) -> Iterator[Call | Loop]:
    """Of workers whose runs are alike, as the first's."""
    runs = [
        (run, tuple(other[index].first_tile for other in runs_by_worker))
        for index, run in enumerate(runs_by_worker[0])
    ]
    layers = [list(group) for _, group in groupby(runs, key=lambda entry: entry[0].layer)]
    at = 0
    while at < len(layers):
        end, strides = _alike_until(layers, at)
        calls = tuple(
            msgspec.structs.replace(run.call, first_tiles=firsts, strides=stride)
            for (run, firsts), stride in zip(layers[at], strides, strict=True)
        )
        layer = layers[at][0][0].layer
        if end - at > 1:
            yield Loop(layer, layer + end - at, calls)
        else:
            yield from calls
        at = end


_Layer = list[tuple[_Run, tuple[int, ...]]]


def _alike_until(layers: Sequence[_Layer], at: int) -> tuple[int, list[dict[str, int]]]:
    """The end of the layers that one loop from `at` does, and by run what a layer adds to its numbers."""
    none: list[dict[str, int]] = [{} for _ in layers[at]]
    if at + 1 == len(layers) or not _is_same_code(layers[at], layers[at + 1]):
        return at + 1, none
    strides = [
        {name: second.call.numbers[name] - value for name, value in first.call.numbers.items()}
        for (first, _), (second, _) in zip(layers[at], layers[at + 1], strict=True)
    ]
    end = at + 1
    while end < len(layers) and _is_same_code(layers[at], layers[end]):
        expected = [
            {name: value + (end - at) * stride[name] for name, value in run.call.numbers.items()}
            for (run, _), stride in zip(layers[at], strides, strict=True)
        ]
        if [run.call.numbers for run, _ in layers[end]] != expected:
            break
        end += 1
    return end, strides


def _is_same_code(one: _Layer, other: _Layer) -> bool:
    return (
        one[0][0].layer >= 0
        and [run.key for run, _ in one] == [run.key for run, _ in other]
        and [firsts for _, firsts in one] == [firsts for _, firsts in other]
    )


def instructions_of_path(program: Program, path: Path, worker: int) -> list[tuple[int, Opcode, int]]:
    """(op, opcode, tile number) of every instruction that a worker of the path runs, in order."""
    place = path.workers.index(worker)
    found = []
    for part in path.parts:
        layers = range(part.first, part.end) if isinstance(part, Loop) else range(1)
        calls = part.calls if isinstance(part, Loop) else (part,)
        for layer in layers:
            for call in calls:
                op = call.op + (layer - layers[0]) * _ops_a_layer(program)
                first = call.first_tiles[place]
                found += [(op, call.opcode, first + j * call.tile_stride) for j in range(call.count)]
    return found


def _ops_a_layer(program: Program) -> int:
    return sum(op.layer == 0 for op in program.ops)
