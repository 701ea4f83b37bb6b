"""What the CUDA kernels take: row counts, sizes, scratch memory."""

from collections.abc import Sequence

from megakernel.cpu_limits import CodegenError, check_same_artifact
from megakernel.program import Program

MAX_ROWS = 64
MAX_GROUP = 16
"""Query heads of a KV head."""
STATS_SPAN = 32
"""A pair of column groups, which the head's epilogue has in hand at once."""
SPLIT_TOKENS = 128
_COLUMN_GROUP = 16
_HEAD_DIMS = (16, 32, 64, 128, 256)
MAX_LOADS_AHEAD = 7
"""One less than `kLoadsInFlight` of machine.h."""


def check_cuda_programs(programs: Sequence[Program]) -> None:
    """Of one artifact. Raises CodegenError."""
    check_same_artifact(programs)
    first, geometry = programs[0], programs[0].geometry
    if geometry.head_dim not in _HEAD_DIMS:
        known = ", ".join(map(str, _HEAD_DIMS))
        raise CodegenError(f"head_dim is {geometry.head_dim}; CUDA kernels take {known}")
    for name in ("hidden_size", "intermediate_size"):
        if (size := getattr(geometry, name)) % _COLUMN_GROUP:
            raise CodegenError(f"{name} is {size}; CUDA kernels take multiples of {_COLUMN_GROUP}")
    if (group := geometry.num_heads // geometry.num_kv_heads) > MAX_GROUP:
        raise CodegenError(f"{group} query heads share a KV head; CUDA kernels take up to {MAX_GROUP}")
    if first.split_tokens != SPLIT_TOKENS or first.stats_span != STATS_SPAN:
        raise CodegenError(
            f"splits of {first.split_tokens} tokens and statistics of {first.stats_span} columns; CUDA kernels "
            f"take {SPLIT_TOKENS} and {STATS_SPAN}"
        )
    if programs[-1].bucket > MAX_ROWS:
        raise CodegenError(f"bucket {programs[-1].bucket} has more than {MAX_ROWS} rows")
    for program in programs:
        for worker in program.workers:
            for index, instruction in enumerate(worker):
                if any(index - use.live_from > MAX_LOADS_AHEAD for use in instruction.pages):
                    raise CodegenError(f"weights are loaded more than {MAX_LOADS_AHEAD} instructions ahead")
