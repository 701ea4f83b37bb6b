"""Frozen programs -> CUDA: one persistent kernel a row bucket, one straight-line path an SM.

A path is calls with literals: trip counts, tile strides, pages, counters, arrival counts. SMs whose paths
differ only in which tile they begin with share one, and so do layers that differ only in where their weights
lie: these become a loop over layers. Nothing is decoded or dispatched when it runs. `cuda_paths.py` finds
what is alike.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import msgspec

from megakernel.artifact import WeightLayout, lay_out_weights, matrix_names
from megakernel.buffer_layout import lay_out_buffers
from megakernel.cuda_constants import ASSERTION, RESERVED_BYTES, THREADS_A_BLOCK
from megakernel.cuda_limits import check_cuda_programs
from megakernel.cuda_paths import Call, Loop, Operands, Path, paths_of
from megakernel.program import Epilogue, Op, Opcode, Program, Prologue

_LINE_BYTES = 256


class GeneratedCuda(msgspec.Struct, frozen=True, kw_only=True):
    source: str
    layout: WeightLayout
    buffer_offsets: Mapping[str, int]
    """Bytes from the start of the activations, by buffer name."""
    activation_bytes: int
    num_counters: int
    """Of all buckets, the one at each step's end included."""
    shared_bytes: int
    """Dynamic, a block."""
    num_blocks: int
    paths: Mapping[int, int]
    """By bucket: how many different paths its SMs take."""

    @staticmethod
    def kernel_name(bucket: int) -> str:
        return f"step_rows{bucket}"


def generate_cuda(programs: Sequence[Program], formats: Mapping[str, str]) -> GeneratedCuda:
    """One source for all of an artifact's programs, ascending by bucket. Raises CodegenError."""
    check_cuda_programs(programs)
    layout = lay_out_weights(programs[0], formats, "cuda")
    offsets, activation_bytes = lay_out_buffers(programs, _LINE_BYTES)
    first_counters, num_counters = [], 0
    for program in programs:
        first_counters.append(num_counters)
        num_counters += program.num_counters + 1
    writer = _Source(programs, layout, offsets, first_counters)
    source = "\n".join(writer.lines()) + "\n"
    first = programs[0]
    return GeneratedCuda(
        source=source,
        layout=layout,
        buffer_offsets=offsets,
        activation_bytes=activation_bytes,
        num_counters=num_counters,
        shared_bytes=RESERVED_BYTES + max(p.num_pages * p.page_bytes for p in programs),
        num_blocks=len(first.workers),
        paths=writer.num_paths,
    )


def _f32(value: float) -> str:
    return f"{value!r}f"


class _Source:
    def __init__(
        self,
        programs: Sequence[Program],
        layout: WeightLayout,
        offsets: Mapping[str, int],
        first_counters: Sequence[int],
    ) -> None:
        self.programs = programs
        self.layout = layout
        self.offsets = offsets
        self.first_counters = first_counters
        self.num_paths: dict[int, int] = {}

    def lines(self) -> Iterator[str]:
        first = self.programs[0]
        geometry = first.geometry
        yield f"// {first.model_fingerprint} on {first.machine}. Generated; do not edit."
        yield '#include "cuda/engine.h"'
        yield ASSERTION
        yield "namespace {"
        yield "using namespace headrace;"
        yield (
            f"using Shape = AttentionShape<{geometry.num_heads}, {geometry.num_kv_heads}, "
            f"{geometry.head_dim}, {first.split_tokens}>;"
        )
        for program, first_counter in zip(self.programs, self.first_counters, strict=True):
            yield from _Bucket(self, program, first_counter).lines()
        yield "}  // namespace"
        for program, first_counter in zip(self.programs, self.first_counters, strict=True):
            yield from self.kernel(program, first_counter)
        names = ", ".join(GeneratedCuda.kernel_name(program.bucket) for program in self.programs)
        yield f"HEADRACE_KERNELS({names})"

    def kernel(self, program: Program, first_counter: int) -> Iterator[str]:
        bucket, geometry = program.bucket, program.geometry
        finished = first_counter + program.num_counters
        name = GeneratedCuda.kernel_name(bucket)
        yield f'extern "C" __global__ void __launch_bounds__({THREADS_A_BLOCK}, 1)'
        yield f"{name}(const __grid_constant__ headrace::StepArguments arguments) {{"
        yield "  using namespace headrace;"
        yield "  Worker w(arguments);"
        yield "  begin_block(w);"
        yield "  if (w.is_loader()) {"
        yield f"    load_path_rows{bucket}(w);"
        yield "  } else {"
        yield f"    consume_path_rows{bucket}(w);"
        yield f"    hand_out_results<{geometry.vocab_size}, {program.stats_span}>(w, {finished});"
        yield "  }"
        yield "}"


