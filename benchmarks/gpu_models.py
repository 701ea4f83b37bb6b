"""Models of real shapes with random weights, compiled for a GPU: nothing is downloaded, nothing is packed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from megakernel.artifact import packed_formats
from megakernel.codegen_cuda import generate_cuda
from megakernel.cuda_build import CudaBuild, CudaResourceError, build_cubin, check_resources
from megakernel.cuda_compiled import CompiledCuda, compiled_of
from megakernel.graph import uniform_formats
from megakernel.machine import Machine
from megakernel.model.shape import ModelShape
from megakernel.pipeline import compile_program
from megakernel.plan import Plan
from megakernel.program import Program
from megakernel.schedule import list_schedule
from megakernel.search import Budget, search
from megakernel.shapes import SHAPES

TOY = ModelShape(
    architecture="qwen3",
    num_layers=2,
    hidden_size=512,
    intermediate_size=1024,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=1024,
    max_context_tokens=4096,
    rope_theta=10_000.0,
    rope_scaling=None,
    rms_norm_eps=1e-6,
    has_qkv_bias=False,
    has_qk_norm=True,
    has_tied_head=True,
)
"""Of no real model: small enough for tools that slow kernels down a thousandfold."""
GPU_SHAPES = {**SHAPES, "toy": TOY}


class GpuModel(msgspec.Struct, frozen=True, kw_only=True):
    """What is compiled: one cubin with one bucket, so that many are compiled beside one another."""

    shape_name: str
    format: str
    """Of all matrices."""
    bucket: int
    num_layers: int = 0
    """0: all."""
    search_s: float = 0.0
    """Seconds of schedule search; 0: the list schedule."""

    @property
    def name(self) -> str:
        layers = f"_{self.num_layers}layers" if self.num_layers else ""
        searched = f"_searched{self.search_s:g}s" if self.search_s else ""
        return f"{self.shape_name}{layers}_{self.format}_rows{self.bucket}{searched}"

    @property
    def shape(self) -> ModelShape:
        shape = GPU_SHAPES[self.shape_name]
        return msgspec.structs.replace(shape, num_layers=self.num_layers) if self.num_layers else shape

    @property
    def formats(self) -> Mapping[str, str]:
        return packed_formats(self.shape, uniform_formats(self.shape, self.format), "cuda")


def program_of(model: GpuModel, machine: Machine) -> Program:
    """Raises what planning raises: ScratchError, PlanError."""
    shape, formats = model.shape, model.formats
    plan = _plan(model, shape, formats, machine)
    return compile_program(shape, model.name, machine, model.bucket, plan, formats=formats)


class BuiltModel(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    compiled: CompiledCuda
    """Without weights: whoever opens it fills them (`gpu_memory`)."""
    build: CudaBuild
    resource_problem: str | None
    """Spills, or more than an SM has; results of such kernels are right, where they run at all."""


def compile_model(
    model: GpuModel, machine: Machine, folder: Path | None = None, *, extra_flags: Sequence[str] = ()
) -> BuiltModel:
    """`folder`: of cubins; `extra_flags`: of nvcc. Raises BuildError, CodegenError, what planning raises."""
    program = program_of(model, machine)
    generated = generate_cuda([program], model.formats)
    cubin = build_cubin(generated.source, machine.vector_units[0], folder=folder, extra_flags=extra_flags)
    compiled = compiled_of([program], generated, model.shape, cubin.path, None)
    grid, problem = compiled.grid, None
    try:
        check_resources(cubin.build, threads=grid.num_threads, dynamic_shared_bytes=grid.shared_bytes)
    except CudaResourceError as error:
        problem = str(error)
    return BuiltModel(compiled=compiled, build=cubin.build, resource_problem=problem)


def _plan(model: GpuModel, shape: ModelShape, formats: Mapping[str, str], machine: Machine) -> Plan:
    if not model.search_s:
        return list_schedule(shape, machine, model.bucket, formats)
    budget = Budget(seconds=model.search_s)
    return search(
        shape, model.name, machine, model.bucket, compile_program, formats=formats, budget=budget
    ).plan
