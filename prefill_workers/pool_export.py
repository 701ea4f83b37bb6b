"""`RankPool.read` as one CUDA kernel, from the pool straight into pinned host memory: no landing buffer.

Blocks are gathered, types converted, and a rank's heads put side by side with other ranks' in one pass
(`kernels/include/cuda/kv_export.h`). On an H200, 2,048 tokens of a layer of 8 heads of 128 in 16 bits take
163 us, 51.6 GB/s, where a gather and a copy take 190; but to start one takes the host 60 us, not 28, and
until it is through no block that it reads may have another owner: a gather within the GPU's memory is done
sooner. So `PieceCopier` has none unless it is given one.
"""

import ctypes
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import torch

from cluster.kv_layout import KvDtype
from megakernel.cuda_build import build_cubin
from megakernel.cuda_device import Address, Driver, Grid, Stream
from megakernel.cuda_driver import open_driver
from prefill_workers.pool_layout import (
    TORCH_DTYPES,
    PoolDtype,
    PoolLayoutError,
    RankPool,
    wire_dtype,
)

EXPORT_THREADS = 256
"""`kExportThreads`: a block."""
_MOST_BLOCKS = 32
"""With 16 bytes a thread, 128 KiB under way: 2 us of PCIe 5.0 x16. More take SMs from a forward pass."""
_STORE_BYTES = 16
_MOST_VALUES = 2**31 - 1
_KV_TYPES: dict[PoolDtype, str] = {
    "float32": "kFloat32",
    "float16": "kFloat16",
    "bfloat16": "kBFloat16",
    "float8_e4m3fn": "kE4M3",
}

Pair = tuple[PoolDtype, KvDtype]
PAIRS: tuple[Pair, ...] = tuple(itertools.product(get_args(PoolDtype), get_args(KvDtype)))


