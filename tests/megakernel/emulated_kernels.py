"""The kernels of tests/megakernel/emulated/, and how they are run."""

import ctypes
import functools
import re
import shutil
from pathlib import Path

import numpy as np

from megakernel.emulation import Counts, Emulation, Region, build_emulation, device_array

FOLDER = Path(__file__).with_name("emulated")
NUM_BLOCKS = 3
SHARED_BYTES = 16384
HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
HAS_LINES = shutil.which("addr2line") is not None


class Arguments(ctypes.Structure):
    """`Arguments` of arguments.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input", "output", "counters")),
        ("fault", ctypes.c_uint32),
        ("steps", ctypes.c_uint32),
    )


@functools.lru_cache(maxsize=8)
def library(name: str, *flags: str) -> Emulation:
    return build_emulation((FOLDER / name).read_text(), extra_flags=(f"-I{FOLDER}", *flags))


@functools.lru_cache(maxsize=1)
def cases() -> list[str]:
    """Of wrong.cu, by number."""
    listed = re.search(r"enum Case[^{]*\{(.*?)\}", (FOLDER / "wrong.cu").read_text(), re.DOTALL)
    return re.findall(r"k[A-Z]\w+", listed[1])


@functools.lru_cache(maxsize=64)
def lines_of(case: str) -> list[int]:
    """That end in the case's name."""
    lines = (FOLDER / "wrong.cu").read_text().splitlines()
    return [number for number, line in enumerate(lines, 1) if line.endswith(f"// {case}")]


def launch(
    kernel: str,
    values: np.ndarray,
    output: np.ndarray,
    *,
    fault: int = 0,
    steps: int = 6,
    seed: int = 0,
    **more,
) -> Counts:
    """A kernel of right.cu."""
    counters = device_array(64, np.uint32)
    arguments = Arguments(values.ctypes.data, output.ctypes.data, counters.ctypes.data, fault, steps)
    regions = [
        Region("input", values),
        Region("output", output, is_writable=True, is_uninitialised=fault == 0),
        Region("counters", counters, is_writable=True),
    ]
    emulation = more.pop("emulation", None) or library("right.cu")
    return emulation.run(
        kernel, arguments, regions, num_blocks=NUM_BLOCKS, shared_bytes=SHARED_BYTES, seed=seed, **more
    )


def launch_case(case: str, *, seed: int = 0, **more) -> Counts:
    """A case of wrong.cu."""
    words, output, counters = (device_array(size, np.uint32) for size in (1024, 1024, 128))
    arguments = Arguments(words.ctypes.data, output.ctypes.data, counters.ctypes.data, cases().index(case), 0)
    regions = [
        Region("input", words),
        Region("output", output, is_writable=True),
        Region("counters", counters[:64], is_writable=True),
        Region("fresh", counters[64:], is_writable=True, is_uninitialised=True),
    ]
    settings = {"num_blocks": NUM_BLOCKS, "shared_bytes": SHARED_BYTES, "max_operations": 300_000}
    return library("wrong.cu").run("wrong", arguments, regions, seed=seed, **settings | more)
