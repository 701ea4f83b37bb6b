"""Generated CUDA -> a cubin for one architecture, by nvcc, cached by all that goes into it.

With it comes what ptxas said that each kernel takes of an SM.
"""

import hashlib
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from megakernel.artifact import Progress
from megakernel.build import INCLUDE_FOLDER, BuildError, Compiler, run_compiler, version_of
from megakernel.cuda_toolkit import find_tool
from megakernel.folder_lock import locked
from megakernel.user_cache import cache_folder

# Fused or not is written out in the kernels, as for CPUs: buckets must not differ in what the compiler fuses.
FLAGS = ("-std=c++17", "--expt-relaxed-constexpr", "-fmad=false", "-Xptxas=-v")
_SHARED_BYTES = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "compute_89:sm_90": 99 * 1024,
}
"""Static and dynamic, that one block may have: CUDA C++ Programming Guide, "Technical Specifications".

`compute_89:sm_90` runs on sm_90 and has the instructions and the memory of sm_89."""
ARCHITECTURES = tuple(_SHARED_BYTES)
_SCHEDULERS, _REGISTERS_A_SCHEDULER = 4, 16_384
"""An SM's warps are dealt to its schedulers, and each has its registers from its own."""
_REGISTERS_A_THREAD = 255
_REGISTER_GRAIN = 8
"""Registers are given to a warp in eights a thread."""
_CUBIN, _RECORD = "step.cubin", "build.json"
_FEWEST_SECONDS = 10.0
_SOURCE_BYTES_A_SECOND = 5_000
"""Of generated code, with the time above for the kernels: a guess, for the progress bar alone."""


class CudaResourceError(BuildError):
    """Kernels that spill or take more than a block may have: names each, and what it takes."""


