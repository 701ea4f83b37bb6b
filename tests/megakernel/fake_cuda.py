"""A device without one: its memory is arrays of the host, its kernels are a function of the test's."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megakernel.cuda_arguments import StepArguments
from megakernel.cuda_device import (
    Address,
    Array,
    CudaError,
    DeviceFacts,
    Event,
    Grid,
    HostMemory,
    Kernel,
    Stream,
)
from megakernel.emulation import Emulation, Region, device_array
from megakernel.emulation_errors import TrapError

KernelFunction = Callable[["FakeDriver", Kernel, StepArguments], None]


class FakeDriver:
    """`Driver` whose streams do nothing until they are synchronized, all of it in order then: who reads too
    early, or writes too early what a copy is to read, gets it wrong here each time."""

    def __init__(self, kernel: KernelFunction = lambda driver, kernel, arguments: None) -> None:
        self.kernel = kernel
        self.memory: dict[Address, Array] = {}
        self.host_memory: dict[Address, HostMemory] = {}
        self.calls: list[str] = []
        """Names of copies and launches as they were asked for."""
        self.launches: list[tuple[str, StepArguments]] = []
        self.pending: dict[int, list[Callable[[], None]]] = {}
        self.next_error: CudaError | None = None
        """What `synchronize` raises from then on."""
        self.is_closed = False
        self.clock_ms = 0.0

    @property
    def facts(self) -> DeviceFacts:
        return DeviceFacts(
            name="fake", architecture="sm_89", num_sms=4, shared_bytes=101_376, memory_bytes=1 << 30
        )

    def load(self, cubin: Path, names: Sequence[str], grid: Grid) -> Mapping[str, Kernel]:
        return {name: Kernel(name=name, grid=grid, handle=None) for name in names}

    def allocate(self, num_bytes: int) -> Address:
        array = device_array(num_bytes, np.uint8)
        self.memory[array.ctypes.data] = array
        return array.ctypes.data

    def free(self, address: Address) -> None:
        del self.memory[address]

    def allocate_host(self, num_bytes: int) -> HostMemory:
        array = device_array(num_bytes, np.uint8)
        memory = HostMemory(array=array, address=array.ctypes.data)
        self.host_memory[memory.address] = memory
        return memory

    def free_host(self, memory: HostMemory) -> None:
        del self.host_memory[memory.address]

    def address_of_host(self, start: Address) -> Address:
        return start

    def new_stream(self) -> Stream:
        self.pending[len(self.pending)] = []
        return Stream(len(self.pending) - 1)

    def copy_to_device(self, stream: Stream, to: Address, source: Array) -> None:
        self._later(stream, "to_device", lambda: self._write(to, source))

    def copy_to_host(self, stream: Stream, to: Array, source: Address) -> None:
        assert to.flags.c_contiguous

        def copy() -> None:
            to.reshape(-1).view(np.uint8)[...] = self.bytes_at(source, to.nbytes)

        self._later(stream, "to_host", copy)

    def copy_lines(
        self,
        stream: Stream,
        to: Address,
        to_pitch: int,
        source: Address,
        source_pitch: int,
        line_bytes: int,
        num_lines: int,
    ) -> None:
        def copy() -> None:
            for line in range(num_lines):
                held = self.bytes_at(source + line * source_pitch, line_bytes)
                self.bytes_at(to + line * to_pitch, line_bytes)[...] = held

        self._later(stream, "lines", copy)

    def launch(self, stream: Stream, kernel: Kernel, arguments: ctypes.Structure) -> None:
        own = type(arguments).from_buffer_copy(arguments)
        self.launches.append((kernel.name, own))
        self._later(stream, "launch", lambda: self.kernel(self, kernel, own))

    def new_event(self) -> Event:
        return Event([])

    def record(self, stream: Stream, event: Event) -> None:
        def note() -> None:
            self.clock_ms += 1.0
            event.handle[:] = [self.clock_ms]

        self._later(stream, "record", note)

    def elapsed_ms(self, start: Event, end: Event) -> float:
        return end.handle[0] - start.handle[0]

    def synchronize(self, stream: Stream) -> None:
        pending = self.pending[stream.handle]
        while pending:
            if self.next_error is not None:
                raise self.next_error
            pending.pop(0)()
        if self.next_error is not None:
            raise self.next_error

    def is_idle(self, stream: Stream) -> bool:
        """It is, from then on."""
        self.synchronize(stream)
        return True

    def close(self) -> None:
        self.is_closed = True
        self.memory.clear()
        self.host_memory.clear()

    def bytes_at(self, address: Address, num_bytes: int) -> Array:
        """Of one allocation. Raises AssertionError where it ends too early, or there is none."""
        for start, array in self.memory.items():
            offset = address - start
            if 0 <= offset < array.nbytes or (offset == array.nbytes and num_bytes == 0):
                assert offset + num_bytes <= array.nbytes, "past the end of an allocation"
                return array[offset : offset + num_bytes]
        raise AssertionError(f"no device memory at {address:#x}")

    def array_at(self, address: Address | None, count: int, dtype: Any = np.int32) -> Array:
        assert address is not None
        return self.bytes_at(address, count * np.dtype(dtype).itemsize).view(dtype)

    def _write(self, to: Address, source: Array) -> None:
        assert source.flags.c_contiguous
        data = source.reshape(-1).view(np.uint8)
        self.bytes_at(to, len(data))[...] = data

    def _later(self, stream: Stream, name: str, operation: Callable[[], None]) -> None:
        self.calls.append(name)
        self.pending[stream.handle].append(operation)


def emulated(emulation: Emulation, **options: Any) -> KernelFunction:
    """Kernels as the emulator runs them, over all of the device's memory."""

    def run(driver: FakeDriver, kernel: Kernel, arguments: StepArguments) -> None:
        regions = [
            Region(f"memory {number}", array, is_writable=True)
            for number, array in enumerate(driver.memory.values())
        ]
        regions += [
            Region(f"host memory {number}", memory.array, is_writable=True)
            for number, memory in enumerate(driver.host_memory.values())
        ]
        try:
            emulation.run(
                kernel.name,
                arguments,
                regions,
                num_blocks=kernel.grid.num_blocks,
                shared_bytes=kernel.grid.shared_bytes,
                threads_per_block=kernel.grid.num_threads,
                **options,
            )
        except TrapError as error:
            driver.next_error = CudaError("cuStreamSynchronize", "CUDA_ERROR_LAUNCH_FAILED")
            raise driver.next_error from error

    return run
