"""`Driver` over CUDA's own: the only file that imports `cuda.bindings`, and only once it is asked to."""

import ctypes
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from megakernel.cuda_device import (
    Address,
    Array,
    CudaError,
    CudaUnavailableError,
    DeviceFacts,
    Event,
    Grid,
    HostMemory,
    Kernel,
    ResidencyError,
    Stream,
)


def open_driver(device: int = 0) -> "CudaDriver":
    """Raises CudaUnavailableError."""
    try:
        bindings = import_module("cuda.bindings.driver")
    except ImportError as error:
        raise CudaUnavailableError(
            f"{error}: cuda-bindings are not installed; pip install 'headrace[cuda]'"
        ) from None
    return CudaDriver(bindings, device)


class CudaDriver:
    """`Driver` over `cuda.bindings.driver`, in the device's primary context, which PyTorch has too."""

    def __init__(self, bindings: Any, device: int = 0) -> None:
        self._cuda = bindings
        self._current = threading.local()
        self._memory: set[Address] = set()
        self._host_memory: dict[Address, HostMemory] = {}
        self._modules: list[Any] = []
        self._streams: list[Any] = []
        self._events: list[Any] = []
        try:
            self._call("cuInit", 0)
            self._device = self._call("cuDeviceGet", device)
        except (CudaError, RuntimeError) as error:  # bindings raise RuntimeError where they find no library
            raise CudaUnavailableError(f"no CUDA device {device}: {error}") from error
        self._context: Any = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._facts = self._read_facts()

    @property
    def facts(self) -> DeviceFacts:
        return self._facts

    def load(self, cubin: Path, names: Sequence[str], grid: Grid) -> Mapping[str, Kernel]:
        module = self._call_here("cuModuleLoadData", cubin.read_bytes())
        self._modules.append(module)
        return {name: self._kernel(module, name, grid) for name in names}

    def allocate(self, num_bytes: int) -> Address:
        address = int(self._call_here("cuMemAlloc", max(num_bytes, 1)))
        self._memory.add(address)
        self._call("cuMemsetD8", address, 0, max(num_bytes, 1))
        # A memset on the null stream is not waited for, and streams that do not wait for it may come first.
        self._call("cuCtxSynchronize")
        return address

    def free(self, address: Address) -> None:
        self._memory.discard(address)
        self._call_here("cuMemFree", address)

    def allocate_host(self, num_bytes: int) -> HostMemory:
        flags = self._cuda.CU_MEMHOSTALLOC_PORTABLE | self._cuda.CU_MEMHOSTALLOC_DEVICEMAP
        start = int(self._call_here("cuMemHostAlloc", max(num_bytes, 1), flags))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(start))
        array[:] = 0
        memory = HostMemory(array=array, address=self.address_of_host(start))
        self._host_memory[start] = memory
        return memory

    def free_host(self, memory: HostMemory) -> None:
        start = memory.array.ctypes.data
        self._host_memory.pop(start, None)
        self._call_here("cuMemFreeHost", start)

    def address_of_host(self, start: Address) -> Address:
        return int(self._call_here("cuMemHostGetDevicePointer", start, 0))

    def new_stream(self) -> Stream:
        flags = int(self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self._streams.append(self._call_here("cuStreamCreate", flags))
        return Stream(self._streams[-1])

    def copy_to_device(self, stream: Stream, to: Address, source: Array) -> None:
        if source.nbytes:
            self._call_here("cuMemcpyHtoDAsync", to, source.ctypes.data, source.nbytes, stream.handle)

    def copy_to_host(self, stream: Stream, to: Array, source: Address) -> None:
        if to.nbytes:
            self._call_here("cuMemcpyDtoHAsync", to.ctypes.data, source, to.nbytes, stream.handle)

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
        if max(to_pitch, source_pitch) > self._max_pitch:
            for line in range(num_lines):
                at, start = to + line * to_pitch, source + line * source_pitch
                self._call_here("cuMemcpyDtoDAsync", at, start, line_bytes, stream.handle)
            return
        copy = self._cuda.CUDA_MEMCPY2D()
        copy.srcMemoryType = copy.dstMemoryType = self._cuda.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcDevice, copy.srcPitch = source, source_pitch
        copy.dstDevice, copy.dstPitch = to, to_pitch
        copy.WidthInBytes, copy.Height = line_bytes, num_lines
        self._call_here("cuMemcpy2DAsync", copy, stream.handle)

    def launch(self, stream: Stream, kernel: Kernel, arguments: ctypes.Structure) -> None:
        grid = kernel.grid
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        launched = (
            kernel.handle,
            *(grid.num_blocks, 1, 1),
            *(grid.num_threads, 1, 1),
            grid.shared_bytes,
            stream.handle,
            ctypes.addressof(parameters),
        )
        if grid.is_cooperative:
            self._call_here("cuLaunchCooperativeKernel", *launched)
        else:
            self._call_here("cuLaunchKernel", *launched, 0)

    def new_event(self) -> Event:
        flags = int(self._cuda.CUevent_flags.CU_EVENT_DEFAULT)
        self._events.append(self._call_here("cuEventCreate", flags))
        return Event(self._events[-1])

    def record(self, stream: Stream, event: Event) -> None:
        self._call_here("cuEventRecord", event.handle, stream.handle)

    def elapsed_ms(self, start: Event, end: Event) -> float:
        return float(self._call_here("cuEventElapsedTime", start.handle, end.handle))

    def synchronize(self, stream: Stream) -> None:
        self._call_here("cuStreamSynchronize", stream.handle)

    def is_idle(self, stream: Stream) -> bool:
        self._make_current()
        (code,) = self._cuda.cuStreamQuery(stream.handle)
        if code == self._cuda.CUresult.CUDA_ERROR_NOT_READY:
            return False
        if int(code) != 0:
            raise self._error("cuStreamQuery", code)
        return True

    def close(self) -> None:
        if self._context is None:
            return
        self._try("cuCtxSetCurrent", self._context)
        for call, handles in (
            ("cuEventDestroy", self._events),
            ("cuStreamDestroy", self._streams),
            ("cuModuleUnload", self._modules),
            ("cuMemFree", self._memory),
            ("cuMemFreeHost", self._host_memory),
        ):
            for handle in tuple(handles):
                self._try(call, handle)
        self._try("cuDevicePrimaryCtxRelease", self._device)
        self._context = None

    def _kernel(self, module: Any, name: str, grid: Grid) -> Kernel:
        attributes = self._cuda.CUfunction_attribute
        handle = self._call("cuModuleGetFunction", module, name.encode())
        dynamic = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._call("cuFuncSetAttribute", handle, dynamic, grid.shared_bytes)
        blocks_an_sm = self._call(
            "cuOccupancyMaxActiveBlocksPerMultiprocessor", handle, grid.num_threads, grid.shared_bytes
        )
        facts = self._facts
        if blocks_an_sm * facts.num_sms < grid.num_blocks:
            raise ResidencyError(
                f"{name}: {grid.num_blocks} blocks of {grid.num_threads} threads and {grid.shared_bytes} "
                f"bytes of shared memory are wanted at once. {facts.name} holds {blocks_an_sm} on each of "
                f"{facts.num_sms} SMs: compile the model for this machine"
            )
        return Kernel(name=name, grid=grid, handle=handle)

    def _read_facts(self) -> DeviceFacts:
        def attribute(name: str) -> int:
            wanted = getattr(self._cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
            return int(self._call("cuDeviceGetAttribute", wanted, self._device))

        if not attribute("COOPERATIVE_LAUNCH"):
            raise CudaUnavailableError("this device cannot launch all blocks of a kernel at once")
        self._max_pitch = attribute("MAX_PITCH")
        name = self._call("cuDeviceGetName", 256, self._device)
        major, minor = attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")
        return DeviceFacts(
            name=name.split(b"\0")[0].decode(),
            architecture=f"sm_{major}{minor}",
            num_sms=attribute("MULTIPROCESSOR_COUNT"),
            shared_bytes=attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
            memory_bytes=int(self._call("cuDeviceTotalMem", self._device)),
        )

    def _call_here(self, name: str, *arguments: Any) -> Any:
        """With the context current in this thread."""
        self._make_current()
        return self._call(name, *arguments)

    def _make_current(self) -> None:
        if not getattr(self._current, "is_set", False):
            self._call("cuCtxSetCurrent", self._context)
            self._current.is_set = True

    def _call(self, name: str, *arguments: Any) -> Any:
        """What the call gives beside its result code: nothing, or one thing."""
        code, *found = getattr(self._cuda, name)(*arguments)
        if int(code) != 0:
            raise self._error(name, code)
        return found[0] if found else None

    def _try(self, name: str, *arguments: Any) -> None:
        """Of no interest whether it works: after a kernel failed nothing does."""
        getattr(self._cuda, name)(*arguments)

    def _error(self, call: str, code: Any) -> CudaError:
        found, name = self._cuda.cuGetErrorName(code)
        described, text = self._cuda.cuGetErrorString(code)
        return CudaError(
            call,
            name.decode() if int(found) == 0 else f"error {int(code)}",
            text.decode() if int(described) == 0 else "",
        )
