"""One op's tiles as C++: a loop over those of an SM, for either role."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from megakernel.artifact import WeightLayout, matrix_names
from megakernel.codegen_limits import CodegenError
from megakernel.cuda_activations import ATTENDED, SQUARES, WEIGHTED, StoredActivations, read_by
from megakernel.cuda_calls import Call, Pattern, Run, WaitAt, pattern_of
from megakernel.cuda_constants import ATTENDED_ROWS, ROW_CHUNK
from megakernel.cuda_counters import head_arrivals_at, row_chunks, split_arrivals_at
from megakernel.cuda_literals import Literals
from megakernel.footprint import stages_attention
from megakernel.program import (
    Epilogue,
    Opcode,
    PageRole,
    Program,
    Prologue,
    max_splits,
    parts_of,
    row_step,
    split_blocks,
)

HEAD_SUMS = "head_sums"
"""Of the activations: QKV's sums, of heads that several tiles make up."""


class CallContext(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What the calls of one bucket share."""

    program: Program
    layout: WeightLayout
    offsets: Mapping[str, int]
    """Bytes from the start of the activations, by buffer name, of ATTENDED and of HEAD_SUMS."""
    literals: Literals
    first_counter: int
    activations: StoredActivations


def shape_name(is_staged: bool) -> str:
    """Of the sources' AttentionShape."""
    return "StagedShape" if is_staged else "Shape"


class CallSource:
    """An op's tiles: on each SM a loop over its own."""

    def __init__(self, context: CallContext, call: Call) -> None:
        self.context = context
        self.program = context.program
        self.layout = context.layout
        self.literals = context.literals
        self.activations = context.activations
        self.call = call
        self.op = context.program.ops[call.op]

    def number(self, name: str) -> str:
        """An operand, as it depends on the layer of a loop."""
        value, stride = self.call.numbers[name], self.call.strides.get(name, 0)
        return f"({value} + (layer + w.zero()) * INT64_C({stride}))" if stride else f"{value}"

    def literal(self, of_run: Callable[[Run], int | None], otherwise: int | None = None) -> str:
        """What it is of each SM's run in each layer; `otherwise`: of SMs without one."""
        return self.literals.number(
            [[otherwise if run is None else of_run(run) for run in layer] for layer in self.call.runs]
        )

    def consume(self) -> list[str]:
        lines = ["trace(w, kBegun);", *self.prefetch(), *self.waits(), "trace(w, kWaited);"]
        lines += self.attention() if self.call.opcode is Opcode.ATTENTION else self.loop(self.consume_tile())
        lines += self.signal()
        return self.where_run(lines)

    def load(self) -> list[str]:
        if self.call.opcode is not Opcode.LINEAR:
            return [f"w.instruction += {self.literal(lambda run: run.count, 0)};  // {self.op.name}"]
        return self.where_run(self.loop(self.load_tile()))

    def where_run(self, lines: list[str]) -> list[str]:
        """For SMs that have tiles of the op."""
        count = self.literal(lambda run: run.count, 0)
        condition = [] if all(run for layer in self.call.runs for run in layer) else ["if (count > 0)"]
        head = f"{{  // {self.op.name}: tiles of {self.call.columns} columns"
        return [
            head,
            "w.begin_call();",
            f"const uint32_t count = {count};",
            *condition,
            "{",
            *lines,
            "}",
            "}",
        ]

    def prefetch(self) -> Iterator[str]:
        """What is read after the waits, and does not depend on what is waited for."""
        if self.call.opcode is Opcode.LINEAR:
            yield f"const auto source = {self.input()};"
        if self.op.epilogue is Epilogue.ROPE_APPEND:
            yield f"prefetch_turns<{self.program.geometry.head_dim}>(w);"
        if self.call.opcode is Opcode.ATTENTION:
            parts = parts_of(self.program)
            blocks = split_blocks("cuda", max_splits(self.program), parts)
            dealing = f"{parts}, {blocks}, {row_step(self.program)}"
            yield f"const AttentionTiles tiles = {{{self.first}, {self.stride}, count, {dealing}}};"
            shape = shape_name(stages_attention(self.program))
            yield f"FirstSplit<{shape}> begun{{}};"
            page = self.attention_page()
            yield (
                f"begin_attention<{shape}>(w, {self.number('layer')}, tiles, begun, {page}, {self.deals()});"
            )

    def waits(self) -> Iterator[str]:
        """A worker's first wait with the others' first, and so on."""
        runs = list(self.call.all_runs())
        first = self.context.first_counter
        for index in range(max(len(run.waits) for run in runs)):
            counter = self.of_wait(index, lambda wait: first + wait.counter)
            target = self.of_wait(index, lambda wait: wait.target)
            arrivals = self.of_wait(index, lambda wait: wait.arrivals)
            if any(index >= len(run.waits) for run in runs):
                some = self.of_wait(index, lambda wait: wait.target, 0)
                yield f"if (const uint32_t target = {some}; target > 0)"
                target = "target"
            yield f"wait_counter(w, {counter}, {target}, {arrivals});"

    def of_wait(self, index: int, of: Callable[[WaitAt], int], otherwise: int | None = None) -> str:
        return self.literal(lambda run: of(run.waits[index]) if index < len(run.waits) else otherwise)

    def signal(self) -> Iterator[str]:
        signals = [run.signal for run in self.call.all_runs()]
        if max(signals) >= 0:
            if min(signals) < 0:
                yield f"if ({self.literal(lambda run: int(run.signal >= 0))})"
            first = self.context.first_counter
            counter = self.literal(lambda run: first + run.signal if run.signal >= 0 else None)
            yield f"signal_counter(w, {counter});"
        yield "trace(w, kSignalled, 1);"

    @property
    def first(self) -> str:
        return self.literal(lambda run: run.first)

    @property
    def stride(self) -> str:
        return self.literal(lambda run: run.stride if run.count > 1 else None)

    def loop(self, tile: Sequence[str]) -> list[str]:
        if max(run.count for run in self.call.all_runs()) == 1:
            return [f"const uint32_t tile = {self.first};", *tile]
        return [
            f"const uint32_t first = {self.first}, stride = {self.stride};",
            "#pragma unroll 1",
            "for (uint32_t j = 0; j < count; j++) {",
            "  w.renew();",
            "  const uint32_t tile = first + j * stride;",
            *("  " + line for line in tile),
            "}",
        ]

    def by_tile(self, of_run: Callable[[Run], Sequence[int]]) -> str:
        """An expression in j: of each SM's run its entry j."""
        return self.by_index(of_run, "j", max(run.count for run in self.call.all_runs()))

    def by_load(self, of_run: Callable[[Run], Sequence[int]]) -> str:
        """An expression in `load` and, of several tiles, j: of each SM's run the entry of that load."""
        loads, count = self.call.num_loads, max(run.count for run in self.call.all_runs())
        index = "j" if loads == 1 else f"(j * {loads}u + load)" if count > 1 else "load"
        return self.by_index(of_run, index, count * loads)

    def by_index(self, of_run: Callable[[Run], Sequence[int]], index: str, longest: int) -> str:
        runs = list(self.call.all_runs())
        if longest == 1:
            return self.literal(lambda run: of_run(run)[0])
        patterns = [pattern_of(of_run(run)) for run in runs]
        pattern = Pattern(max(p.beginning for p in patterns), math.lcm(*(p.period for p in patterns)))
        length = min(pattern.length, longest)
        rows: list[tuple[int, ...]] = []

        def row_of(run: Run) -> int:
            """The first of the rows that agrees with what the run has."""
            values = of_run(run)
            own = pattern_of(values)
            row = tuple(values[own.index(at)] for at in range(length))
            for number, held in enumerate(rows):
                if held[: len(values)] == row[: len(values)]:
                    return number
            rows.append(row)
            return len(rows) - 1

        row = self.literal(row_of)
        if length == pattern.length:
            index = _index(pattern, index)
        if len(rows) == 1 and len(set(rows[0])) == 1:
            return f"{rows[0][0]}u"
        table = self.literals.table([value for row_values in rows for value in row_values])
        return f"{table}[{row} * {length}u + {index}]" if len(rows) > 1 else f"{table}[{index}]"

    def place(self) -> list[str]:
        """A linear tile's first column, and where its rows begin and end."""
        call = self.call
        if call.row_chunks == 1:
            return [f"const uint32_t n0 = tile * {call.tile_columns};"]
        return [
            f"const uint32_t n0 = tile / {call.row_chunks} * {call.tile_columns};",
            f"const int r0 = tile % {call.row_chunks} * {ROW_CHUNK};",
        ]

    def load_tile(self) -> list[str]:
        after = self.by_load(lambda run: run.ahead)
        statement = (
            f"load_tile<{self.format}, {self.op.in_features}, {self.units(self.call.load_k)}>(w, "
            f"{self.number('weights')}, n0 / 16, {-(-self.call.columns // 16)}, "
            f"[&](uint32_t load) {{ return {self.page(PageRole.WEIGHTS)}; }}, "
            f"[&](uint32_t load) {{ return w.instruction - {after}; }});"
        )
        return [*self.place(), *self.where_needed([statement], [])]

    def where_needed(self, statements: list[str], otherwise: list[str]) -> list[str]:
        """A tile of the head that no row wants is left out, and one of rows that the step does not have."""
        conditions = []
        if self.op.epilogue is Epilogue.LOGITS:
            conditions.append(f"is_needed<{self.program.stats_span}>(w, n0, n0 + {self.call.columns})")
        if self.call.row_chunks > 1:
            conditions.append("r0 < w.step.num_rows")
        if not conditions:
            return statements
        skip = f"w.next(0, {self.call.num_loads});"
        return [f"if ({' && '.join(conditions)}) {{", *statements, "} else {", *otherwise, skip, "}"]

    def units(self, k: int) -> str:
        """Of K, as many as are packed in units."""
        if k >= self.op.in_features:
            return f"num_units({self.format}, {self.op.in_features})"
        return f"{k} / unit_k({self.format})"

    @property
    def format(self) -> str:
        return f"Format::k{self.layout.at(*matrix_names(self.op)).format}"

    def page_number(self, role: PageRole) -> str:
        by = self.by_load if role is PageRole.WEIGHTS else self.by_tile
        return by(lambda run: run.pages[role])

    def page(self, role: PageRole) -> str:
        return f"w.page({self.page_number(role)}, {self.program.page_bytes})"

    def vector(self, name: str) -> str:
        return f"reinterpret_cast<const float*>(w.step.weights + {self.number(name)})"

    @property
    def stored_as(self) -> str:
        """The format of the op's output for the op that reads it."""
        return f"Format::k{self.activations.formats[self.op.index]}"

    def buffer(self, index: int) -> str:
        return self.buffer_named(self.program.buffers[index].name)

    def buffer_named(self, name: str, element: str = "float") -> str:
        at = f"w.step.activations + w.zero() + {self.context.offsets[name]}"
        return f"reinterpret_cast<{element}*>({at})"

    def consume_tile(self) -> list[str]:
        op, call, geometry = self.op, self.call, self.program.geometry
        match call.opcode:
            case Opcode.EMBED:
                return [
                    f"const uint32_t n0 = tile * {call.tile_columns};",
                    f"embed_tile<{self.format}, {geometry.hidden_size}>(w, {self.number('weights')}, n0, "
                    f"n0 + {call.columns}, {self.buffer(op.output)}, {self.normed_to()});",
                    "w.next(false);",
                ]
            case _:
                return self.linear()

    def attention(self) -> list[str]:
        """All of an SM's tiles in one call, in which they share their pages."""
        op, program = self.op, self.program
        arrivals = self.context.first_counter + split_arrivals_at(program)
        queries, splits = program.buffers[op.input], program.buffers[op.output]
        offsets = self.context.offsets
        attended = (
            f"{offsets[queries.name]}, {offsets[splits.name]}, {splits.columns}, {{{offsets[ATTENDED]}}}, "
            f"w.step.counters + {arrivals}, {program.bucket}"
        )
        kind, shape = f"Attended<PairsTo<{self.stored_as}>>", shape_name(stages_attention(program))
        return [
            f"attention_tiles<{shape}>(w, {self.number('layer')}, tiles, begun, {kind}{{{attended}}}, "
            f"{self.attention_page()});",
            "w.instruction += count;",
        ]

    def deals(self) -> str:
        """Whether splits are yet to be dealt to the SM's tiles: what an earlier layer of the loop noted down
        holds for all, unless other rows or tiles came between."""
        tiles = f"{self.first} {self.stride} {self.literal(lambda run: run.count, 0)}"
        is_once = len(self.call.runs) > 1 and "layer" not in tiles and self.program.bucket <= ATTENDED_ROWS
        return "layer == 0" if is_once else "true"

    def attention_page(self) -> str:
        if any(len(set(run.pages[PageRole.INPUT])) > 1 for run in self.call.all_runs()):
            raise CodegenError(f"{self.op.name}: tiles of an SM have pages of their own")
        first = self.literal(lambda run: run.pages[PageRole.INPUT][0])
        return f"w.page({first}, {self.program.page_bytes})"

    def linear(self) -> list[str]:
        op, call, program = self.op, self.call, self.program
        is_normed = op.prologue is Prologue.RMS_NORM
        # Of chunks of rows each has an input of its own.
        takes = "true" if call.row_chunks > 1 else f"w.takes({self.page_number(PageRole.INPUT)} + 1)"
        rows = f"r0, r0 + {ROW_CHUNK}" if call.row_chunks > 1 else f"0, {program.bucket}"
        statement = (
            f"linear_tile<{self.format}, {program.bucket}, {op.in_features}, {call.columns}, "
            f"{self.units(call.load_k)}, {self.units(call.input_k)}>(w, source, "
            f"{self.sink(is_normed=is_normed)}, {rows}, "
            f"[&](uint32_t load) {{ return {self.page(PageRole.WEIGHTS)}; }}, "
            f"{self.page(PageRole.INPUT)}, {takes});"
        )
        loads = call.num_loads
        skip = [f"report_progress(w, {loads});"]
        return [*self.place(), *self.where_needed([statement, f"w.next({loads}, {loads});"], skip)]

    def normed_to(self) -> str:
        """Where the op's output goes besides, weighted for the norm of the op that reads it."""
        to, squares = self.context.offsets[WEIGHTED], self.context.offsets[SQUARES]
        columns = self.program.buffers[self.op.output].columns
        return f"NormedTo<{self.stored_as}>{{{to}, {squares}, {columns}, {self.vector('next_norm')}}}"

    def input(self) -> str:
        op = self.op
        if op.prologue is not Prologue.RMS_NORM:
            rows = self.buffer_named(read_by(self.program, op), "uint32_t")
            return f"Plain<{op.in_features}>{{{{{rows}}}}}"
        rows, squares = self.buffer_named(WEIGHTED, "uint32_t"), self.buffer_named(SQUARES)
        eps = _f32(self.program.geometry.rms_norm_eps)
        return f"Weighted<{op.in_features}>{{{{{rows}}}, {squares}, {eps}}}"

    def sink(self, *, is_normed: bool) -> str:
        op, call, program, geometry = self.op, self.call, self.program, self.program.geometry
        template = f"{call.columns}, {_bool(is_normed)}"
        columns = program.buffers[op.output].columns
        name = program.buffers[op.output].name
        match op.epilogue:
            case Epilogue.SWIGLU:
                to = f"{self.context.offsets[name]} + n0"  # half as many elements, of two bytes
                return f"SwiGlu<{template}, PairsTo<{self.stored_as}>>{{{{}}, {{{to}}}, {columns}}}"
            case Epilogue.STORE:
                return f"Store<{template}>{{{{}}, {self.buffer(op.output)} + n0, {columns}}}"
            case Epilogue.RESIDUAL:
                normed = self.normed_to()
                kind = f"Residual<{template}, {normed.partition('{')[0]}>"
                return f"{kind}{{{{}}, {self.buffer(op.output)} + n0, {columns}, n0, {normed}}}"
            case Epilogue.LOGITS:
                return f"Logits<{template}, {geometry.vocab_size}, {program.stats_span}>{{{{}}, n0}}"
            case Epilogue.ROPE_APPEND:
                bias = self.vector("bias") if op.biases else "nullptr"
                norms = [self.vector(f"head_norm{i}") for i in range(len(op.head_norms))] or ["nullptr"] * 2
                sums = self.head_sums()
                kept = sums.partition("{")[0]
                heads = f"{geometry.num_heads}, {geometry.num_kv_heads}"
                has = f"{_bool(bool(op.biases))}, {_bool(bool(op.head_norms))}"
                return (
                    f"RotateAppend<{kept}, {_bool(is_normed)}, {heads}, {has}>"
                    f"{{{{}}, {sums}, n0 / {geometry.head_dim}, {self.buffer(op.output)}, "
                    f"static_cast<int>({self.number('layer')}), {bias}, {', '.join(norms)}, "
                    f"{_f32(geometry.rms_norm_eps)}}}"
                )

    def head_sums(self) -> str:
        """Where a tile of QKV keeps sums until heads are complete."""
        op, program, dim = self.op, self.program, self.program.geometry.head_dim
        if self.call.columns % dim == 0:
            return f"WholeHeads<{self.call.columns}, {dim}>{{{self.page(PageRole.OUTPUT)}}}"
        arrivals = self.context.first_counter + head_arrivals_at(program)
        return (
            f"PartOfHead<{self.call.columns}, {dim}>"
            f"{{{self.buffer_named(HEAD_SUMS)} + n0, {op.out_features}, n0 % {dim}, "
            f"w.step.counters + {arrivals} + n0 / {dim} * {row_chunks(program)}}}"
        )


def _index(pattern: Pattern, index: str) -> str:
    beginning, period = pattern.beginning, pattern.period
    if not beginning:
        return f"{index} % {period}u"
    return f"({index} < {beginning}u ? {index} : {beginning}u + ({index} - {beginning}u) % {period}u)"


def _bool(value: bool) -> str:
    return "true" if value else "false"


def _f32(value: float) -> str:
    return f"{value!r}f"
