"""The packed weights of a CUDA artifact: as a CPU's, with matrices in the tensor cores' order.

Tensor cores multiply no float32 matrix: one that is stored as F32, or an op whose matrices differ in format, is
packed as BF16, rounded to nearest even.
"""

from collections.abc import Mapping

from megakernel.artifact import Packing, WeightLayout, lay_out_weights
from megakernel.pack_cuda import group_bytes, is_packable, pack_linear
from megakernel.program import Program


def _common_format(formats: list[str], in_features: int) -> str:
    first = formats[0]
    return first if set(formats) == {first} and is_packable(first, in_features) else "BF16"


CUDA_PACKING = Packing(common_format=_common_format, group_bytes=group_bytes, pack_linear=pack_linear)


def lay_out_cuda_weights(program: Program, formats: Mapping[str, str]) -> WeightLayout:
    """Where each weight of a program lies; the same for every bucket of an artifact."""
    return lay_out_weights(program, formats, CUDA_PACKING)
