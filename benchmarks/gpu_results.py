"""Figures of decode runs on a GPU as Markdown: `python benchmarks/gpu_results.py FIGURES.json... > TABLE.md`.

Takes what `gpu_decode.py --json` wrote, of one run or of several parts of one, on one kind of GPU. Where
several files have a figure, the last one's is shown.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

RATIOS = (("compiled", "BF16"), ("compiled", "Q4_0"), ("int4", "Q4_0"))
"""A peer's time over that of a format of ours, measured in the same rounds."""
PEERS = ("eager", "compiled", "reduce_overhead", "int4")
_CELL = r"(?P<shape>.+)_batch(?P<batch>\d+)_ctx(?P<context>\d+)"
_TIME = re.compile(rf"(?P<engine>.+)_ms_{_CELL}")
_ALIKE = ("gpu", "sms")
"""Of the machine, what figures in one table must share."""
_TITLES = {
    "gpu": "GPU",
    "sms": "SMs",
    "memory_gib": "memory, GiB",
    "max_clock_mhz": "highest SM clock, MHz",
    "driver": "driver",
    "cuda": "CUDA of PyTorch",
    "torch": "PyTorch",
    "nvcc": "nvcc",
    "copy_gb_s": "copy, GB/s",
    "read_gb_s": "read, GB/s",
    "date": "date",
    "runs": "rounds",
}


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """A file that `harness.write_figures` wrote."""

    figures: dict[str, float]
    machine: dict[str, str | int | float] = {}
    runs: int = 0


class ResultsError(ValueError):
    """Files that make no table; the message says which, and why."""


Row = tuple[int, int]
"""Batch and context."""


def read_figures(path: Path) -> Figures:
    """Raises ResultsError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Figures)
    except (OSError, msgspec.DecodeError) as error:
        raise ResultsError(f"{path}: {error}") from error


def markdown(files: Sequence[Figures]) -> str:
    """Raises ResultsError for files of different GPUs, or without a figure of decode."""
    for name in _ALIKE:
        kinds = sorted({str(file.machine.get(name, "unknown")) for file in files})
        if len(kinds) > 1:
            raise ResultsError(f"figures of different machines: {name} is {', '.join(kinds)}")
    figures = {name: value for file in files for name, value in file.figures.items()}
    parsed = [found for name in figures if (found := _TIME.fullmatch(name))]
    if not parsed:
        raise ResultsError("there is no figure of decode in these files")
    engines = list(dict.fromkeys(found["engine"] for found in parsed))
    formats = [name.removeprefix("ours_") for name in engines if name.startswith("ours_")]
    lines = [
        "<!-- Written by benchmarks/gpu_results.py from figures of benchmarks/gpu_decode.py. -->",
        "",
        *_machine_lines(files),
    ]
    for shape in dict.fromkeys(found["shape"] for found in parsed):
        rows = sorted(
            {(int(found["batch"]), int(found["context"])) for found in parsed if found["shape"] == shape}
        )
        lines += ["", f"## {shape}", "", *_shape_lines(figures, shape, rows, formats)]
    return "\n".join(lines) + "\n"


def _machine_lines(files: Sequence[Figures]) -> list[str]:
    described: dict[str, list[str]] = {}
    for file in files:
        for name, value in {**file.machine, "runs": file.runs}.items():
            if name in _TITLES and str(value) not in described.setdefault(name, []):
                described[name].append(str(value))
    lines = ["| run | |", "|---|---|"]
    for name, title in _TITLES.items():
        if name in described:
            lines.append(_row([title, "; ".join(described[name])]))
    return [
        *lines,
        "",
        "Milliseconds a decode step, the median of all rounds. In brackets the share of the bound: the time",
        "that reading weights and KV takes at the best bandwidth that a copy or a sum reached in the same",
        "run. A ratio is a peer's time over ours, the median of the rounds' ratios.",
    ]


def _shape_lines(
    figures: Mapping[str, float], shape: str, rows: Iterable[Row], formats: Sequence[str]
) -> list[str]:
    cells = {row: f"{shape}_batch{row[0]}_ctx{row[1]}" for row in rows}
    peers = [peer for peer in PEERS if any(f"{peer}_ms_{cell}" in figures for cell in cells.values())]
    shown = [one for one in formats if any(f"ours_{one}_ms_{cell}" in figures for cell in cells.values())]
    ratios = [
        (peer, format)
        for peer, format in RATIOS
        if any(f"{peer}_over_ours_{format}_{cell}" in figures for cell in cells.values())
    ]
    heads = ["batch", "context", *(f"ours {one}" for one in shown), *peers]
    heads += [f"{peer} / {format}" for peer, format in ratios]
    lines = [_row(heads), "|" + "---:|" * len(heads)]
    for (batch, context), cell in cells.items():
        values = [str(batch), str(context)]
        values += [_ours(figures, one, cell) for one in shown]
        values += [_number(figures.get(f"{peer}_ms_{cell}"), ".3f") for peer in peers]
        values += [
            _number(figures.get(f"{peer}_over_ours_{format}_{cell}"), ".2f") for peer, format in ratios
        ]
        lines.append(_row(values))
    return lines


def _ours(figures: Mapping[str, float], format: str, cell: str) -> str:
    shown = _number(figures.get(f"ours_{format}_ms_{cell}"), ".3f")
    share = figures.get(f"share_of_bound_{format}_{cell}")
    return shown if share is None else f"{shown} ({share:.0%})"


def _number(value: float | None, shape: str) -> str:
    return "-" if value is None else format(value, shape)


def _row(values: Iterable[str]) -> str:
    return "| " + " | ".join(values) + " |"


def main() -> int:
    options = argparse.ArgumentParser(description="figures of decode runs on a GPU as Markdown")
    options.add_argument("files", nargs="+", type=Path, metavar="FIGURES.json")
    chosen = options.parse_args()
    try:
        print(markdown([read_figures(path) for path in chosen.files]), end="")
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
