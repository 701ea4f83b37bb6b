"""What the CPU's kernels take: row counts, sizes, KV formats."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from megakernel.program import Program

KvFormat = Literal["float16", "float32"]
MAX_ROWS = 256
"""`kMaxRows` of step.h."""
_LANES = 16


class CodegenError(ValueError):
    """A program the CPU's kernels cannot run: names what is in the way."""


def check_programs(programs: Sequence[Program]) -> None:
    """Of one artifact. Raises CodegenError."""
    check_same_artifact(programs)
    first = programs[0]
    geometry = first.geometry
    for name in ("hidden_size", "head_dim", "intermediate_size"):
        if (size := getattr(geometry, name)) % _LANES:
            raise CodegenError(f"{name} is {size}; the CPU's kernels take multiples of {_LANES}")
    if first.split_tokens % _LANES or first.swiglu_group % _LANES or first.stats_span % _LANES:
        raise CodegenError(
            f"splits, SwiGLU groups and statistics spans are multiples of {_LANES} tokens or columns"
        )
    if programs[-1].bucket > MAX_ROWS:
        raise CodegenError(f"bucket {programs[-1].bucket} has more than {MAX_ROWS} rows")


def check_same_artifact(programs: Sequence[Program]) -> None:
    """That they differ in their bucket alone, on any backend. Raises CodegenError."""
    if not programs:
        raise CodegenError("an artifact has at least one program")
    first = programs[0]
    for before, program in pairwise(programs):
        if program.bucket <= before.bucket:
            raise CodegenError("programs come ascending by bucket, one each")
        same = ("model_fingerprint", "geometry", "split_tokens", "swiglu_group", "stats_span", "ops")
        if differing := [name for name in same if getattr(program, name) != getattr(first, name)]:
            raise CodegenError(
                f"buckets {before.bucket} and {program.bucket} differ in {', '.join(differing)}"
            )
        if len(program.workers) != len(first.workers):
            raise CodegenError("all buckets of an artifact have the same workers")
