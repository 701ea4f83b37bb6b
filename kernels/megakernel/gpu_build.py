"""A model compiled for a GPU, proved, from its weights: what decode workers open there."""

import msgspec

from megakernel.artifact import Progress, packed_formats
from megakernel.buckets import MAX_DECODE_ROWS
from megakernel.codegen_limits import CodegenError
from megakernel.cuda_compiled import CompiledCuda, compile_cuda
from megakernel.cuda_limits import check_cuda_programs
from megakernel.machine import Machine
from megakernel.manifest import UnsupportedModelError
from megakernel.model.load import OpenedModel
from megakernel.recipe import Recipe, compile_programs, prove, recipe_for


def gpu_recipe(opened: OpenedModel, machine: Machine) -> Recipe:
    weights = opened.weights
    recipe = recipe_for(opened, machine, machine.num_workers, "float16")
    return msgspec.structs.replace(
        recipe,
        formats=packed_formats(weights.shape, weights.formats, "cuda"),
        buckets=tuple(bucket for bucket in recipe.buckets if bucket <= MAX_DECODE_ROWS),
    )


def build_for_gpu(opened: OpenedModel, machine: Machine, progress: Progress | None = None) -> CompiledCuda:
    """Seconds where the user's cache has its cubin; else nvcc makes it, and what `progress` raises ends that.

    Raises BuildError, UnsupportedModelError, and ScheduleError for a program that cannot be proved.
    """
    recipe = gpu_recipe(opened, machine)
    programs = compile_programs(recipe, recipe.plan(), progress)
    prove(recipe, programs, progress)
    try:
        check_cuda_programs(programs, machine=machine)
        return compile_cuda(
            programs,
            opened.weights,
            machine.vector_units[0],
            formats=recipe.formats,
            progress=progress,
        )
    except CodegenError as error:
        raise UnsupportedModelError(f"{recipe.model}: {error}") from error
