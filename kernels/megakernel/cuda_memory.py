"""Memory that grows as steps ask for more, and runs of lines that are copied at once."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from megakernel.cuda_device import Address, Driver, HostMemory
from megakernel.step import IntArray

_FIRST_BYTES = 1 << 16
_ALIGNMENT_BYTES = 16


class DeviceMemory:
    """Device memory that grows as it is needed, and keeps nothing when it does."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._num_bytes = 0
        self.device: Address = 0

    def grown_to(self, num_bytes: int) -> "DeviceMemory":
        if num_bytes > self._num_bytes:
            if self._num_bytes:
                self._driver.free(self.device)
            self._num_bytes = _grown(num_bytes)
            self.device = self._driver.allocate(self._num_bytes)
        return self


class HostStaging:
    """Pinned memory, likewise."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.host: HostMemory = driver.allocate_host(_FIRST_BYTES)

    def grown_to(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        if num_bytes > len(self.host.array):
            self._driver.free_host(self.host)
            self.host = self._driver.allocate_host(_grown(num_bytes))
        return self.host.array


class Staging:
    """Memory of the device, and as much pinned memory that is copied to it or from it."""

    def __init__(self, driver: Driver) -> None:
        self._host, self._device = HostStaging(driver), DeviceMemory(driver)
        self.grown_to(_FIRST_BYTES)

    def grown_to(self, num_bytes: int) -> "Staging":
        self._host.grown_to(num_bytes)
        self._device.grown_to(num_bytes)
        return self

    @property
    def host(self) -> HostMemory:
        return self._host.host

    @property
    def device(self) -> Address:
        return self._device.device


def place_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[dict[str, int], int]:
    """Offset of each array in a buffer that holds all, and the end."""
    offsets, end = {}, 0
    for name, array in arrays.items():
        offsets[name] = end
        end += -(-array.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return offsets, end


def runs_of(numbers: IntArray) -> Iterator[tuple[int, int, int]]:
    """Of numbers that follow one another: where in the array, the first of them, how many."""
    if not len(numbers):
        return
    starts = np.concatenate([[0], np.flatnonzero(np.diff(numbers) != 1) + 1, [len(numbers)]]).tolist()
    for start, end in pairwise(starts):
        yield start, int(numbers[start]), end - start


def _grown(num_bytes: int) -> int:
    return int(max(_FIRST_BYTES, 1 << (num_bytes - 1).bit_length()))
