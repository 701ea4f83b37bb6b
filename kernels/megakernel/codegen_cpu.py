"""Frozen programs -> straight-line C++: one function a worker and bucket, one call an instruction.

Offsets, shapes, trip counts, counters and arrival targets are literals; only the step's rows are
run-time data. All buckets of an artifact share kernels, weights and buffers, so a row's arithmetic is the
same in each.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from megakernel.artifact import WeightLayout, lay_out_weights, matrix_names
from megakernel.buffer_layout import lay_out_buffers
from megakernel.codegen_limits import CodegenError, KvFormat
from megakernel.cpu_limits import check_programs
from megakernel.pack import group_bytes
from megakernel.packing import GROUP
from megakernel.program import Epilogue, Instruction, Op, Opcode, OpKind, Program, Prologue

_KV_TYPES: dict[KvFormat, str] = {"float16": "Half", "float32": "float"}
_LINE_BYTES = 64
_WAITING_LINES = 512
"""Weights fetched while waiting, at most: 32 KB stay in L2."""
_ATTENDING_LINES = 4096
"""Weights fetched during attention, at most: a quarter of a megabyte stays in L2."""
_HAS_LOGITS = "s.head.num_rows() > 0"
_HAS_FULL_ROWS = "s.head.num_full > 0"


class Generated(msgspec.Struct, frozen=True, kw_only=True):
    source: str
    layout: WeightLayout
    buffer_offsets: Mapping[str, int]
    """Bytes from the start of the activations, by buffer name."""


def generate(
    programs: Sequence[Program], formats: Mapping[str, str], kv_format: KvFormat = "float16"
) -> Generated:
    """One source for all of an artifact's programs, ascending by bucket. Raises CodegenError."""
    check_programs(programs)
    layout = lay_out_weights(programs[0], formats)
    offsets, activation_bytes = lay_out_buffers(programs, _LINE_BYTES)
    writer = _Source(programs, layout, offsets, activation_bytes, kv_format)
    return Generated(source=writer.text(), layout=layout, buffer_offsets=offsets)


class Ahead(msgspec.Struct, frozen=True):
    """Weights to come: where they start, and how many cache lines they are; none: nothing to come."""

    offset: int
    num_lines: int
    is_head: bool = False
    """Of no use to a step without full rows: restricted ones read elsewhere."""
    else_offset: int = 0
    """What such a step reads in their place."""

    @property
    def place(self) -> str:
        return f"{_HAS_FULL_ROWS} ? {self.offset} : {self.else_offset}" if self.is_head else f"{self.offset}"


def _f32(value: float) -> str:
    return f"{value!r}f"


