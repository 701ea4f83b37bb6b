"""A KV pool in GPU memory: float16 `[layers][slots][2 * kv_heads * head_dim]`, K heads, then V heads."""

import threading

import numpy as np
import numpy.typing as npt

from megakernel.cuda_device import Address, CudaError, Driver, Stream
from megakernel.cuda_memory import DeviceMemory, HostStaging, runs_of
from megakernel.model.shape import ModelShape
from megakernel.step import IntArray, StepError

_ELEMENT_BYTES = 2


class CudaKvPool:
    """`write` and `read` may be called from any thread, `copy_slots` from the one that runs steps."""

    def __init__(self, driver: Driver, shape: ModelShape, num_slots: int, num_unused: int = 0) -> None:
        """`num_unused` slots follow those of the pool, for rows that compute nothing of use."""
        self._driver = driver
        self._num_layers, self._num_slots = shape.num_layers, num_slots
        self._token_bytes = 2 * shape.num_kv_heads * shape.head_dim * _ELEMENT_BYTES
        self.all_slots = num_slots + num_unused
        self._layer_bytes = self.all_slots * self._token_bytes
        self.address: Address = driver.allocate(shape.num_layers * self._layer_bytes)
        self._stream, self._lock = driver.new_stream(), threading.Lock()
        self._staging, self._copied = HostStaging(driver), DeviceMemory(driver)

    def copy_slots(self, stream: Stream, source: IntArray, destination: IntArray) -> None:
        """By way of other memory: all of `source` is read before any of `destination` is written."""
        if len(source) != len(destination):
            raise ValueError(f"{len(source)} slots cannot be copied to {len(destination)}")
        self._check_slots(source)
        self._check_slots(destination)
        token, pitch, layers = self._token_bytes, self._layer_bytes, self._num_layers
        line = len(source) * token
        try:
            held = self._copied.grown_to(layers * line).device
            for at, slot, count in runs_of(source):
                there, here = self.address + slot * token, held + at * token
                self._driver.copy_lines(stream, here, line, there, pitch, count * token, layers)
            for at, slot, count in runs_of(destination):
                there, here = self.address + slot * token, held + at * token
                self._driver.copy_lines(stream, there, pitch, here, line, count * token, layers)
            self._driver.synchronize(stream)
        except CudaError as error:
            raise StepError(f"slots cannot be copied: {error}") from error

    def write(self, layer: int, slots: IntArray, data: memoryview | bytes) -> None:
        wire = np.frombuffer(data, dtype=np.uint8)
        if wire.nbytes != (expected := len(slots) * self._token_bytes):
            raise ValueError(f"{len(slots)} tokens of one layer are {expected} bytes, not {wire.nbytes}")
        first = self._layer_start(layer, slots)
        try:
            with self._lock:
                staged = self._staged(len(slots))
                # [K or V, tokens, bytes] -> [tokens, K or V, bytes]
                ordered = wire.reshape(2, len(slots), self._token_bytes // 2).swapaxes(0, 1)
                staged.reshape(ordered.shape)[...] = ordered
                for at, slot, count in runs_of(slots):
                    to = first + slot * self._token_bytes
                    self._driver.copy_to_device(self._stream, to, staged[at : at + count])
                self._driver.synchronize(self._stream)
        except CudaError as error:
            raise StepError(f"KV cannot be written: {error}") from error

    def read(self, layer: int, slots: IntArray) -> memoryview:
        first = self._layer_start(layer, slots)
        try:
            with self._lock:
                staged = self._staged(len(slots))
                for at, slot, count in runs_of(slots):
                    place = first + slot * self._token_bytes
                    self._driver.copy_to_host(self._stream, staged[at : at + count], place)
                self._driver.synchronize(self._stream)
                halves = staged.reshape(len(slots), 2, self._token_bytes // 2)
                wire = halves.swapaxes(0, 1).copy()
        except CudaError as error:
            raise StepError(f"KV cannot be read: {error}") from error
        return wire.reshape(-1).data

    def _layer_start(self, layer: int, slots: IntArray) -> Address:
        self._check_slots(slots)
        if not 0 <= layer < self._num_layers:
            raise StepError("no such layer")
        return self.address + layer * self._layer_bytes

    def _check_slots(self, slots: IntArray) -> None:
        if len(slots) and (slots.min() < 0 or slots.max() >= self._num_slots):
            raise StepError("a slot is not in the pool")

    def _staged(self, num_tokens: int) -> npt.NDArray[np.uint8]:
        """[tokens, bytes]"""
        num_bytes = num_tokens * self._token_bytes
        return self._staging.grown_to(num_bytes)[:num_bytes].reshape(num_tokens, self._token_bytes)
