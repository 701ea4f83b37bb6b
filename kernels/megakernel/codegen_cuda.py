"""Frozen programs -> CUDA: one persistent kernel a row bucket, of straight-line calls.

All SMs run the same calls, with literals: trip counts, tiles, pages, counters, arrival counts. Where SMs
differ, literals are chosen by comparisons of the SM's number, or read from constant memory. Layers that
differ only in where their weights lie become a loop. Nothing is decoded or dispatched when it runs.
`cuda_calls.py` finds what is alike, `cuda_call_source.py` writes an op's calls, `cuda_literals.py` what
differs in them.
"""

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from megakernel.artifact import WeightLayout, lay_out_weights, matrix_names
from megakernel.buffer_layout import lay_out_buffers
from megakernel.codegen_limits import CodegenError
from megakernel.cuda_activations import (
    ATTENDED,
    SQUARES,
    WEIGHTED,
    StoredActivations,
    stored_activations,
)
from megakernel.cuda_call_source import HEAD_SUMS, CallContext, CallSource, shape_name
from megakernel.cuda_calls import Call, Loop, Operands, calls_of
from megakernel.cuda_constants import ASSERTION, RESERVED_BYTES, SQUARED_COLUMNS, THREADS_A_BLOCK
from megakernel.cuda_counters import counters_of
from megakernel.cuda_limits import check_cuda_programs
from megakernel.cuda_literals import Literals
from megakernel.footprint import stages_attention
from megakernel.program import (
    Geometry,
    Op,
    Program,
)

_LINE_BYTES = 256


class GeneratedCuda(msgspec.Struct, frozen=True, kw_only=True):
    source: str
    layout: WeightLayout
    buffer_offsets: Mapping[str, int]
    """Bytes from the start of the activations, by buffer name."""
    activation_bytes: int
    activations: tuple[StoredActivations, ...]
    """By program: which are not plain floats."""
    num_counters: int
    """Of all buckets: see counters_of."""
    shared_bytes: int
    """Dynamic, a block."""
    num_blocks: int

    @staticmethod
    def kernel_name(bucket: int) -> str:
        return f"step_rows{bucket}"


def generate_cuda(programs: Sequence[Program], formats: Mapping[str, str]) -> GeneratedCuda:
    """One source for all of an artifact's programs, ascending by bucket. Raises CodegenError."""
    check_cuda_programs(programs)
    layout = lay_out_weights(programs[0], formats, "cuda")
    offsets, end = lay_out_buffers(programs, _LINE_BYTES)
    # Attention's output of heads, merged: the instruction with a row's first split writes it, before it
    # signals; who may read the splits may read it.
    offsets[ATTENDED] = end
    most_rows, geometry = programs[-1].bucket, programs[0].geometry
    # Sums of heads that several QKV tiles make up: see PartOfHead of ops/epilogue.h.
    offsets[HEAD_SUMS] = _line_after(end + 2 * most_rows * q_columns(geometry))
    offsets[WEIGHTED] = _line_after(offsets[HEAD_SUMS] + 4 * most_rows * qkv_columns(geometry))
    offsets[SQUARES] = offsets[WEIGHTED] + 2 * most_rows * geometry.hidden_size
    activation_bytes = offsets[SQUARES] + 4 * most_rows * geometry.hidden_size // SQUARED_COLUMNS
    first_counters, num_counters = [], 0
    for program in programs:
        first_counters.append(num_counters)
        num_counters += counters_of(program)
    activations = [stored_activations(program, _formats(program, layout)) for program in programs]
    writer = _Source(programs, layout, offsets, first_counters, activations)
    source = "\n".join(writer.lines()) + "\n"
    first = programs[0]
    return GeneratedCuda(
        source=source,
        layout=layout,
        buffer_offsets=offsets,
        activation_bytes=activation_bytes,
        activations=tuple(activations),
        num_counters=num_counters,
        shared_bytes=RESERVED_BYTES + max(p.num_pages * p.page_bytes for p in programs),
        num_blocks=len(first.workers),
    )


def q_columns(geometry: Geometry) -> int:
    return geometry.num_heads * geometry.head_dim


def qkv_columns(geometry: Geometry) -> int:
    return q_columns(geometry) + 2 * geometry.num_kv_heads * geometry.head_dim


def _formats(program: Program, layout: WeightLayout) -> dict[int, str]:
    """By op, what its matrices are packed as."""
    return {op.index: layout.at(*names).format if (names := matrix_names(op)) else "" for op in program.ops}


