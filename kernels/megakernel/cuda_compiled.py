"""A model compiled for CUDA: all that a CudaRuntime is opened from."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec

from megakernel.artifact import Progress, WeightLayout, pack_weights
from megakernel.build import Compiler
from megakernel.codegen_cuda import GeneratedCuda, generate_cuda
from megakernel.codegen_limits import KvFormat
from megakernel.cuda_activations import StoredActivations
from megakernel.cuda_build import build_cubin, check_resources
from megakernel.cuda_constants import THREADS_A_BLOCK
from megakernel.cuda_counters import counters_of
from megakernel.cuda_device import Grid
from megakernel.model.shape import ModelShape
from megakernel.model.weights import Weights
from megakernel.packing import Bytes
from megakernel.program import Program

FillWeights = Callable[[Bytes], None]


class CompiledCuda(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Programs ascend by bucket, and all have as many workers. Nothing here proves them."""

    programs: tuple[Program, ...]
    shape: ModelShape
    layout: WeightLayout
    buffer_offsets: Mapping[str, int]
    """Bytes from the start of the activations, by buffer name."""
    activation_bytes: int
    activations: tuple[StoredActivations, ...]
    """By program: which are not plain floats."""
    num_counters: int
    """Of all buckets: see counters_of."""
    grid: Grid
    cubin: Path
    fill_weights: FillWeights | None
    """Writes the packed weights into `[layout.num_bytes]`; may raise what reading them raises. None: whoever
    opens a runtime fills the device's own memory (`CudaRuntime.weights_address`)."""

    @property
    def buckets(self) -> tuple[int, ...]:
        return tuple(program.bucket for program in self.programs)

    @property
    def kv_format(self) -> KvFormat:
        return "float16"

    @property
    def kernel_names(self) -> tuple[str, ...]:
        return tuple(GeneratedCuda.kernel_name(bucket) for bucket in self.buckets)

    @property
    def first_counters(self) -> tuple[int, ...]:
        """By bucket: of the counters of all."""
        counts = [counters_of(program) for program in self.programs]
        return tuple(sum(counts[:index]) for index in range(len(counts)))


def compile_cuda(
    programs: Sequence[Program],
    weights: Weights,
    architecture: str,
    *,
    formats: Mapping[str, str] | None = None,
    folder: Path | None = None,
    extra_flags: Sequence[str] = (),
    nvcc: Compiler | None = None,
    progress: Progress | None = None,
) -> CompiledCuda:
    """`formats` None: as they are stored; `folder`: of cubins. Raises BuildError (CudaResourceError for
    kernels that do not fit an SM), CodegenError."""
    generated = generate_cuda(programs, weights.formats if formats is None else formats)
    cubin = build_cubin(
        generated.source,
        architecture,
        folder=folder,
        extra_flags=extra_flags,
        nvcc=nvcc,
        progress=progress,
    )
    compiled = compiled_of(
        programs, generated, weights.shape, cubin.path, partial(_pack, generated.layout, weights, progress)
    )
    check_resources(
        cubin.build, threads=compiled.grid.num_threads, dynamic_shared_bytes=compiled.grid.shared_bytes
    )
    return compiled


def compiled_of(
    programs: Sequence[Program],
    generated: GeneratedCuda,
    shape: ModelShape,
    cubin: Path,
    fill_weights: FillWeights | None,
) -> CompiledCuda:
    """Of parts that were made apart."""
    return CompiledCuda(
        programs=tuple(programs),
        shape=shape,
        layout=generated.layout,
        buffer_offsets=generated.buffer_offsets,
        activation_bytes=generated.activation_bytes,
        activations=generated.activations,
        num_counters=generated.num_counters,
        grid=Grid(
            num_blocks=generated.num_blocks,
            num_threads=THREADS_A_BLOCK,
            shared_bytes=generated.shared_bytes,
        ),
        cubin=cubin,
        fill_weights=fill_weights,
    )


def _pack(layout: WeightLayout, weights: Weights, progress: Progress | None, out: Bytes) -> None:
    pack_weights(layout, weights, out, progress)