class _Source:
    def __init__(
        self,
        programs: Sequence[Program],
        layout: WeightLayout,
        offsets: Mapping[str, int],
        activation_bytes: int,
        kv_format: KvFormat,
    ) -> None:
        self.programs = programs
        self.first = programs[0]
        self.layout = layout
        self.offsets = offsets
        self.activation_bytes = activation_bytes
        self.kv_format = kv_format
        self.last_kv_op = max(op.index for op in self.first.ops if op.epilogue is Epilogue.ROPE_APPEND)
        """What comes after it is for logits alone: a step in which no row wants any computes none of it."""

    def text(self) -> str:
        return "\n".join(self.lines()) + "\n"

    def lines(self) -> Iterator[str]:
        geometry = self.first.geometry
        kv_type = _KV_TYPES[self.kv_format]
        yield f"// {self.first.model_fingerprint} on {self.first.machine}. Generated; do not edit."
        yield '#include "cpu/engine.h"'
        yield "namespace {"
        yield "using namespace headrace;"
        yield (
            f"using Shape = AttentionShape<{kv_type}, {geometry.num_heads}, {geometry.num_kv_heads}, "
            f"{geometry.head_dim}, {self.first.split_tokens}>;"
        )
        yield "constexpr size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }"
        yield f"constexpr size_t kPreparedBytes = whole_lines({self.prepared_bytes()});"
        yield "constexpr size_t kScratchBytes = kPreparedBytes + attention_scratch_bytes<Shape>();"
        for program in self.programs:
            for worker in range(len(program.workers)):
                yield from self.body(program, worker)
        yield from self.tables()
        yield "}  // namespace"
        yield "HEADRACE_LIBRARY(Shape, kFacts)"

    def prepared_bytes(self) -> str:
        """The largest of all ops' prepared inputs."""
        sizes = {
            f"PreparedInput<{self.format(op)}, {op.in_features}>::kBytes"
            for op in self.first.ops
            if op.kind is OpKind.LINEAR
        }
        return f"std::max<size_t>({{{', '.join(sorted(sizes))}}})"

    def tables(self) -> Iterator[str]:
        first_counter = 0
        buckets = []
        for program in self.programs:
            bucket = program.bucket
            names = ", ".join(_body_name(bucket, worker) for worker in range(len(program.workers)))
            yield f"const StepBody kWorkers{bucket}[] = {{{names}}};"
            buckets.append(f"{{{bucket}, {first_counter}, {program.num_counters}, kWorkers{bucket}}}")
            first_counter += program.num_counters
        yield f"const Bucket kBuckets[] = {{{', '.join(buckets)}}};"
        geometry = self.first.geometry
        facts = (
            *(len(self.first.workers), len(self.programs), max(first_counter, 1), geometry.num_layers),
            *(geometry.vocab_size, geometry.max_context_tokens, self.first.stats_span),
            *("kScratchBytes", self.activation_bytes, self.layout.num_bytes, "kBuckets"),
        )
        yield f"const LibraryFacts kFacts = {{{', '.join(map(str, facts))}}};"

    def body(self, program: Program, worker: int) -> Iterator[str]:
        """One worker's whole step."""
        # A list of calls: optimizing it further would take longer than all kernels, and gain nothing.
        yield f'__attribute__((optimize("O1"))) bool {_body_name(program.bucket, worker)}(Worker<Step>& w) {{'
        yield "  const Step& s = *w.step;"
        arrivals = _arrivals(program)
        prepared: tuple[int, ...] | None = None
        following = self.weights_after(program, worker)
        for number, instruction in enumerate(program.workers[worker]):
            op = program.ops[instruction.op]
            yield f"  // {number}: {op.name} [{instruction.n0}, {instruction.n1})"
            yield f"  w.reach({number});"
            is_for_logits = op.index > self.last_kv_op
            for wait in instruction.waits:
                own = self.ahead(op, instruction)
                ahead = own if own.num_lines else following[number]
                num_lines = min(ahead.num_lines, _WAITING_LINES)
                lines = f"{num_lines}"
                if (is_for_logits or ahead.is_head) and num_lines:
                    lines = f"{_HAS_FULL_ROWS if ahead.is_head else _HAS_LOGITS} ? {num_lines} : 0"
                yield (
                    f"  if (!w.wait({wait.counter}, {wait.target}u, {arrivals[wait.counter]}u, "
                    f"s.weights + {ahead.offset}, {lines})) return false;"
                )
            yield f"  w.start({number});"
            if is_for_logits:
                yield f"  if ({_HAS_LOGITS}) {{"
            if instruction.opcode in (Opcode.LINEAR, Opcode.LINEAR_PARTIAL):
                wanted = _input_of(op, instruction)
                if wanted != prepared:
                    yield f"  {self.prologue(program, op, instruction)}"
                    prepared = wanted
            yield f"  {self.call(program, op, instruction, following[number])}"
            if is_for_logits:
                yield "  }"
            if instruction.signal >= 0:
                yield f"  w.signal({instruction.signal});"
            yield f"  w.end({number});"
        yield "  return true;"
        yield "}"

    def ahead(self, op: Op, instruction: Instruction) -> Ahead:
        """An instruction's own weights."""
        if op.kind is not OpKind.LINEAR or instruction.opcode is Opcode.REDUCE:
            return Ahead(0, 0)
        segment = self.layout.at(*op.weights)
        group = group_bytes(segment.format, op.in_features)
        first, end = instruction.n0 // GROUP, -(-instruction.n1 // GROUP)
        num_lines = (end - first) * group // _LINE_BYTES
        return Ahead(segment.offset + first * group, num_lines, op.epilogue is Epilogue.LOGITS)

    def weights_after(self, program: Program, worker: int) -> list[Ahead]:
        """By instruction: the weights that the worker reads next after its own; after the last, the first."""
        instructions = program.workers[worker]
        found = [self.ahead(program.ops[instruction.op], instruction) for instruction in instructions]
        following = []
        upcoming = next((ahead for ahead in found if ahead.num_lines), Ahead(0, 0))
        first = upcoming
        for ahead in reversed(found):
            following.append(msgspec.structs.replace(upcoming, else_offset=first.offset))
            upcoming = ahead if ahead.num_lines else upcoming
        return following[::-1]

    def prologue(self, program: Program, op: Op, instruction: Instruction) -> str:
        source = self.buffer(program, op.input)
        rows = f"{instruction.r0}, {instruction.r1}, w.scratch"
        k0, k1 = _k_range(op, instruction)
        match op.prologue:
            case Prologue.RMS_NORM:
                norm = self.layout.at(op.norm).offset
                eps = _f32(program.geometry.rms_norm_eps)
                return (
                    f"prepare_normed<{self.format(op)}, {op.in_features}, {k0}, {k1}, {_rows_of(op)}>"
                    f"(s, {source}, {norm}, {eps}, {rows});"
                )
            case Prologue.COMBINE:
                return f"prepare_combined<{self.format(op)}, Shape, {k0}, {k1}>(s, {source}, {rows});"
            case _:
                return f"prepare_plain<{self.format(op)}, {k0}, {k1}>(s, {source}, {rows});"

    def call(self, program: Program, op: Op, instruction: Instruction, then: Ahead) -> str:
        n0, n1, r0, r1 = instruction.n0, instruction.n1, instruction.r0, instruction.r1
        match instruction.opcode:
            case Opcode.EMBED:
                segment = self.layout.at(*matrix_names(op))
                out = self.buffer(program, op.output)
                kernel = f"embed<Format::k{segment.format}, {program.geometry.hidden_size}>"
                return f"{kernel}(s, {segment.offset}, {n0}, {n1}, {r0}, {r1}, {out});"
            case Opcode.ATTENTION:
                queries, out = (
                    f"{self.buffer(program, index)}.row(s, 0), {program.buffers[index].columns}"
                    for index in (op.input, op.output)
                )
                parts = f"{instruction.part}, {instruction.num_parts}"
                return (
                    f"attention<Shape>(s, {op.layer}, {n0}, {n1}, {parts}, {r0}, {r1}, {queries}, {out}, "
                    f"w.scratch + kPreparedBytes, {then.place}, {min(then.num_lines, _ATTENDING_LINES)});"
                )
            case Opcode.REDUCE:
                summands = self.buffer(program, program.partial_buffers[op.index])
                columns = f"{_whole_groups(n0)}, {_whole_groups(n1)}"
                return (
                    f"reduce<{_rows_of(op)}>(s, {summands}, {instruction.num_parts}, {op.out_features}, "
                    f"{columns}, {r0}, {r1}, {self.sink(program, op, r0)});"
                )
            case _:
                return self.linear(program, op, instruction, then)

    def linear(self, program: Program, op: Op, instruction: Instruction, then: Ahead) -> str:
        k0, k1 = _k_range(op, instruction)
        if instruction.opcode is Opcode.LINEAR_PARTIAL:
            if op.out_features % GROUP:
                raise CodegenError(f"{op.name}: K can only be split where columns are a multiple of {GROUP}")
            parts = self.buffer(program, program.partial_buffers[op.index])
            sink = f"Store{{s, {parts}, {instruction.r0}, {instruction.part * op.out_features}}}"
        else:
            sink = self.sink(program, op, instruction.r0)
        offset = self.layout.at(*op.weights).offset
        return (
            f"linear<{self.format(op)}, {op.in_features}, {k0}, {k1}, {_rows_of(op)}>(s, {offset}, "
            f"{_whole_groups(instruction.n0)}, {_whole_groups(instruction.n1)}, {instruction.r0}, "
            f"{instruction.r1}, w.scratch, {then.place}, {sink});"
        )

    def sink(self, program: Program, op: Op, r0: int) -> str:
        match op.epilogue:
            case Epilogue.STORE:
                return f"Store{{s, {self.buffer(program, op.output)}, {r0}}}"
            case Epilogue.RESIDUAL:
                return f"AddToResidual{{s, {self.buffer(program, op.output)}, {r0}}}"
            case Epilogue.SWIGLU:
                return f"GateUp<{program.swiglu_group}>{{s, {self.buffer(program, op.output)}, {r0}}}"
            case Epilogue.LOGITS:
                return f"PutLogits<{program.geometry.vocab_size}, {program.stats_span}>{{s, {r0}}}"
            case Epilogue.ROPE_APPEND:
                return (
                    f"RotateAppend<Shape>{{s, {self.buffer(program, op.output)}, {op.layer}, "
                    f"{self.head_weights(op)}, {_f32(program.geometry.head_dim**-0.5)}, {r0}}}"
                )

    def head_weights(self, op: Op) -> str:
        bias = self.layout.at(*op.biases).offset if op.biases else -1
        norms = [self.layout.at(name).offset for name in op.head_norms] or [-1, -1]
        eps = _f32(self.first.geometry.rms_norm_eps)
        return f"HeadWeights{{{bias}, {norms[0]}, {norms[1]}, {eps}}}"

    def buffer(self, program: Program, index: int) -> str:
        buffer = program.buffers[index]
        return f"Floats2d{{{self.offsets[buffer.name]}, {buffer.columns}}}"

    def format(self, op: Op) -> str:
        return f"Format::k{self.layout.at(*matrix_names(op)).format}"


def _body_name(bucket: int, worker: int) -> str:
    return f"rows{bucket}_worker{worker}"


def _arrivals(program: Program) -> list[int]:
    """How many arrivals a step brings each counter."""
    arrivals = [0] * program.num_counters
    for instruction in _instructions(program):
        if instruction.signal >= 0:
            arrivals[instruction.signal] += 1
    return arrivals


def _instructions(program: Program) -> Iterable[Instruction]:
    return (instruction for worker in program.workers for instruction in worker)


def _input_of(op: Op, instruction: Instruction) -> tuple[int, ...]:
    """What tells two prepared inputs apart."""
    return (op.index, *_k_range(op, instruction), instruction.r0, instruction.r1)


def _k_range(op: Op, instruction: Instruction) -> tuple[int, int]:
    if instruction.opcode is Opcode.LINEAR_PARTIAL:
        return instruction.k0, instruction.k1
    return 0, op.in_features


def _rows_of(op: Op) -> str:
    return "Wanted" if op.epilogue is Epilogue.LOGITS else "Every"


def _whole_groups(columns: int) -> int:
    return -(-columns // GROUP) * GROUP
