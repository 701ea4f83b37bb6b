"""What every benchmark shares: options, the machine's description, and the figures file."""

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path


def parser(description: str) -> argparse.ArgumentParser:
    """The options every benchmark takes; a benchmark adds its own."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--quick", action="store_true", help="under a minute, wider spread")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return options


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def machine() -> dict[str, str | int]:
    """What the figures were measured on; figures of two machines are never compared."""
    flags = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), ""
    ).split()
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "vector_units": " ".join(
            flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni") if flag in flags
        ),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "ray": metadata.version("ray"),
    }


def percentile(values: Sequence[float], fraction: float) -> float:
    """Nearest-rank percentile; `fraction` in (0, 1]."""
    ordered = sorted(values)
    rank = max(0, min(len(ordered) - 1, round(fraction * len(ordered) + 0.5) - 1))
    return ordered[rank]


def write_figures(
    path: Path | None,
    figures: Mapping[str, float],
    runs: int,
    described: Mapping[str, str | int | float] | None = None,
) -> None:
    """`described`: the machine, where it is another than this CPU."""
    if path is None:
        return
    report = {"figures": dict(figures), "machine": described or machine(), "runs": runs}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
