"""How fast the CPU's kernels are: measured by running them, or from a table where they cannot be built."""

import math
import os
import statistics
import subprocess
import tempfile
import time
from importlib import resources
from pathlib import Path

import msgspec

from megakernel.build import INCLUDE_FOLDER, BuildError, find_compiler, library_flags, run_compiler

_BUILD_S = 60.0
"""Ten times what it takes on a quiet core: then the build is given up."""
_USUAL_BUILD_S = 6.0
_RUN_S = 20.0
_FORMATS = ("Q4_0", "Q4_1", "Q8_0", "BF16", "F16", "F32")
_MOST_ROWS_TOGETHER = 8


class RatesError(RuntimeError):
    """The kernels could not be measured: no compiler, a build that failed, a program that did not end."""


class KernelRates(msgspec.Struct, frozen=True, kw_only=True):
    """Of one core, on operands that its caches hold."""

    macs_per_us: dict[str, float]
    """By weight format, for many rows."""
    attention_macs_per_us: float
    prepared_per_us: float
    """Input values that a prologue norms and rounds."""
    row_group: int
    """As many rows as take at the full rate what one row takes alone."""


def measured_rates() -> KernelRates:
    """About six seconds of compiling and half a second of running. Raises RatesError."""
    source = resources.files("megakernel") / "probe_kernels.cpp"
    with tempfile.TemporaryDirectory(prefix="megakernel-rates-") as folder, resources.as_file(source) as file:
        program = Path(folder) / "rates"
        try:
            _build(file, program)
            ran = subprocess.run([program], check=True, capture_output=True, text=True, timeout=_RUN_S)  # noqa: S603 - our own program
            return rates_of(ran.stdout)
        except (BuildError, OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
            raise RatesError(str(error) or type(error).__name__) from error


def _build(source: Path, program: Path) -> None:
    """With all flags of a library but that which makes it one."""
    flags = [flag for flag in library_flags() if flag != "-shared"]
    give_up_s = time.monotonic() + _BUILD_S

    def check_time(_what: str, _fraction: float) -> None:
        if time.monotonic() > give_up_s:
            raise BuildError(f"building the kernels' probe took longer than {_BUILD_S:.0f} s")

    command = [
        find_compiler().path,
        *flags,
        f"-I{INCLUDE_FOLDER}",
        os.fspath(source),
        "-o",
        os.fspath(program),
    ]
    run_compiler(command, _USUAL_BUILD_S, check_time)


def rates_of(text: str) -> KernelRates:
    """From what the program prints. Raises ValueError, KeyError."""
    lines = (line.split() for line in text.splitlines())
    figures = {name: float(f"{float(figure):.3g}") for name, figure in lines}
    if not all(0 < figure < math.inf for figure in figures.values()):
        raise ValueError(f"not possible rates: {text!r}")
    alone = statistics.median(figures[name] / figures[f"{name}/one"] for name in _FORMATS)
    return KernelRates(
        macs_per_us={name: figures[name] for name in _FORMATS},
        attention_macs_per_us=figures["attention"],
        prepared_per_us=figures["prepared"],
        row_group=min(max(1, round(alone)), _MOST_ROWS_TOGETHER),
    )


def _usual(
    q4_0: float, q4_1: float, q8_0: float, half: float, single: float, attention: float, prepared: float
) -> KernelRates:
    rates = dict(zip(_FORMATS, (q4_0, q4_1, q8_0, half, half, single), strict=True))
    return KernelRates(
        macs_per_us=rates, attention_macs_per_us=attention, prepared_per_us=prepared, row_group=2
    )


_USUAL = {
    "avx512_vnni": _usual(180e3, 165e3, 180e3, 59e3, 59e3, 46e3, 2800.0),
    "avx512": _usual(100e3, 100e3, 64e3, 44e3, 42e3, 46e3, 2800.0),
    "avx2": _usual(85e3, 85e3, 63e3, 44e3, 25e3, 38e3, 2500.0),
}
"""Measured on one core of an AMD EPYC of the fourth generation, with what each lacks left out."""
_USUAL_SCALAR = msgspec.structs.replace(
    _usual(2400.0, 2000.0, 2500.0, 400.0, 400.0, 2600.0, 1200.0), row_group=1
)


def usual_rates(vector_units: tuple[str, ...]) -> KernelRates:
    """Of the best of these units."""
    return next((_USUAL[unit] for unit in _USUAL if unit in vector_units), _USUAL_SCALAR)
