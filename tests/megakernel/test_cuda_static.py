"""What ptxas and the disassembler say of kernels of real models: registers, shared memory, instructions."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from megakernel.artifact import packed_formats
from megakernel.codegen_cuda import generate_cuda
from megakernel.cuda_build import build_cubin, check_resources, most_registers
from megakernel.cuda_constants import THREADS_A_BLOCK
from megakernel.graph import uniform_formats, usual_formats
from megakernel.machine import load_machine
from megakernel.pipeline import compile_program
from megakernel.sass import ASYNC_COPY, INDIRECT_BRANCH, LOCAL_MEMORY, TENSOR_CORE, disassemble
from megakernel.schedule import list_schedule
from megakernel.shapes import SHAPES as MODEL_SHAPES
from tests.megakernel.test_sass import needs_tools

SHAPES = ("qwen3-1.7b", "qwen2.5-1.5b", "llama-3.2-1b")
BLOCK_SHARED_BYTES = {"l20": 101_376, "h100": 232_448}
"""By machine: what a block may have, in all."""
MOST_CODE_BYTES = 512 * 1024


BUCKETS = (1, 4, 16)


@pytest.mark.slow
@needs_tools
@pytest.mark.parametrize("machine", BLOCK_SHARED_BYTES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_usual", [True, False])
@pytest.mark.parametrize("bucket", BUCKETS)
def test_kernels_of_real_models_keep_to_their_means(
    shape, machine, is_usual, bucket, tmp_path, record_figure
):
    """Q4_1, and with it the embedding and head in Q8_0, which is usual."""
    model = MODEL_SHAPES[shape]
    formats = packed_formats(
        model, usual_formats(model) if is_usual else uniform_formats(model, "Q4_1"), "cuda"
    )
    figures = check_kernel(shape, machine, bucket, formats, tmp_path)
    record_figure(f"{shape} {machine} rows {bucket:2}{' usual' * is_usual}: {figures}")


def check_kernel(shape: str, machine: str, bucket: int, formats: Mapping[str, str], folder: Path) -> str:
    gpu, model = load_machine(machine), MODEL_SHAPES[shape]
    plan = list_schedule(model, gpu, bucket, formats)
    generated = generate_cuda([compile_program(model, shape, gpu, bucket, plan, formats=formats)], formats)
    cubin = build_cubin(generated.source, gpu.vector_units[0], folder=folder)
    check_resources(cubin.build, threads=THREADS_A_BLOCK, dynamic_shared_bytes=generated.shared_bytes)
    assert cubin.build.spills == ()
    (kernel,) = cubin.build.kernels
    (code,) = disassemble(cubin.path)
    assert code.name == kernel.name == f"step_rows{bucket}"
    assert kernel.registers <= most_registers(THREADS_A_BLOCK)
    assert kernel.static_shared_bytes + generated.shared_bytes <= BLOCK_SHARED_BYTES[machine]
    assert code.count(LOCAL_MEMORY) == 0
    assert code.count(INDIRECT_BRANCH) == 0
    assert code.count(TENSOR_CORE) > 0
    assert code.count(ASYNC_COPY) > 0
    assert code.num_bytes <= MOST_CODE_BYTES
    return (
        f"{code.num_bytes / 1024:.0f} KiB of code, {kernel.registers} registers, "
        f"{generated.shared_bytes} B of shared memory, {code.count(TENSOR_CORE)} HMMA, "
        f"{code.count(ASYNC_COPY)} LDGSTS"
    )
