"""What every backend asks of an artifact's programs."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from megakernel.program import Program

KvFormat = Literal["float16", "float32"]


class CodegenError(ValueError):
    """Programs that a backend's kernels cannot run: names what is in the way."""


def check_same_artifact(programs: Sequence[Program]) -> None:
    """That they ascend by bucket and are of one model and one number of workers. Raises CodegenError."""
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