class ExportArguments(ctypes.Structure):
    """`ExportArguments` of kv_export.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("pool", "wire", "block_ids")),
        *((name, ctypes.c_int64) for name in ("pool_part", "pool_block", "pool_head", "pool_token")),
        *((name, ctypes.c_int64) for name in ("wire_part", "wire_token")),
        ("scales", ctypes.c_float * 2),
        *((name, ctypes.c_uint32) for name in ("first_token", "num_tokens")),
        *((name, ctypes.c_uint32) for name in ("tokens_per_block", "num_heads", "head_dim", "is_aligned")),
    )


def kernel_name(pair: Pair) -> str:
    return f"export_{pair[0]}_as_{pair[1]}"


def export_source(pairs: Iterable[Pair]) -> str:
    """CUDA C++ with a kernel for each pair of the pool's type and the wire's."""
    kernels = {kernel_name(pair): pair for pair in pairs}
    lines = [
        '#include "cuda/kv_export.h"',
        '#include "cuda/registry.h"',
        "using namespace headrace;",
        f"static_assert(sizeof(ExportArguments) == {ctypes.sizeof(ExportArguments)} && "
        f"kExportThreads == {EXPORT_THREADS} && kStoreBytes == {_STORE_BYTES}, "
        '"compiled for other headers");',
    ]
    for name, (pool, wire) in kernels.items():
        lines.append(
            f'extern "C" __global__ void __launch_bounds__({EXPORT_THREADS})\n'
            f"{name}(const __grid_constant__ ExportArguments a) {{\n"
            f"    export_kv<KvType::{_KV_TYPES[pool]}, KvType::{_KV_TYPES[wire]}>(a);\n}}"
        )
    return "\n".join([*lines, f"HEADRACE_KERNELS({', '.join(kernels)})", ""])


def export_arguments(
    pool: RankPool,
    layer: int,
    block_ids: torch.Tensor,
    first_token: int,
    own: torch.Tensor,
    *,
    ids_address: Address,
    own_address: Address,
) -> ExportArguments:
    """Of what `pool.read` does with the same arguments.

    `block_ids` are int64 of the host; `ids_address` is where the device has them, `own_address` where it sees
    `own`.
    Raises PoolLayoutError.
    """
    values = pool.layer(layer)
    _, num_blocks, tokens_per_block, num_heads, head_dim = values.shape
    num_tokens = own.shape[1]
    pool.check_run(len(block_ids), first_token, num_tokens)
    _check_ids(block_ids, num_blocks)
    _check_own(own, num_heads, head_dim)
    if values.stride(4) != 1:
        raise PoolLayoutError(f"values of a head are {values.stride(4)} apart in the pool, expected 1")
    pool_part, pool_block, pool_token, pool_head, _ = values.stride()
    wire_part, wire_token, *_ = own.stride()
    address = values.data_ptr()
    # What a thread loads for one store; larger loads are made in pieces.
    load_bytes = min(_STORE_BYTES // own.element_size() * values.element_size(), _STORE_BYTES)
    loads = (address, *(step * values.element_size() for step in values.stride()[:4]))
    stores = (own_address, *(step * own.element_size() for step in own.stride()[:3]))
    is_aligned = not any(at % load_bytes for at in loads) and not any(at % _STORE_BYTES for at in stores)
    return ExportArguments(
        pool=address,
        wire=own_address,
        block_ids=ids_address,
        pool_part=pool_part,
        pool_block=pool_block,
        pool_head=pool_head,
        pool_token=pool_token,
        wire_part=wire_part,
        wire_token=wire_token,
        scales=pool.scales,
        first_token=first_token,
        num_tokens=num_tokens,
        tokens_per_block=tokens_per_block,
        num_heads=num_heads,
        head_dim=head_dim,
        is_aligned=is_aligned,
    )


class PoolExport:
    """The kernel of one pool and one type on the wire, loaded."""

    def __init__(self, pool: RankPool, dtype: KvDtype, driver: Driver, cubin: Path) -> None:
        """`cubin`: of an `export_source` with the pair. Raises CudaError."""
        self._pool = pool
        self._wire_dtype = wire_dtype(dtype)
        self._driver = driver
        grid = Grid(
            num_blocks=min(_MOST_BLOCKS, driver.facts.num_sms),
            num_threads=EXPORT_THREADS,
            shared_bytes=0,
            is_cooperative=False,
        )
        name = kernel_name(_pair_of(pool, dtype))
        self._kernel = driver.load(cubin, [name], grid)[name]

    def start(
        self,
        stream_handle: int,
        layer: int,
        block_ids: torch.Tensor,
        ids_on_device: torch.Tensor,
        first_token: int,
        own: torch.Tensor,
    ) -> None:
        """`pool.read` on a stream of CUDA's, into pinned memory of the host.

        `ids_on_device` must live, and keep what they hold, until the stream is through. Raises
        PoolLayoutError, CudaError.
        """
        if own.dtype != self._wire_dtype:
            raise PoolLayoutError(f"KV on the wire is {own.dtype}, the kernel writes {self._wire_dtype}")
        if own.numel() == 0:
            return  # nothing has no address
        arguments = export_arguments(
            self._pool,
            layer,
            block_ids,
            first_token,
            own,
            ids_address=ids_on_device.data_ptr(),
            own_address=self._driver.address_of_host(own.data_ptr()),
        )
        self._driver.launch(Stream(stream_handle), self._kernel, arguments)


def open_export(pool: RankPool, dtype: KvDtype) -> PoolExport:
    """On the GPU that has the pool; compiles where the cache has no such kernel.

    Raises CudaUnavailableError, CudaError, BuildError, ValueError for a GPU that kernels are not built for.
    """
    driver = open_driver(pool.device.index or 0)
    built = build_cubin(export_source([_pair_of(pool, dtype)]), driver.facts.architecture)
    return PoolExport(pool, dtype, driver, built.path)


def _pair_of(pool: RankPool, dtype: KvDtype) -> Pair:
    return next(pair for pair in PAIRS if (TORCH_DTYPES[pair[0]], pair[1]) == (pool.dtype, dtype))


def _check_ids(block_ids: torch.Tensor, num_blocks: int) -> None:
    if block_ids.dtype != torch.int64:
        raise PoolLayoutError(f"block ids are {block_ids.dtype}, expected int64")
    outside = block_ids[(block_ids < 0) | (block_ids >= num_blocks)]
    if len(outside):
        raise PoolLayoutError(f"block {int(outside[0])} of a sequence is not among the pool's {num_blocks}")


def _check_own(own: torch.Tensor, num_heads: int, head_dim: int) -> None:
    if own.dim() != 4 or (own.shape[0], *own.shape[2:]) != (2, num_heads, head_dim):
        raise PoolLayoutError(
            f"a rank's part of a layer has shape {list(own.shape)}, "
            f"expected [2, tokens, {num_heads}, {head_dim}]"
        )
    if own.shape[1] and (own.stride(2), own.stride(3)) != (head_dim, 1):
        raise PoolLayoutError(f"heads on the wire have strides {own.stride()[2:]}, expected {(head_dim, 1)}")
    if own.numel() > _MOST_VALUES:
        raise PoolLayoutError(f"a layer of a piece has {own.numel()} values, of at most {_MOST_VALUES}")
