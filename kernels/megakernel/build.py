"""Generated source -> a shared object, by the system's compiler, cached by all that goes into it."""

import contextlib
import functools
import hashlib
import math
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from megakernel.artifact import Progress
from megakernel.user_cache import cache_folder

COMPILERS = ("c++", "g++", "clang++")
INCLUDE_FOLDER = Path(__file__).resolve().parent / "include"
"""In the repository a link to `kernels/include`; in an installed package a folder with the same files."""
# Fused or not is written out in the kernels: a compiler that fuses by itself would break equal bits.
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-w")
BUILD_LIMIT_S = 600
_SHOWN_ERROR_LINES = 20
_POLL_S = 0.2
_FEWEST_SECONDS = 3.0
_SOURCE_BYTES_A_SECOND = 200_000
"""Of generated code, with the time above for the kernels: a guess, for the progress bar alone."""


class BuildError(RuntimeError):
    """No compiler, or one that refuses the source; the message says what to do, or what it said."""


class Compiler(msgspec.Struct, frozen=True):
    path: str
    version: str


def find_compiler(names: Sequence[str] = COMPILERS) -> Compiler:
    """The first compiler of `CXX` and `names` on the path. Raises BuildError."""
    chosen = os.environ.get("CXX")
    for name in (*((chosen,) if chosen else ()), *names):
        if path := shutil.which(name):
            return Compiler(path, version_of(path))
    raise BuildError(
        f"no C++ compiler: none of {', '.join(names)} is on the path. Install one (Debian, Ubuntu: "
        "`apt-get install g++`) or name one in CXX"
    )


def build(
    source: str,
    *,
    folder: Path | None = None,
    extra_flags: Sequence[str] = (),
    compiler: Compiler | None = None,
    progress: Progress | None = None,
) -> Path:
    """The shared object of `source` for this CPU, made unless it is cached in `folder`. Raises BuildError."""
    compiler = compiler or find_compiler()
    flags = library_flags(extra_flags)
    folder = folder or cache_folder() / "libraries"
    target = folder / f"{_key(source, flags, compiler)}.so"
    if target.exists():
        return target
    if progress is not None:
        progress("compiling", 0.0)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
        path, made = Path(scratch) / "step.cpp", Path(scratch) / "step.so"
        path.write_text(source, encoding="utf-8")
        compile_library(path, made, compiler, flags, progress)
        made.replace(target)
    if progress is not None:
        progress("compiling", 1.0)
    return target


def library_flags(extra_flags: Sequence[str] = ()) -> tuple[str, ...]:
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return (*FLAGS, *(("-march=native",) if is_x86 else ()), *extra_flags)


def compile_library(
    source: Path, target: Path, compiler: Compiler, flags: Sequence[str], progress: Progress | None = None
) -> None:
    """`progress` is called every little while, with a guess of how far it is; what it raises ends the
    compiler. Raises BuildError."""
    expected_s = _FEWEST_SECONDS + source.stat().st_size / _SOURCE_BYTES_A_SECOND
    command = [compiler.path, *flags, f"-I{INCLUDE_FOLDER}", str(source), "-o", str(target)]
    run_compiler(command, expected_s, progress)


def run_compiler(command: Sequence[str], expected_s: float, progress: Progress | None = None) -> str:
    """What it said on standard error; `expected_s` is for `progress`, as above. Raises BuildError."""
    started_s = time.monotonic()
    # A process group of its own: a compiler has children, which must end with it.
    with subprocess.Popen(  # noqa: S603 - our own command
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:

        def on_wait() -> None:
            elapsed_s = time.monotonic() - started_s
            if elapsed_s > BUILD_LIMIT_S:
                raise BuildError(f"`{command[0]}` took longer than {BUILD_LIMIT_S} s")
            if progress is not None:
                progress("compiling", 1 - math.exp(-elapsed_s / expected_s))

        try:
            said = _awaited(process, on_wait)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode != 0:
        shown = "\n".join(said.splitlines()[:_SHOWN_ERROR_LINES])
        raise BuildError(f"`{command[0]}` failed with status {process.returncode}:\n{shown}")
    return said


def _awaited(process: "subprocess.Popen[str]", on_wait: Callable[[], None]) -> str:
    """What it said on standard error; `on_wait` is called while it runs."""
    while True:
        try:
            return process.communicate(timeout=_POLL_S)[1]
        except subprocess.TimeoutExpired:
            on_wait()


def _key(source: str, flags: Sequence[str], compiler: Compiler) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in (source, *flags, compiler.path, compiler.version, _cpu(), headers()):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


@functools.lru_cache(maxsize=8)
def version_of(path: str) -> str:
    """What a compiler says of itself. Raises BuildError."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False)  # noqa: S603 - a compiler from the path
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"`{path} --version` does not run: {error}") from None
    return done.stdout


def headers() -> str:
    """Name and content of every header a source may include."""
    paths = sorted((INCLUDE_FOLDER / "cpu").glob("*.h"))
    return "\n".join(f"{path.name}\n{path.read_text(encoding='utf-8')}" for path in paths)


@functools.lru_cache(maxsize=1)
def _cpu() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags")
    )