class KernelResources(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    registers: int
    static_shared_bytes: int
    stack_bytes: int
    """With those of the functions it calls."""


class FunctionSpills(msgspec.Struct, frozen=True, kw_only=True):
    """Of a kernel, or of a function that one calls."""

    name: str
    store_bytes: int
    load_bytes: int


class CudaBuild(msgspec.Struct, frozen=True, kw_only=True):
    """One compilation: its flags, who made it, and what ptxas reported."""

    architecture: str
    nvcc: str
    """What it says of its version."""
    flags: tuple[str, ...]
    kernels: tuple[KernelResources, ...]
    spills: tuple[FunctionSpills, ...]
    """Of those that do."""
    warnings: tuple[str, ...]


class Cubin(msgspec.Struct, frozen=True):
    path: Path
    build: CudaBuild


def find_nvcc() -> Compiler:
    """Raises ToolMissingError."""
    path = str(find_tool("nvcc"))
    return Compiler(path, version_of(path))


def build_cubin(
    source: str,
    architecture: str,
    *,
    include_folder: Path = INCLUDE_FOLDER,
    folder: Path | None = None,
    extra_flags: Sequence[str] = (),
    nvcc: Compiler | None = None,
    progress: Progress | None = None,
) -> Cubin:
    """The cubin of `source`, made unless it is cached in `folder`. Whoever makes the same one meanwhile is
    waited for. Raises BuildError, and ValueError for an unknown architecture."""
    nvcc = nvcc or find_nvcc()
    flags = cubin_flags(architecture, extra_flags)
    folder = folder or cache_folder() / "cubins"
    target = folder / _key(source, flags, nvcc, include_folder)
    with locked(target, progress):
        if not target.exists():
            _make(source, architecture, target, include_folder, flags, nvcc, progress)
    record = msgspec.json.decode((target / _RECORD).read_bytes(), type=CudaBuild)
    return Cubin(target / _CUBIN, record)


def cubin_flags(architecture: str, extra_flags: Sequence[str] = ()) -> tuple[str, ...]:
    _check_architecture(architecture)
    virtual, _, real = architecture.rpartition(":")
    target = f"-gencode=arch={virtual},code={real}" if virtual else f"-arch={architecture}"
    return (*FLAGS, "-cubin", target, *extra_flags)


def runs_on(architecture: str) -> str:
    """The GPU's own architecture, as a driver tells it."""
    return architecture.rpartition(":")[2]


def most_registers(num_threads: int) -> int:
    """That a thread may have for a block of so many to fit an SM."""
    warps_a_scheduler = -(-num_threads // (32 * _SCHEDULERS))
    registers = _REGISTERS_A_SCHEDULER // (32 * warps_a_scheduler)
    return min(_REGISTERS_A_THREAD, registers // _REGISTER_GRAIN * _REGISTER_GRAIN)


def most_shared_bytes(architecture: str) -> int:
    """That a block may have, static and dynamic together."""
    _check_architecture(architecture)
    return _SHARED_BYTES[architecture]


def check_resources(
    build: CudaBuild, *, threads: int, dynamic_shared_bytes: int, max_registers: int | None = None
) -> None:
    """That nothing spills and that every kernel fits an SM. Raises CudaResourceError."""
    registers = most_registers(threads) if max_registers is None else max_registers
    shared_bytes = most_shared_bytes(build.architecture)
    wrong = [
        f"{spilling.name} spills {spilling.store_bytes} bytes, and loads {spilling.load_bytes} again"
        for spilling in build.spills
    ]
    for kernel in build.kernels:
        if kernel.registers > registers:
            wrong.append(f"{kernel.name} takes {kernel.registers} registers a thread, of {registers}")
        taken = kernel.static_shared_bytes + dynamic_shared_bytes
        if taken > shared_bytes:
            wrong.append(f"{kernel.name} takes {taken} bytes of shared memory, of {shared_bytes}")
    if wrong:
        raise CudaResourceError(f"{build.architecture}: {'; '.join(wrong)}")


def parse_ptxas(said: str) -> tuple[tuple[KernelResources, ...], tuple[FunctionSpills, ...], tuple[str, ...]]:
    """Kernels, functions that spill, and warnings, of what `-Xptxas=-v` prints."""
    kernels, spills, warnings = [], [], []
    kernel = function = ""
    for line in said.splitlines():
        if found := re.search(r"Compiling entry function '(.+?)'", line):
            kernel = found[1]
        elif found := re.search(r"Function properties for (\S+)", line):
            function = found[1]
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            store_bytes, load_bytes = int(found[1]), int(found[2])
            if store_bytes or load_bytes:
                spills.append(FunctionSpills(name=function, store_bytes=store_bytes, load_bytes=load_bytes))
        elif found := re.search(r"Used (\d+) registers", line):
            kernels.append(
                KernelResources(
                    name=kernel,
                    registers=int(found[1]),
                    static_shared_bytes=_number(r"(\d+) bytes smem", line),
                    stack_bytes=_number(r"(\d+) bytes cumulative stack size", line),
                )
            )
        elif "warning" in line:
            warnings.append(line.strip())
    return tuple(kernels), tuple(spills), tuple(warnings)


def _number(pattern: str, line: str) -> int:
    found = re.search(pattern, line)
    return int(found[1]) if found else 0


def _make(
    source: str,
    architecture: str,
    target: Path,
    include_folder: Path,
    flags: tuple[str, ...],
    nvcc: Compiler,
    progress: Progress | None,
) -> None:
    if progress is not None:
        progress("compiling", 0.0)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        path = made / "step.cu"
        path.write_text(source, encoding="utf-8")
        command = [nvcc.path, *flags, f"-I{include_folder}", str(path), "-o", str(made / _CUBIN)]
        said = run_compiler(command, _FEWEST_SECONDS + len(source) / _SOURCE_BYTES_A_SECOND, progress)
        kernels, spills, warnings = parse_ptxas(said)
        build = CudaBuild(
            architecture=architecture,
            nvcc=nvcc.version,
            flags=flags,
            kernels=kernels,
            spills=spills,
            warnings=warnings,
        )
        (made / _RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(build), indent=1))
        made.rename(target)
    if progress is not None:
        progress("compiling", 1.0)


def _check_architecture(architecture: str) -> None:
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r}: one of {', '.join(ARCHITECTURES)} is wanted")


def _key(source: str, flags: Sequence[str], nvcc: Compiler, include_folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in (source, *flags, nvcc.path, nvcc.version, _headers(include_folder)):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _headers(include_folder: Path) -> str:
    """Name and content of every header a source may include."""
    paths = sorted((include_folder / "cuda").rglob("*.h"))
    return "\n".join(
        f"{path.relative_to(include_folder)}\n{path.read_text(encoding='utf-8')}" for path in paths
    )
