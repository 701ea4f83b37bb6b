"""What ptxas and the disassembler say of kernels of real models: registers, shared memory, instructions."""

import pytest

from benchmarks.gpu_models import GpuModel, compile_model
from megakernel.cuda_build import most_registers
from megakernel.machine import load_machine
from megakernel.sass import ASYNC_COPY, INDIRECT_BRANCH, LOCAL_MEMORY, TENSOR_CORE, disassemble
from tests.megakernel.test_sass import needs_tools

SHAPES = ("qwen3-1.7b", "qwen2.5-1.5b", "llama-3.2-1b")
BLOCK_SHARED_BYTES = {"l20": 101_376, "h100": 232_448}
"""By machine: what a block may have, in all."""
MOST_CODE_BYTES = 512 * 1024


@pytest.mark.slow
@needs_tools
@pytest.mark.parametrize("bucket", [1, 4, 16])
@pytest.mark.parametrize("machine", BLOCK_SHARED_BYTES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_of_real_models_keep_to_their_means(shape, machine, bucket, tmp_path, record_figure):
    model = GpuModel(shape_name=shape, format="Q4_1", bucket=bucket)
    built = compile_model(model, load_machine(machine), tmp_path)
    assert built.build.spills == ()
    assert built.resource_problem is None
    grid = built.compiled.grid
    (kernel,) = built.build.kernels
    (code,) = disassemble(built.compiled.cubin)
    assert code.name == kernel.name == f"step_rows{bucket}"
    assert kernel.registers <= most_registers(grid.num_threads)
    assert kernel.static_shared_bytes + grid.shared_bytes <= BLOCK_SHARED_BYTES[machine]
    assert code.count(LOCAL_MEMORY) == 0
    assert code.count(INDIRECT_BRANCH) == 0
    assert code.count(TENSOR_CORE) > 0
    assert code.count(ASYNC_COPY) > 0
    assert code.num_bytes <= MOST_CODE_BYTES
    record_figure(
        f"{shape} {machine} rows {bucket:2}: {code.num_bytes / 1024:.0f} KiB of code, {kernel.registers} "
        f"registers, {grid.shared_bytes} B of shared memory, {code.count(TENSOR_CORE)} HMMA, "
        f"{code.count(ASYNC_COPY)} LDGSTS"
    )
