"""CUDA kernels on a CPU: the same source, against `include/cuda_emulation/`, in an order that a seed decides.

Every access is checked. What a run finds wrong is raised as an EmulationError of the kind of the fault."""

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.artifact import Progress
from megakernel.build import INCLUDE_FOLDER, Compiler, build
from megakernel.cuda_constants import THREADS_A_BLOCK
from megakernel.emulation_errors import ERRORS, Fault
from megakernel.library import LibraryError

EMULATION_FOLDER = INCLUDE_FOLDER / "cuda_emulation"
DEFAULT_MAX_OPERATIONS = 200_000_000
_FLAGS = (
    *("-std=c++17", "-O1", "-g1", "-fvisibility=hidden", "-fno-gnu-unique", "-fno-exceptions"),
    # Calls must return to the line that made them: reports name it.
    *("-fno-optimize-sibling-calls", "-fno-crossjumping", "-fno-tree-tail-merge", "-fno-ipa-icf"),
    f"-I{EMULATION_FOLDER}",
)
_LOCKS: defaultdict[Path, threading.RLock] = defaultdict(threading.RLock)
"""A library has one machine, however often it is loaded."""
_ALIGNMENT_BYTES = 256
_MESSAGE_BYTES = 4096
_PLACE_BYTES = 64


class Poison(IntEnum):
    """What memory holds that nobody has written."""

    ZEROS = 0
    ONES = 1
    RANDOM = 2


class Region(msgspec.Struct, frozen=True):
    """Global memory that a kernel may touch, as device_array allocates it; a kernel changes it in place."""

    name: str
    array: npt.NDArray[Any]
    is_writable: bool = False
    is_uninitialised: bool = False
    """What it holds is poison: reading what the launch has not written is an error."""


class Counts(msgspec.Struct, frozen=True):
    """Of a run: operations of threads, switches between them, collectives of warps, accesses checked,
    asynchronous copies, stores to global memory."""

    operations: int
    switches: int
    collectives: int
    accesses: int
    copies: int
    stores: int


STORE = np.dtype([("address", "u8"), ("num_bytes", "u4"), ("unused", "u4"), ("value", "u1", 16)])
"""A store to global memory, of which a journal keeps every one in the order in which they ran."""
Journal = npt.NDArray[np.void]
"""[stores] of STORE."""


class _Region(ctypes.Structure):
    """`Region` of report.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("num_bytes", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
    )


class _Config(ctypes.Structure):
    """`EmulationConfig` of report.h."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("num_blocks", "threads_per_block")),
        *((name, ctypes.c_uint32) for name in ("shared_bytes", "num_regions")),
        ("regions", ctypes.POINTER(_Region)),
        ("seed", ctypes.c_uint64),
        ("max_operations", ctypes.c_uint64),
        ("poison", ctypes.c_uint32),
        ("expires_waits", ctypes.c_uint32),
        ("journal", ctypes.c_void_p),
        ("journal_stores", ctypes.c_uint64),
    )


class _Report(ctypes.Structure):
    """`EmulationReport` of report.h."""

    _fields_ = (
        ("status", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("block", "warp", "lane")),
        ("place", ctypes.c_char * _PLACE_BYTES),
        ("offset", ctypes.c_int64),
        *((name, ctypes.c_uint64) for name in Counts.__struct_fields__),
        ("message", ctypes.c_char * _MESSAGE_BYTES),
    )


