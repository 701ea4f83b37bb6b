"""The results file of a hardware run: what is in it has been done, so that a second run goes on from
there."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from megakernel.user_cache import write_atomically
from tests.hardware.part import PartResult


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """`figures`, `machine` and `runs` are what other benchmarks' files have, of all parts together."""

    machine: dict[str, str | int] = {}
    parts: dict[str, PartResult] = {}
    figures: dict[str, float] = {}
    runs: int = 0

    def with_part(self, name: str, result: PartResult) -> "Results":
        parts = {**self.parts, name: result}
        figures = {
            f"{part}.{figure}": value
            for part, done in parts.items()
            for figure, value in done.figures.items()
        }
        return msgspec.structs.replace(self, parts=parts, figures=figures, runs=self.runs + 1)


def read_results(path: Path, machine: dict[str, str | int]) -> Results:
    """Empty where there are none, or only another machine's. Raises ValueError for a file that is none."""
    if not path.exists():
        return Results(machine=machine)
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Results)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} holds no results of a hardware run: {error}") from error
    return found if found.machine == machine else Results(machine=machine)


def write_results(path: Path, results: Results) -> None:
    write_atomically(path, msgspec.json.format(msgspec.json.encode(results), indent=2) + b"\n")


def parts_to_run(every: Sequence[str], asked: Sequence[str], results: Results) -> list[str]:
    """In the order of `every`: those asked for, or else those that are missing or have not passed. Raises
    ValueError for one that there is not."""
    if unknown := sorted(set(asked) - set(every)):
        raise ValueError(f"no part is called {', '.join(unknown)}; there are {', '.join(every)}")
    if asked:
        return [name for name in every if name in asked]
    return [name for name in every if name not in results.parts or not results.parts[name].has_passed]
