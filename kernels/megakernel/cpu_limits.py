"""What the CPU's kernels take: row counts and sizes."""

from collections.abc import Sequence

from megakernel.codegen_limits import CodegenError, check_same_artifact
from megakernel.program import Program

MAX_ROWS = 256
"""`kMaxRows` of step.h."""
_LANES = 16


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
