"""Host memory that the ranks of a TensorRT-LLM engine copy KV into, and that hand-offs are sent from.

One anonymous memory file (Linux memfd), mapped by the prefill worker and by every rank, so that a rank can
pin it for its GPU once. A hand-off has one region of it, as long as it lasts.
"""

import contextlib
import mmap
import os

import torch

from cluster.regions import Regions


class StagingFullError(Exception):
    """No region is free that is large enough: wait until a hand-off ends."""


class StagingArena:
    """The prefill worker's end: owns the memory, and deals out regions. For one thread."""

    def __init__(self, num_bytes: int) -> None:
        """Raises OSError where the kernel gives no such memory."""
        self._regions = Regions(num_bytes)
        self.num_bytes = self._regions.num_bytes
        self._fd = os.memfd_create("headrace-staging", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, self.num_bytes)
            self._map = mmap.mmap(self._fd, self.num_bytes)
        except BaseException:
            os.close(self._fd)
            raise
        self._view = memoryview(self._map)

    @property
    def path(self) -> str:
        """Where other processes of this user open it, as long as this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    @property
    def num_bytes_taken(self) -> int:
        return self._regions.num_bytes_taken

    def can_take(self, num_bytes: int) -> bool:
        return self._regions.find(num_bytes) is not None

    def take(self, num_bytes: int) -> int:
        """The offset of a region of so many bytes. Raises StagingFullError."""
        start = self._regions.take(num_bytes)
        if start is None:
            raise StagingFullError(f"no {num_bytes} bytes in a row are free of {self.num_bytes}")
        return start

    def give_back(self, start: int) -> None:
        self._regions.give_back(start)

    def view(self, start: int, num_bytes: int) -> memoryview:
        return self._view[start : start + num_bytes]

    def close(self) -> None:
        """The memory goes with its last mapping."""
        os.close(self._fd)
        # A view of a chunk may outlive us, in a traceback say; the mapping then goes with its last view.
        with contextlib.suppress(BufferError):
            self._view.release()
            self._map.close()


def open_staging(path: str) -> torch.Tensor:
    """`[bytes]` of an arena that another process owns, writable. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        mapping = mmap.mmap(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)
    return torch.frombuffer(mapping, dtype=torch.uint8)


def pin_staging(staging: torch.Tensor) -> None:
    """For copies from the GPU that the host does not wait for. Raises RuntimeError."""
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = cudart.cudaHostRegister(staging.data_ptr(), staging.numel(), 0)
    if int(code) != 0:
        raise RuntimeError(
            f"cudaHostRegister of {staging.numel()} bytes of staging memory failed with {int(code)}: raise "
            "`ulimit -l`, or lower prefill.staging_mb"
        )


def unpin_staging(staging: torch.Tensor) -> None:
    """Before the mapping goes: CUDA would take what is mapped there next for pinned."""
    torch.cuda.cudart().cudaHostUnregister(staging.data_ptr())  # type: ignore[no-untyped-call]
