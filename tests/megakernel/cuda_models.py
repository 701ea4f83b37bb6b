"""Tiny models compiled for CUDA: what a runtime is opened from, with or without a compiler of kernels."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec

from megakernel.artifact import pack_weights, packed_formats
from megakernel.codegen_cuda import GeneratedCuda, generate_cuda
from megakernel.cuda_compiled import CompiledCuda, compiled_of
from megakernel.machine import Machine, load_machine
from megakernel.model.weights import Weights
from megakernel.pipeline import compile_program
from megakernel.program import Program

NUM_SMS = 3


def small_gpu(num_sms: int = NUM_SMS) -> Machine:
    machine = load_machine("l4")
    return msgspec.structs.replace(machine, num_workers=num_sms, name="small")


def formats_of(weights: Weights) -> Mapping[str, str]:
    return packed_formats(weights.shape, weights.formats, "cuda")


def programs_of(weights: Weights, buckets: Sequence[int], num_sms: int = NUM_SMS) -> tuple[Program, ...]:
    formats = formats_of(weights)
    return tuple(
        compile_program(weights.shape, "tiny", small_gpu(num_sms), bucket, formats=formats)
        for bucket in buckets
    )


def generated_of(weights: Weights, programs: Sequence[Program]) -> GeneratedCuda:
    return generate_cuda(programs, formats_of(weights))


def compiled_model(
    weights: Weights, programs: Sequence[Program], generated: GeneratedCuda | None = None
) -> CompiledCuda:
    """Without a cubin."""
    generated = generated or generated_of(weights, programs)
    fill = partial(pack_weights, generated.layout, weights)
    return compiled_of(programs, generated, weights.shape, Path("no cubin"), fill)


def without_signal(program: Program, worker: int = 0) -> Program:
    """One counter that somebody waits for never gets the last of its arrivals, which a worker forgets."""
    awaited = {wait.counter for path in program.workers for one in path for wait in one.waits}
    path = list(program.workers[worker])
    at = next(index for index, one in enumerate(path) if one.signal in awaited)
    path[at] = msgspec.structs.replace(path[at], signal=-1)
    workers = [*program.workers]
    workers[worker] = tuple(path)
    return msgspec.structs.replace(program, workers=tuple(workers))
