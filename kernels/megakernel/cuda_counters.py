"""Which counters a CUDA program has in global memory, in order: its own, then those that kernels add.

Kernels add one that ends a step, and counts of arrivals at what several instructions make up; those are set
back by whoever brings the last.
"""

from megakernel.cuda_constants import ROW_CHUNK
from megakernel.program import Program


def split_arrivals_at(program: Program) -> int:
    """Of attention's splits, one a KV head and row."""
    return program.num_counters + 1


def head_arrivals_at(program: Program) -> int:
    """Of columns of QKV's heads, one a head and chunk of rows."""
    return split_arrivals_at(program) + program.geometry.num_kv_heads * program.bucket


def row_chunks(program: Program) -> int:
    return -(-program.bucket // ROW_CHUNK)


def counters_of(program: Program) -> int:
    geometry = program.geometry
    num_heads = geometry.num_heads + 2 * geometry.num_kv_heads
    return head_arrivals_at(program) + num_heads * row_chunks(program)
