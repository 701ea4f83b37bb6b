"""The CPU in hand as a machine: cores, vector units and caches as it states them, the rest measured once.

The result is cached by CPU model, usable cores and kernel (docs/machines.md).
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.build import BuildError, find_compiler
from megakernel.kernel_rates import KernelRates, RatesError, measured_rates, usual_rates
from megakernel.machine import PROBED, Machine
from megakernel.user_cache import cache_folder, read_if_there, write_atomically

_PAGE_BYTES = 4096
_DEFAULT_L2_BYTES = 256 * 1024
_MAX_THREADS = 256
_PROBE_S = 20.0
"""After this the measuring program is given up and numpy measures instead."""
_MEASURED_BYTES = 256 << 20
"""Well above any last-level cache share, small beside a model."""
_UNMEASURED_SYNC_US = 1.0
_VERSION = 2
"""Of what is measured and how: raised when either changes."""


class Measured(msgspec.Struct, frozen=True):
    worker_bandwidth_gb_s: float
    bandwidth_gb_s: float
    sync_us: float


def probe_cpu(
    folder: Path | None = None,
    measure: Callable[[int], Measured] | None = None,
    measure_kernels: Callable[[], KernelRates] = measured_rates,
) -> Machine:
    """This CPU, measured within about ten seconds the first time, from the cache afterwards."""
    cpu_info = _read("/proc/cpuinfo")
    cores = usable_cores()
    path = (folder or cache_folder()) / "machines" / f"cpu-{_key(cpu_info, cores)}.json"
    cached = _cached(path)
    if cached is not None:
        return cached
    units = vector_units(cpu_info)
    rates = _rates(units, measure_kernels, path)
    machine = describe(units, cores, l2_bytes(), (measure or measure_memory)(cores), rates)
    try:
        write_atomically(path, msgspec.json.encode(machine))
    except OSError as error:
        print(f"megakernel: the probed machine is not cached: {error}", file=sys.stderr)
    return machine


def _rates(units: tuple[str, ...], measure: Callable[[], KernelRates], path: Path) -> KernelRates:
    try:
        return measure()
    except RatesError as error:
        print(
            "megakernel: the CPU's kernels are not measured, their rates are from a table. To measure them "
            f"later, remove {path}. {error}",
            file=sys.stderr,
        )
        return usual_rates(units)


def describe(
    units: tuple[str, ...], cores: int, l2_per_core_bytes: int, measured: Measured, rates: KernelRates
) -> Machine:
    """The machine record of what was stated and measured; half of a core's L2 is its scratch."""
    return Machine(
        name=PROBED,
        kind="cpu",
        num_workers=cores,
        scratch_bytes=max(l2_per_core_bytes // 2, _PAGE_BYTES),
        page_bytes=_PAGE_BYTES,
        bandwidth_gb_s=max(measured.bandwidth_gb_s, measured.worker_bandwidth_gb_s),
        worker_bandwidth_gb_s=measured.worker_bandwidth_gb_s,
        load_latency_us=0.1,
        sync_us=measured.sync_us,
        macs_per_us=rates.macs_per_us,
        attention_macs_per_us=rates.attention_macs_per_us,
        prepared_per_us=rates.prepared_per_us,
        instruction_us=0.05,
        vector_units=units,
        row_group=rates.row_group,
        computes_while_loading=True,
    )


def usable_cores() -> int:
    """Cores this process may run on, at most what a program is compiled for."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, _MAX_THREADS)


def vector_units(cpu_info: str) -> tuple[str, ...]:
    """Of `avx2`, `avx512`, `avx512_vnni`, from the text of /proc/cpuinfo."""
    flags: set[str] = set()
    for line in cpu_info.splitlines():
        if line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
            break
    units = []
    if {"avx2", "fma", "f16c"} <= flags:
        units.append("avx2")
        if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags:
            units.append("avx512")
            if "avx512_vnni" in flags:
                units.append("avx512_vnni")
    return tuple(units)


def l2_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """One core's share of its L2, or a small default where the system does not say."""
    for index in sorted(folder.glob("index*")):
        if _read(index / "level").strip() == "2":
            size = _read(index / "size").strip()
            sharers = _count_cpus(_read(index / "shared_cpu_list").strip())
            units = {"K": 1 << 10, "M": 1 << 20}
            if size[:-1].isdigit() and size[-1] in units:
                return int(size[:-1]) * units[size[-1]] // max(sharers, 1)
    return _DEFAULT_L2_BYTES


def measure_memory(threads: int) -> Measured:
    """Read bandwidth and sync cost by a C program, or by numpy where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    measured = None if compiler is None else _measure_compiled(compiler, threads)
    return measured or _measure_numpy(threads)


def _measure_compiled(compiler: str, threads: int) -> Measured | None:
    """None where the program cannot be built or does not finish in time."""
    source = resources.files("megakernel") / "probe.c"
    with tempfile.TemporaryDirectory(prefix="megakernel-probe-") as folder, resources.as_file(source) as file:
        program = str(Path(folder) / "probe")
        build = [compiler, "-O3", "-march=native", "-std=gnu11", "-pthread", str(file), "-o", program]
        measure = [program, str(threads), str(max(_MEASURED_BYTES // threads >> 20, 8))]
        try:
            subprocess.run(build, check=True, capture_output=True, timeout=_PROBE_S)  # noqa: S603 - our own command
            ran = subprocess.run(measure, check=True, capture_output=True, text=True, timeout=_PROBE_S)  # noqa: S603 - as above
            one, every, sync_us = (float(word) for word in ran.stdout.split())
        except (OSError, subprocess.SubprocessError, ValueError):
            return None
    return Measured(one, every, sync_us or _UNMEASURED_SYNC_US)


def _measure_numpy(threads: int) -> Measured:
    """A lower bound: numpy's reductions let go of the GIL, and read a little slower than C does."""
    words = np.ones((threads, _MEASURED_BYTES // threads // 8), dtype=np.int64)
    with ThreadPoolExecutor(threads) as pool:
        one = max(_read_rate(pool, words[:1]) for _ in range(3))
        every = max(_read_rate(pool, words) for _ in range(3))
    return Measured(one, every, _UNMEASURED_SYNC_US)


def _read_rate(pool: ThreadPoolExecutor, words: npt.NDArray[np.int64]) -> float:
    begin = time.perf_counter()
    list(pool.map(np.bitwise_or.reduce, words))
    return words.nbytes / (time.perf_counter() - begin) / 1e9


def _key(cpu_info: str, cores: int) -> str:
    named: Mapping[str, str] = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in cpu_info.splitlines())
        if key.strip() in ("model name", "cpu family", "model", "stepping", "flags")
    }
    facts = [platform.machine(), platform.release(), str(cores), str(l2_bytes()), *sorted(named.values())]
    facts += [f"probe {_VERSION}", "measured" if _has_compiler() else "from a table"]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _has_compiler() -> bool:
    """Once there is one, the kernels are measured."""
    try:
        find_compiler()
    except BuildError:
        return False
    return True


def _cached(path: Path) -> Machine | None:
    content = read_if_there(path)
    if content is None:
        return None
    try:
        return msgspec.json.decode(content, type=Machine)
    except msgspec.DecodeError:
        return None


def _count_cpus(text: str) -> int:
    """CPUs in a list such as `0-3,8`."""
    count = 0
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return count


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
