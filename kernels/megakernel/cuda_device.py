"""What a runtime asks of a GPU: the seam between its logic and CUDA's driver."""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]
Address = int
"""Of device memory; allocations begin at multiples of 256."""


class CudaUnavailableError(RuntimeError):
    """No bindings, no driver or no such device; the message says which, and what helps."""


class CudaError(RuntimeError):
    """A call of the driver that failed. After most failures of a kernel every later call fails too."""

    def __init__(self, call: str, error: str, description: str = "") -> None:
        super().__init__(f"{call}: {error}" + (f", {description}" if description else ""))
        self.call = call
        self.error = error


class ResidencyError(RuntimeError):
    """A grid whose blocks do not all fit the device at once: they would wait for one another for ever."""


class DeviceFacts(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    architecture: str
    """As `sm_90`."""
    num_sms: int
    shared_bytes: int
    """That one block may have, when it asks."""
    memory_bytes: int


class Grid(msgspec.Struct, frozen=True, kw_only=True):
    """How kernels are launched: one block an SM, or more."""

    num_blocks: int
    num_threads: int
    """A block."""
    shared_bytes: int
    """Dynamic, a block."""
    is_cooperative: bool = True
    """All blocks at once: they may wait for one another."""


class Kernel(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    name: str
    grid: Grid
    handle: Any


class Stream(msgspec.Struct, frozen=True, eq=False):
    handle: Any


class Event(msgspec.Struct, frozen=True, eq=False):
    handle: Any


class HostMemory(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Pinned: copies from and to it do not hold up who asks for them."""

    array: Bytes
    address: Address
    """Where the device sees it."""


class Driver(Protocol):
    """One device. Copies and launches on a stream happen in order; `synchronize` waits for them, and raises
    what went wrong in any of them. Host arrays are contiguous, and must live and keep what they hold until
    then. Every method may raise CudaError. All but `close` may be called from several threads."""

    @property
    def facts(self) -> DeviceFacts: ...

    def load(self, cubin: Path, names: Sequence[str], grid: Grid) -> Mapping[str, Kernel]:
        """Raises ResidencyError."""
        ...

    def allocate(self, num_bytes: int) -> Address:
        """Zeros."""
        ...

    def free(self, address: Address) -> None: ...

    def allocate_host(self, num_bytes: int) -> HostMemory:
        """Zeros."""
        ...

    def free_host(self, memory: HostMemory) -> None: ...

    def address_of_host(self, start: Address) -> Address:
        """Where the device sees host memory that anyone has pinned."""
        ...

    def new_stream(self) -> Stream: ...

    def copy_to_device(self, stream: Stream, to: Address, source: Array) -> None: ...

    def copy_to_host(self, stream: Stream, to: Array, source: Address) -> None: ...

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
        """On the device: line i from `source + i * source_pitch` to `to + i * to_pitch`."""
        ...

    def launch(self, stream: Stream, kernel: Kernel, arguments: ctypes.Structure) -> None:
        """The kernel's one argument, by value: it may change as soon as this returns."""
        ...

    def new_event(self) -> Event: ...

    def record(self, stream: Stream, event: Event) -> None: ...

    def elapsed_ms(self, start: Event, end: Event) -> float:
        """Of recorded events, both past."""
        ...

    def synchronize(self, stream: Stream) -> None: ...

    def is_idle(self, stream: Stream) -> bool:
        """Whether all that was asked for has happened; raises what went wrong in any of it."""
        ...

    def close(self) -> None:
        """Gives back all that is left; may be called twice, also after an error."""
        ...
