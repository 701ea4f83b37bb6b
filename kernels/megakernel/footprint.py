"""What a tile needs of scratch memory: its weight tile, its input and its output.

The constraint has three dimensions, as in the Ada-MK paper (arXiv 2605.11581): the hardware's capacity, the
model's shapes, and the row bucket. K-splitting halves a weight tile, and so doubles the tiles in flight.
"""

from collections.abc import Mapping

import msgspec

from megakernel.footprint_cuda import (
    attention_bytes,
    input_tile_bytes,
    output_tile_bytes,
    staged_tokens_bytes,
    stages_tokens,
    weight_tile_bytes,
)
from megakernel.machine import Machine
from megakernel.program import Geometry, Instruction, Op, Opcode, Program
from megakernel.weight_formats import activation_bits, column_bits, op_formats

ROW_CHUNK = 16
"""Rows whose input and output are in scratch memory at once; larger buckets take a tile chunk by chunk."""
KV_CHUNK_TOKENS = 32
"""Tokens of K and V that attention has in scratch memory at once, while as many again are loaded."""
_FLOAT_BYTES = 4
_KV_ELEMENT_BYTES = 2


class Footprint(msgspec.Struct, frozen=True, kw_only=True):
    """Scratch bytes of one instruction."""

    weight_stage_bytes: int
    input_bytes: int
    output_bytes: int

    def total_bytes(self, stages: int) -> int:
        return stages * self.weight_stage_bytes + self.input_bytes + self.output_bytes


class PageNeeds(msgspec.Struct, frozen=True):
    weights: int
    input: int
    output: int

    @property
    def total(self) -> int:
        return self.weights + self.input + self.output


def linear_footprint(*, columns: int, k: int, rows: int, weight_bits: float, input_bits: float) -> Footprint:
    """Of a linear tile: `weight_bits` and `input_bits` are an element's, `rows` the bucket's."""
    chunk = min(rows, ROW_CHUNK)
    return Footprint(
        weight_stage_bytes=_bytes(columns * k * weight_bits),
        input_bytes=_bytes(chunk * k * input_bits),
        output_bytes=chunk * columns * _FLOAT_BYTES,
    )


def attention_footprint(
    *, kv_heads: int, geometry: Geometry, rows: int, num_pages: int, page_bytes: int
) -> Footprint:
    """Of one attention instruction: queries and two chunks of K and V in, its heads' partial results out.

    Rows are taken `attention_row_chunk` at a time.
    """
    chunk = attention_row_chunk(
        kv_heads=kv_heads, geometry=geometry, rows=rows, num_pages=num_pages, page_bytes=page_bytes
    )
    return _attention_chunk(kv_heads, geometry, chunk)


def attention_row_chunk(
    *, kv_heads: int, geometry: Geometry, rows: int, num_pages: int, page_bytes: int
) -> int:
    """Rows whose queries and results attention has in scratch memory at once; 1 where even that is too much.

    All heads that share a KV head are in one tile, so many heads leave room for few rows: of Qwen2.5-1.5B's
    six heads of 128 there, eight rows fit 99 KB. What a chunk attends to is read again for the next chunk.
    Rows do not mix in attention: no bit depends on the chunk.
    """
    chunk = min(rows, ROW_CHUNK)
    while chunk > 1 and page_needs(_attention_chunk(kv_heads, geometry, chunk), page_bytes).total > num_pages:
        chunk = 1 << ((chunk - 1).bit_length() - 1)  # the next lower power of two
    return chunk