def device_array(shape: int | Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros that begin at a multiple of 256 bytes, as CUDA allocates them."""
    dtype = np.dtype(dtype)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    memory = np.zeros(num_bytes + _ALIGNMENT_BYTES, dtype=np.uint8)
    skipped = -memory.ctypes.data % _ALIGNMENT_BYTES
    return memory[skipped : skipped + num_bytes].view(dtype).reshape(shape)


def device_copy(values: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> npt.NDArray[Any]:
    """`values` in an array as device_array makes them."""
    values = np.asarray(values, dtype=dtype)
    copied = device_array(values.shape, values.dtype)
    copied[...] = values
    return copied


def build_emulation(
    source: str,
    *,
    folder: Path | None = None,
    extra_flags: Sequence[str] = (),
    compiler: Compiler | None = None,
    progress: Progress | None = None,
) -> "Emulation":
    """Of a source that ends with HEADRACE_KERNELS. Raises BuildError, LibraryError."""
    flags = (*_FLAGS, f"-DHEADRACE_HEADERS_DIGEST=0x{_headers_digest()}", *extra_flags)
    return Emulation(build(source, folder=folder, extra_flags=flags, compiler=compiler, progress=progress))


def _headers_digest() -> str:
    """Makes the build cache tell apart sources by the headers that they include, too."""
    digest = hashlib.blake2b(digest_size=8)
    for folder in (EMULATION_FOLDER, INCLUDE_FOLDER / "cuda"):
        for path in sorted(folder.rglob("*.h")):
            digest.update(f"{path.relative_to(INCLUDE_FOLDER)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


class Emulation:
    """A library of emulated kernels. One run at a time; others wait."""

    def __init__(self, library: Path) -> None:
        """Raises LibraryError."""
        self.library = library
        try:
            loaded = ctypes.CDLL(str(library))
            function, release = loaded.headrace_emulate, loaded.headrace_release
        except (OSError, AttributeError) as error:
            raise LibraryError(f"{error}: {library} holds no emulated kernels") from None
        function.argtypes = (
            *(ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint64),
            *(ctypes.POINTER(_Config), ctypes.POINTER(_Report)),
        )
        function.restype = ctypes.c_int
        release.restype = None
        self._emulate = function
        self._lock = _LOCKS[library.resolve()]
        weakref.finalize(self, _release, release, self._lock)

    def run(
        self,
        kernel: str,
        arguments: ctypes.Structure,
        regions: Sequence[Region],
        *,
        num_blocks: int,
        shared_bytes: int,
        threads_per_block: int = THREADS_A_BLOCK,
        seed: int = 0,
        max_operations: int = DEFAULT_MAX_OPERATIONS,
        poison: Poison = Poison.ONES,
        expires_waits: bool = False,
        journal: Journal | None = None,
    ) -> Counts:
        """The kernel's one argument is `arguments`; whoever calls keeps alive what it points to. Seeds differ
        in which threads go first and in how late copies complete; a seed gives the same run every time.
        `expires_waits`: when all threads wait, the kernel's clock is put forward, so that its own time-outs
        end it. `journal` gets as many stores as it has room for. Raises EmulationError."""
        described = (_Region * max(len(regions), 1))(*(_describe(region) for region in regions))
        config = _Config(
            num_blocks=num_blocks,
            threads_per_block=threads_per_block,
            shared_bytes=shared_bytes,
            num_regions=len(regions),
            regions=described,
            seed=seed,
            max_operations=max_operations,
            poison=poison,
            expires_waits=expires_waits,
            journal=None if journal is None else journal.ctypes.data,
            journal_stores=0 if journal is None else len(journal),
        )
        report = _Report()
        with self._lock:
            self._emulate(
                kernel.encode(),
                ctypes.addressof(arguments),
                ctypes.sizeof(arguments),
                ctypes.byref(config),
                ctypes.byref(report),
            )
        if report.status:
            raise ERRORS[report.status](self._with_sources(report.message.decode()), _fault_of(report))
        return Counts(**{name: getattr(report, name) for name in Counts.__struct_fields__})

    def _with_sources(self, message: str) -> str:
        """Offsets into the library (@1a2b) become lines of source."""
        return re.sub(r"@([0-9a-f]+)", lambda found: f"at {source_of(self.library, found[1])}", message)


def _release(function: Callable[[], None], lock: threading.RLock) -> None:
    """Gives back the memory that a library keeps from run to run."""
    with lock:
        function()


def _describe(region: Region) -> _Region:
    assert region.array.flags.c_contiguous, f"{region.name} is not contiguous"
    return _Region(
        name=region.name.encode(),
        base=region.array.ctypes.data,
        num_bytes=region.array.nbytes,
        flags=region.is_writable | region.is_uninitialised << 1,
    )


def _fault_of(report: _Report) -> Fault:
    def index(value: int) -> int | None:
        return None if value < 0 else value

    return Fault(
        block=index(report.block),
        warp=index(report.warp),
        lane=index(report.lane),
        place=report.place.decode() or None,
        offset=report.offset,
    )


@functools.lru_cache(maxsize=256)
def source_of(library: Path, offset: str) -> str:
    """File and line behind an offset into a library, in hexadecimal, outside the emulation itself; the offset
    again where nothing tells."""
    tool = shutil.which("addr2line")
    if tool is None:
        return f"0x{offset}"
    command = [tool, "-i", "-e", str(library), f"0x{offset}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a tool from the path
    for line in done.stdout.splitlines():
        path, _, number = line.partition(" ")[0].rpartition(":")
        if path and not path.startswith("?") and "/cuda_emulation/" not in path:
            return f"{Path(path).name}:{number}"
    return f"0x{offset}"