class _Bucket:
    """One bucket's paths."""

    def __init__(self, source: _Source, program: Program, first_counter: int) -> None:
        self.source = source
        self.program = program
        self.first_counter = first_counter
        self.bucket = program.bucket
        self.tables: list[str] = []

    def lines(self) -> Iterator[str]:
        paths = paths_of(self.program, self.describe)
        self.source.num_paths[self.bucket] = len(paths)
        bodies: list[str] = []
        for index, path in enumerate(paths):
            for role in ("consume", "load"):
                bodies.append(
                    f"__device__ __forceinline__ void {role}_rows{self.bucket}_{index}(Worker& w) {{"
                )
                bodies += self.body(path, role)
                bodies.append("}")
        yield from self.tables
        yield from bodies
        for role in ("consume", "load"):
            yield f"__device__ __forceinline__ void {role}_path_rows{self.bucket}(Worker& w) {{"
            yield from self.choice(paths, role)
            yield "}"

    def choice(self, paths: Sequence[Path], role: str) -> Iterator[str]:
        """Runs of SMs with one path each, by comparisons: a jump table would be an indirect branch."""
        path_of = {worker: index for index, path in enumerate(paths) for worker in path.workers}
        runs = [(key, len(list(run))) for key, run in groupby(path_of[w] for w in sorted(path_of))]
        end = 0
        for number, (index, length) in enumerate(runs):
            end += length
            condition = f"if (w.sm < {end}) " if number < len(runs) - 1 else ""
            yield f"  {condition}return {role}_rows{self.bucket}_{index}(w);"

    def describe(self, op: Op) -> Operands:
        """Formats must be equal where layers share code; offsets may grow."""
        layout = self.source.layout
        numbers = {"layer": op.layer}
        formats: tuple[str, ...] = ()
        if names := matrix_names(op):
            numbers["weights"] = layout.at(*names).offset
            formats = (layout.at(*names).format,)
        if op.norm:
            numbers["norm"] = layout.at(op.norm).offset
        if op.biases:
            numbers["bias"] = layout.at(*op.biases).offset
        for index, name in enumerate(op.head_norms):
            numbers[f"head_norm{index}"] = layout.at(name).offset
        return Operands((formats, op.epilogue, op.prologue, op.in_features, op.out_features), numbers)

    def body(self, path: Path, role: str) -> Iterator[str]:
        for part in path.parts:
            if isinstance(part, Loop):
                yield "#pragma unroll 1"
                yield f"  for (int layer = 0; layer < {part.end - part.first}; layer++) {{"
                for call in part.calls:
                    yield from ("    " + line for line in self.call(path, call, role))
                yield "  }"
            else:
                yield from ("  " + line for line in self.call(path, part, role))

    def call(self, path: Path, call: Call, role: str) -> list[str]:
        writer = _Call(self, path, call)
        return writer.consume() if role == "consume" else writer.load()

    def table(self, values: Sequence[int]) -> str:
        """A constant of one number an SM."""
        name = f"kFirst{self.bucket}_{len(self.tables)}"
        text = ", ".join(map(str, values))
        self.tables.append(f"__constant__ uint16_t {name}[] = {{{text}}};")
        return f"{name}[w.sm]"


def _pick(values: Sequence[int]) -> str:
    """An expression in j that is values[j % len(values)]."""
    text = f"{values[-1]}"
    for index in reversed(range(len(values) - 1)):
        text = f"j % {len(values)} == {index} ? {values[index]} : {text}"
    return text if len(values) == 1 else f"({text})"