def _attention_chunk(kv_heads: int, geometry: Geometry, chunk: int) -> Footprint:
    heads = kv_heads * (geometry.num_heads // geometry.num_kv_heads)
    keys_and_values = 2 * kv_heads * geometry.head_dim * KV_CHUNK_TOKENS * _KV_ELEMENT_BYTES
    return Footprint(
        weight_stage_bytes=0,
        input_bytes=chunk * heads * geometry.head_dim * _FLOAT_BYTES + 2 * keys_and_values,
        output_bytes=chunk * heads * (geometry.head_dim + 2) * _FLOAT_BYTES,
    )


def cuda_linear_footprint(
    *, columns: int, k: int, input_k: int, in_features: int, rows: int, stored: tuple[str, ...]
) -> Footprint:
    """Of a load of `k` elements of a tile on an SM, beside `input_k` of its input, of an op whose matrices
    are stored in these formats. Where that is not all of the input, another block is on its way."""
    input_bytes = input_tile_bytes(input_k, rows)
    return Footprint(
        weight_stage_bytes=weight_tile_bytes(stored, columns, k),
        input_bytes=input_bytes * (1 if input_k == in_features else 2),
        output_bytes=output_tile_bytes(columns, rows),
    )


def cuda_attention_footprint(geometry: Geometry, split_tokens: int, usable_bytes: int) -> Footprint:
    """Of one KV head, on SMs with so much memory for pages."""
    needed = attention_bytes(geometry.num_heads // geometry.num_kv_heads, geometry.head_dim)
    staged = needed + staged_tokens_bytes(split_tokens, geometry.head_dim)
    if stages_tokens(usable_bytes, staged):
        needed = staged
    return Footprint(weight_stage_bytes=0, input_bytes=needed, output_bytes=0)


def stages_attention(program: Program) -> bool:
    """Whether a GPU's program has keys and values in pages."""
    group = program.geometry.num_heads // program.geometry.num_kv_heads
    return _of_attention(program).input_bytes > attention_bytes(group, program.geometry.head_dim)


def _of_attention(program: Program) -> Footprint:
    usable_bytes = program.num_pages * program.page_bytes
    return cuda_attention_footprint(program.geometry, program.split_tokens, usable_bytes)


def _cuda_footprint(
    program: Program, instruction: Instruction, formats: Mapping[str, str] | None
) -> Footprint:
    op, rows = program.ops[instruction.op], instruction.r1 - instruction.r0
    columns = instruction.n1 - instruction.n0
    match instruction.opcode:
        case Opcode.ATTENTION:
            return _of_attention(program)
        case Opcode.EMBED:
            return Footprint(weight_stage_bytes=0, input_bytes=0, output_bytes=0)
        case _:
            return cuda_linear_footprint(
                columns=columns,
                k=num_k(op, instruction),
                input_k=instruction.x1 - instruction.x0 or op.in_features,
                in_features=op.in_features,
                rows=rows,
                stored=op_formats(op, formats),
            )


def footprint(
    program: Program, instruction: Instruction, formats: Mapping[str, str] | None = None
) -> Footprint:
    """Of an instruction of a program on workers with its scratch pages; `formats` by weight name, usual ones
    where it does not say."""
    if program.kind == "cuda":
        return _cuda_footprint(program, instruction, formats)
    op = program.ops[instruction.op]
    rows = instruction.r1 - instruction.r0
    columns = instruction.n1 - instruction.n0
    match instruction.opcode:
        case Opcode.ATTENTION:
            return attention_footprint(
                kv_heads=columns,
                geometry=program.geometry,
                rows=rows,
                num_pages=program.num_pages,
                page_bytes=program.page_bytes,
            )
        case Opcode.EMBED:  # row by row: a token's weights in, its activations out
            bits = column_bits(op, program.geometry, op_formats(op, formats), 0, columns)
            return Footprint(
                weight_stage_bytes=0, input_bytes=_bytes(bits), output_bytes=columns * _FLOAT_BYTES
            )
        case Opcode.REDUCE:  # part by part, on top of the sum
            sums = min(rows, ROW_CHUNK) * columns * _FLOAT_BYTES
            return Footprint(weight_stage_bytes=0, input_bytes=sums, output_bytes=sums)
        case _:
            stored = op_formats(op, formats)
            bits = column_bits(op, program.geometry, stored, instruction.n0, instruction.n1)
            return linear_footprint(
                columns=columns,
                k=num_k(op, instruction),
                rows=rows,
                weight_bits=bits / columns,
                input_bits=activation_bits(stored),
            )


def num_k(op: Op, instruction: Instruction) -> int:
    """Elements of K that a linear instruction multiplies."""
    return (instruction.k1 or op.in_features) - instruction.k0


def page_needs(needed: Footprint, page_bytes: int) -> PageNeeds:
    return PageNeeds(
        -(-needed.weight_stage_bytes // page_bytes),
        -(-needed.input_bytes // page_bytes),
        -(-needed.output_bytes // page_bytes),
    )


def max_stages(needed: Footprint, machine: Machine) -> int:
    """Weight tiles that fit beside input and output; 0 where not even one does.

    A tile without weights counts as one stage if it fits.
    """
    needs = page_needs(needed, machine.page_bytes)
    left = machine.num_pages - needs.input - needs.output
    if left < 0:
        return 0
    return left // needs.weights if needs.weights else 1


def _bytes(bits: float) -> int:
    return -int(-bits // 8)