def _line_after(end: int) -> int:
    return -(-end // _LINE_BYTES) * _LINE_BYTES


class _Source:
    def __init__(
        self,
        programs: Sequence[Program],
        layout: WeightLayout,
        offsets: Mapping[str, int],
        first_counters: Sequence[int],
        activations: Sequence[StoredActivations],
    ) -> None:
        self.programs = programs
        self.layout = layout
        self.offsets = offsets
        self.first_counters = first_counters
        self.activations = activations

    def lines(self) -> Iterator[str]:
        first = self.programs[0]
        geometry = first.geometry
        yield f"// {first.model_fingerprint} on {first.machine}. Generated; do not edit."
        yield '#include "cuda/engine.h"'
        yield ASSERTION
        yield "namespace {"
        yield "using namespace headrace;"
        of_model = f"{geometry.num_heads}, {geometry.num_kv_heads}, {geometry.head_dim}, {first.split_tokens}"
        for is_staged in sorted({stages_attention(program) for program in self.programs}):
            yield f"using {shape_name(is_staged)} = AttentionShape<{of_model}, {str(is_staged).lower()}>;"
        for bucket in zip(self.programs, self.first_counters, self.activations, strict=True):
            yield from _Bucket(self, *bucket).lines()
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
        yield "  trace_clocks(w, false);"
        yield "  if (w.is_loader()) {"
        yield "    uint32_t begun = 0;"
        yield "    do {"
        yield f"      load_rows{bucket}(w);"
        yield "    } while (wait_next_step(w, ++begun));"
        yield "  } else {"
        yield "    do {"
        yield f"      consume_rows{bucket}(w);"
        yield f"      hand_out_results<{geometry.vocab_size}, {program.stats_span}>(w, {finished});"
        yield "    } while (begin_next_step(w));"
        yield "  }"
        yield "  trace_clocks(w, true);"
        yield "}"


class _Bucket:
    """One bucket's two roles."""

    def __init__(
        self, source: _Source, program: Program, first_counter: int, activations: StoredActivations
    ) -> None:
        self.source = source
        self.program = program
        self.activations = activations
        self.bucket = program.bucket
        self.literals = Literals(f"kLiterals{program.bucket}_")
        self.context = CallContext(
            program=program,
            layout=source.layout,
            offsets=source.offsets,
            literals=self.literals,
            first_counter=first_counter,
            activations=activations,
        )

    def lines(self) -> Iterator[str]:
        parts = calls_of(self.program, self.describe)
        bodies: list[str] = []
        for role in ("consume", "load"):
            bodies.append(f"__device__ __forceinline__ void {role}_rows{self.bucket}(Worker& w) {{")
            for part in parts:
                bodies += self.part(part, role)
            bodies.append("}")
        if self.literals.is_too_large:
            raise CodegenError(f"bucket {self.bucket}: SMs differ in more than constant memory holds")
        yield from self.literals.constants
        yield from bodies

    def describe(self, op: Op) -> Operands:
        """Formats must be equal where layers share code; offsets may grow."""
        layout = self.source.layout
        numbers = {"layer": op.layer}
        formats: tuple[str, ...] = ()
        if names := matrix_names(op):
            numbers["weights"] = layout.at(*names).offset
            formats = (layout.at(*names).format,)
        if op.biases:
            numbers["bias"] = layout.at(*op.biases).offset
        for index, name in enumerate(op.head_norms):
            numbers[f"head_norm{index}"] = layout.at(name).offset
        if (reader := self.activations.normed_by.get(op.index)) is not None:
            numbers["next_norm"] = layout.at(self.program.ops[reader].norm).offset
        stored_as = self.activations.formats.get(op.index, "")
        sizes = op.in_features, op.out_features
        return Operands((formats, op.epilogue, op.prologue, *sizes, stored_as), numbers)

    def part(self, part: Call | Loop, role: str) -> Iterator[str]:
        if isinstance(part, Call):
            yield from self.call(part, role)
            return
        yield "#pragma unroll 1"
        yield f"for (uint32_t layer = 0; layer < {part.end - part.first}; layer++) {{"
        for call in part.calls:
            yield from self.call(call, role)
        yield "}"

    def call(self, call: Call, role: str) -> list[str]:
        source = CallSource(self.context, call)
        return source.consume() if role == "consume" else source.load()
