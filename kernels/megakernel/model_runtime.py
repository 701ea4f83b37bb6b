"""A compiled model that runs, on a CPU or a GPU: what executors and measurements ask of either."""

from typing import Protocol

from megakernel.codegen_limits import KvFormat
from megakernel.compiled import Compiled
from megakernel.cuda_compiled import CompiledCuda
from megakernel.cuda_runtime import CudaRuntime
from megakernel.model.shape import ModelShape
from megakernel.multi_step import MultiStep, StepRun
from megakernel.runtime import Runtime
from megakernel.step import IntArray, Rows, StepOutput


class ModelRuntime(Protocol):
    """`step`, `start` and `copy_slots` are for one thread; `write_kv` and `read_kv` may run beside them, for
    slots that they leave alone."""

    @property
    def shape(self) -> ModelShape: ...

    @property
    def kv_format(self) -> KvFormat: ...

    @property
    def max_rows(self) -> int: ...

    def step(self, rows: Rows) -> StepOutput:
        """Raises StepError."""
        ...

    def start(self, run: MultiStep) -> StepRun:
        """Raises StepError."""
        ...

    def copy_slots(self, source: IntArray, destination: IntArray) -> None: ...

    def write_kv(self, layer: int, slots: IntArray, data: memoryview | bytes) -> None: ...

    def read_kv(self, layer: int, slots: IntArray) -> memoryview: ...

    def close(self) -> None: ...


def open_runtime(compiled: Compiled | CompiledCuda, num_blocks: int, block_size_tokens: int) -> ModelRuntime:
    """Raises what opening a Runtime or a CudaRuntime raises."""
    if isinstance(compiled, CompiledCuda):
        return CudaRuntime(compiled, num_blocks, block_size_tokens)
    return Runtime(compiled, num_blocks, block_size_tokens)