class _Call:
    """A run of instructions of one op on one SM: a loop over its tiles."""

    def __init__(self, bucket: _Bucket, path: Path, call: Call) -> None:
        self.bucket = bucket
        self.program = bucket.program
        self.layout = bucket.source.layout
        self.path = path
        self.call = call
        self.op = bucket.program.ops[call.op]

    def number(self, name: str, base: int = 0) -> str:
        """An operand, as it depends on the layer of a loop."""
        value, stride = base + self.call.numbers[name], self.call.strides.get(name, 0)
        return f"({value} + layer * INT64_C({stride}))" if stride else f"{value}"

    def first(self) -> str:
        """The number of the run's first tile."""
        firsts = self.call.first_tiles
        if len(set(firsts)) == 1:
            return f"{firsts[0]}u"
        offsets = {first - worker for worker, first in zip(self.path.workers, firsts, strict=True)}
        if len(offsets) == 1:
            return f"(w.sm + {offsets.pop()})"
        values = [0] * len(self.program.workers)
        for worker, first in zip(self.path.workers, firsts, strict=True):
            values[worker] = first
        return self.bucket.table(values)

    def counter(self, name: str) -> str:
        return self.number(name, self.bucket.first_counter)

    def consume(self) -> list[str]:
        lines = [f"// {self.op.name}: {self.call.count} of {self.call.columns} columns"]
        lines += [
            f"wait_counter(w, {self.counter(wait.operand)}, {wait.target}u, {wait.arrivals}u);"
            for wait in self.call.waits
        ]
        lines += ["w.staged = 0;", *self.loop(self.consume_tile())]
        if self.call.has_signal:
            lines.append(f"signal_counter(w, {self.counter('signal')});")
        return lines

    def load(self) -> list[str]:
        if self.call.opcode not in (Opcode.LINEAR, Opcode.LINEAR_PARTIAL):
            return [f"w.instruction += {self.call.count};  // {self.op.name}"]
        return [f"// {self.op.name}", *self.loop(self.load_tile())]

    def loop(self, tile: Sequence[str]) -> list[str]:
        return [
            *(["#pragma unroll 1"] if self.call.count > 1 else []),
            f"for (uint32_t j = 0; j < {self.call.count}; j++) {{",
            f"  const uint32_t tile = {self.first()} + j * {self.call.tile_stride};",
            *("  " + line for line in tile),
            "}",
        ]

    def place(self) -> list[str]:
        """A linear tile's first column and units of K."""
        call = self.call
        if call.opcode is not Opcode.LINEAR_PARTIAL:
            return [
                f"const uint32_t n0 = tile * {call.tile_columns};",
                f"constexpr uint32_t u0 = 0, u1 = num_units({self.format}, {self.op.in_features});",
            ]
        blocks = -(-self.op.in_features // call.block_k)
        unit = f"unit_k({self.format})"
        bound = f"{call.block_k}u * ({blocks}u * {{}} / {call.num_parts}u)"
        return [
            f"const uint32_t part = tile % {call.num_parts};",
            f"const uint32_t n0 = tile / {call.num_parts} * {call.tile_columns};",
            f"const uint32_t u0 = {bound.format('part')} / {unit};",
            f"const uint32_t last = ({bound.format('(part + 1)')} + {unit} - 1) / {unit};",
            f"constexpr uint32_t num_of_k = num_units({self.format}, {self.op.in_features});",
            "const uint32_t u1 = last < num_of_k ? last : num_of_k;",
        ]

    def load_tile(self) -> list[str]:
        load = (
            f"load_tile<{self.format}, {self.op.in_features}>(w, {self.number('weights')}, n0 / 16, "
            f"{-(-self.call.columns // 16)}, u0, u1, {self.page(self.call.weight_pages)}, "
            f"w.instruction - {_pick(self.call.ahead)});"
        )
        return [*self.place(), *self.where_needed([load, "w.next(true);"], ["w.next(false);"])]

    def where_needed(self, statements: list[str], otherwise: list[str]) -> list[str]:
        """A tile of the head that no row wants is left out."""
        if self.op.epilogue is not Epilogue.LOGITS or self.call.opcode is not Opcode.LINEAR:
            return statements
        needed = f"is_needed<{self.program.stats_span}>(w, n0, n0 + {self.call.columns})"
        return [f"if ({needed}) {{", *statements, "} else {", *otherwise, "}"]

    @property
    def format(self) -> str:
        return f"Format::k{self.layout.at(*matrix_names(self.op)).format}"

    def page(self, pages: Sequence[int]) -> str:
        return f"w.page({_pick(pages)}, {self.program.page_bytes})"

    def vector(self, name: str) -> str:
        return f"reinterpret_cast<const float*>(w.step.weights + {self.number(name)})"

    def buffer(self, index: int) -> str:
        name = self.program.buffers[index].name
        return f"reinterpret_cast<float*>(w.step.activations + {self.bucket.source.offsets[name]})"

    def consume_tile(self) -> list[str]:
        op, call, program, geometry = self.op, self.call, self.program, self.program.geometry
        match call.opcode:
            case Opcode.EMBED:
                return [
                    f"const uint32_t n0 = tile * {call.tile_columns};",
                    f"embed_tile<{self.format}, {geometry.hidden_size}>(w, {self.number('weights')}, n0, "
                    f"n0 + {call.columns}, {self.buffer(op.output)});",
                    "w.next(false);",
                ]
            case Opcode.ATTENTION:
                heads = geometry.num_kv_heads
                return [
                    f"attention_tile<Shape>(w, {self.number('layer')}, tile % {heads}, tile / {heads}, "
                    f"{call.num_parts}, {self.buffer(op.input)}, {self.buffer(op.output)}, "
                    f"{program.buffers[op.output].columns}, {self.page(call.input_pages)});",
                    "w.next(false);",
                ]
            case Opcode.REDUCE:
                parts = self.buffer(program.partial_buffers[op.index])
                return [
                    f"const uint32_t n0 = tile * {call.tile_columns};",
                    f"reduce_tile<{program.bucket}, {call.columns}>(w, {parts}, {call.num_parts}, "
                    f"{op.out_features}, n0, {self.sink(is_normed=False)});",
                    "w.next(false);",
                ]
            case _:
                return self.linear()

    def linear(self) -> list[str]:
        op, call, program = self.op, self.call, self.program
        is_normed = op.prologue is Prologue.RMS_NORM
        input_page = _pick(call.input_pages)
        if call.opcode is Opcode.LINEAR_PARTIAL:
            parts = self.buffer(program.partial_buffers[op.index])
            sink = (
                f"Store<{call.columns}, {_bool(is_normed)}>{{{{}}, {parts} + part * {op.out_features} + n0, "
                f"{call.num_parts * op.out_features}}}"
            )
            number = f"{input_page} * {call.num_parts} + part + 1"
        else:
            sink, number = self.sink(is_normed=is_normed), f"{input_page} + 1"
        statement = (
            f"linear_tile<{self.format}, {program.bucket}, {op.in_features}, {call.columns}>(w, "
            f"{self.input()}, {sink}, u0, u1, {self.page(call.weight_pages)}, "
            f"{self.page(call.input_pages)}, w.takes({number}));"
        )
        skip = ["report_progress(w);", "w.next(false);"]
        return [*self.place(), *self.where_needed([statement, "w.next(true);"], skip)]

    def input(self) -> str:
        op, program = self.op, self.program
        source = self.buffer(op.input)
        match op.prologue:
            case Prologue.RMS_NORM:
                eps = _f32(program.geometry.rms_norm_eps)
                return f"Normed<{op.in_features}>{{{source}, {self.vector('norm')}, {eps}}}"
            case Prologue.COMBINE:
                geometry, columns = program.geometry, program.buffers[op.input].columns
                template = f"{geometry.num_heads}, {geometry.head_dim}, {program.split_tokens}"
                return f"Combined<{template}>{{{source}, {columns}}}"
            case _:
                return f"Plain<{op.in_features}>{{{source}}}"

    def sink(self, *, is_normed: bool) -> str:
        op, call, program, geometry = self.op, self.call, self.program, self.program.geometry
        template = f"{call.columns}, {_bool(is_normed)}"
        columns = program.buffers[op.output].columns
        match op.epilogue:
            case Epilogue.STORE:
                return f"Store<{template}>{{{{}}, {self.buffer(op.output)} + n0, {columns}}}"
            case Epilogue.RESIDUAL:
                return f"Residual<{template}>{{{{}}, {self.buffer(op.output)} + n0, {columns}}}"
            case Epilogue.SWIGLU:
                return f"SwiGlu<{template}>{{{{}}, {self.buffer(op.output)} + n0 / 2, {columns}}}"
            case Epilogue.LOGITS:
                return f"Logits<{template}, {geometry.vocab_size}, {program.stats_span}>{{{{}}, n0}}"
            case Epilogue.ROPE_APPEND:
                bias = self.vector("bias") if op.biases else "nullptr"
                norms = [self.vector(f"head_norm{i}") for i in range(len(op.head_norms))] or ["nullptr"] * 2
                heads = f"{geometry.num_heads}, {geometry.num_kv_heads}, {geometry.head_dim}"
                has = f"{_bool(bool(op.biases))}, {_bool(bool(op.head_norms))}"
                return (
                    f"RotateAppend<{template}, {heads}, {has}>"
                    f"{{n0, {self.page(call.output_pages)}, {self.buffer(op.output)}, "
                    f"static_cast<int>({self.number('layer')}), {bias}, {', '.join(norms)}, "
                    f"{_f32(geometry.rms_norm_eps)}}}"
                )


def _bool(value: bool) -> str:
    return "true" if value else "false"
