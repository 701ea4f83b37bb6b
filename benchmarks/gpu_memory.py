"""Random weights and KV, made where they lie: in the memory of an open runtime, seen by torch.

Bytes are what the packed layouts take (megakernel/pack_cuda.py): random numbers, and scales of a size that
keeps activations about as large as a trained model's. Equal seeds give equal bytes on one device.
"""

import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megakernel.artifact import Segment, WeightLayout
from megakernel.cuda_compiled import CompiledCuda
from megakernel.cuda_device import Address, Driver
from megakernel.cuda_runtime import WAIT_LIMIT_S, CudaRuntime
from megakernel.model.names import expected_shapes
from megakernel.model.shape import ModelShape
from megakernel.pack_cuda import unit_bytes, unit_k
from megakernel.packing import GROUP

BLOCK_TOKENS = 16
View = Callable[[Address, int], torch.Tensor]
"""(address, bytes) -> that memory as uint8."""

_LARGEST_NUMBER = {"Q4_0": 8.0, "W4G128": 7.5, "Q8_0": 128.0, "W8G128": 128.0}
"""Of what a scale is multiplied by, drawn evenly from about zero."""
_NUMBER_BITS = {"Q4_0": 4, "W4G128": 4, "Q8_0": 8, "W8G128": 8}
_CHUNK_ELEMENTS = 1 << 26
_NORM_SPREAD, _BIAS_SPREAD = 0.1, 0.3
_KV_SPREAD = 0.5


class _Exposed:
    """Device memory as torch takes it, without a copy."""

    def __init__(self, address: Address, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


def device_view(address: Address, num_bytes: int) -> torch.Tensor:
    """Of the first GPU; torch has the same primary context."""
    return torch.as_tensor(_Exposed(address, num_bytes), device="cuda")


def host_view(address: Address, num_bytes: int) -> torch.Tensor:
    """For a device that is emulated in host memory."""
    return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)


@contextmanager
def opened(
    compiled: CompiledCuda,
    num_blocks: int,
    *,
    seed: int = 0,
    wait_limit_s: float = WAIT_LIMIT_S,
    driver: Driver | None = None,
    view: View = device_view,
) -> Iterator[CudaRuntime]:
    """A runtime with random weights and a pool of random KV."""
    with CudaRuntime(compiled, num_blocks, BLOCK_TOKENS, driver=driver, wait_limit_s=wait_limit_s) as runtime:
        fill_weights(view(runtime.weights_address, compiled.layout.num_bytes), compiled, seed)
        fill_kv(kv_pool(runtime, view), seed)
        settle()
        yield runtime


def settle() -> None:
    """Before a step that meets what torch writes or reads: the runtime's streams do not wait for torch's."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def kv_pool(runtime: CudaRuntime, view: View = device_view) -> torch.Tensor:
    """[layers, slots, K or V, KV heads, head_dim] float16, the runtime's own memory."""
    shape = runtime.shape
    size = (shape.num_layers, runtime.kv_slots, 2, shape.num_kv_heads, shape.head_dim)
    held = view(runtime.kv_address, 2 * math.prod(size)).view(torch.float16).view(size)
    return held[:, : runtime.num_blocks * BLOCK_TOKENS]


def fill_kv(pool: torch.Tensor, seed: int = 0) -> None:
    """Keys and values about as large as normed ones are."""
    draw = _generator(pool, seed + 1)
    for layer in pool:
        layer.normal_(0.0, _KV_SPREAD, generator=draw)


def fill_weights(packed: torch.Tensor, compiled: CompiledCuda, seed: int = 0) -> None:
    """All segments of the layout, [num_bytes]; matrices have a spread of 1 / sqrt(in_features)."""
    layout: WeightLayout = compiled.layout
    draw = _generator(packed, seed)
    for segment in layout.segments.values():
        held = packed[segment.offset : segment.offset + segment.num_bytes]
        if not segment.is_matrix:
            _fill_vector(held.view(torch.float32), segment, draw)
        else:
            _fill_matrix(held, segment.format, in_features(compiled.shape, segment), draw)


def in_features(shape: ModelShape, segment: Segment) -> int:
    return expected_shapes(shape)[segment.weights[0]][1]


def _generator(tensor: torch.Tensor, seed: int) -> torch.Generator:
    return torch.Generator(tensor.device).manual_seed(seed)


def _fill_vector(values: torch.Tensor, segment: Segment, draw: torch.Generator) -> None:
    is_bias = segment.weights[0].endswith("bias")
    mean, spread = (0.0, _BIAS_SPREAD) if is_bias else (1.0, _NORM_SPREAD)
    values.normal_(mean, spread, generator=draw)


def _fill_matrix(held: torch.Tensor, format: str, in_features: int, draw: torch.Generator) -> None:
    spread = in_features**-0.5
    if format == "BF16":
        values = held.view(torch.bfloat16)
        for part in values.split(_CHUNK_ELEMENTS):
            part.normal_(0.0, spread, generator=draw)
        return
    units = held.view(-1, unit_bytes(format))
    number_bytes = unit_k(format) * GROUP * _NUMBER_BITS[format] // 8
    for part in units.split(_CHUNK_ELEMENTS // unit_bytes(format)):
        part.random_(0, 256, generator=draw)
        # Even over [-largest, largest]: its spread is largest / sqrt(3).
        scale = spread * math.sqrt(3) / _LARGEST_NUMBER[format]
        _fill_scales(part[:, number_bytes:].view(torch.float16), format, scale, draw)


def _fill_scales(scales: torch.Tensor, format: str, scale: float, draw: torch.Generator) -> None:
    """[units, halves]: of either sign where numbers have no minimum, so that sums have no drift."""
    sizes = scale * torch.empty(scales.shape, device=scales.device).uniform_(0.5, 1.5, generator=draw)
    if format == "W4G128":
        sizes[:, 1::2] = -_LARGEST_NUMBER[format] * sizes[:, ::2]
    else:
        signs = torch.empty(scales.shape, device=scales.device).uniform_(generator=draw) < 0.5
        sizes = torch.where(signs, -sizes, sizes)
    scales.copy_(sizes)
