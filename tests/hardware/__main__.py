"""The hardware run: `python -m tests.hardware [--part NAME]... [--quick] [--results FILE] [--budget S]`.

Needs an NVIDIA GPU, nvcc, torch and cuda-bindings. Parts run one after the other, each in a process of its
own, so that none suffers from another's failed kernels; models for all are compiled meanwhile. Results are
written after each part, and a run goes on with the parts that are missing or have not passed; a part that is
asked for runs again.
"""

import argparse
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import cast

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "kernels"))

from benchmarks.gpu_builds import Builds
from benchmarks.gpu_machine import described
from megakernel.build import BuildError
from megakernel.cuda_device import CudaUnavailableError, DeviceFacts
from megakernel.cuda_driver import open_driver
from megakernel.gpu_machine import pick_machine
from megakernel.machine import Machine, MachineError
from megakernel.user_cache import cache_folder
from tests.hardware.part import Part, PartResult, Setting
from tests.hardware.results import Results, parts_to_run, read_results, write_results

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("toys", "correctness", "independence", "soak", "multi_step", "decode", "hang")
BUDGET_S, BUDGET_QUICK_S = 470.0, 200.0
SHARES = {
    "toys": 0.2,
    "correctness": 0.45,
    "independence": 0.3,
    "soak": 0.2,
    "multi_step": 0.2,
    "decode": 0.85,
    "hang": 1.0,
}
"""What a part may take of the time that those before it have left."""
_GRACE_S = 45.0
"""A part that has gone on for so long past its deadline hangs."""


def part_named(name: str) -> Part:
    return cast(Part, importlib.import_module(f"tests.hardware.{name}"))


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.hardware", description=__doc__.split("\n")[0])
    options.add_argument("--part", action="append", default=[], metavar="NAME", help=", ".join(PARTS))
    options.add_argument("--quick", action="store_true", help="fewer models and cells")
    options.add_argument("--results", type=Path, default=Path("hardware-results.json"), metavar="FILE")
    options.add_argument("--budget", type=float, metavar="SECONDS", help=f"{BUDGET_S:.0f} where not given")
    options.add_argument(
        "--search", type=float, default=0.0, metavar="SECONDS", help="of schedule search a program"
    )
    options.add_argument("--machine", metavar="FILE", help="a description of this GPU")
    options.add_argument("--folder", type=Path, default=cache_folder() / "gpu-models", help=argparse.SUPPRESS)
    options.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options.add_argument("--run-part", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.run_part:
        return run_part(chosen)
    try:
        facts = gpu_facts()
        machine = pick_machine(facts, chosen.machine)
        results = read_results(chosen.results, described(facts, machine))
        names = parts_to_run(PARTS, chosen.part, results)
    except (CudaUnavailableError, MachineError, BuildError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run_parts(names, results, machine, chosen)


def gpu_facts() -> DeviceFacts:
    """Raises CudaUnavailableError."""
    driver = open_driver()
    facts = driver.facts
    driver.close()
    return facts


def run_parts(names: list[str], results: Results, machine: Machine, chosen: argparse.Namespace) -> int:
    started_s = time.monotonic()
    end_s = started_s + (chosen.budget or (BUDGET_QUICK_S if chosen.quick else BUDGET_S))
    skipped = [name for name in PARTS if name in results.parts and name not in names]
    if skipped:
        print(f"done before: {', '.join(skipped)}")
    print(
        f"{results.machine.get('gpu')}, planned for {machine.name}: {', '.join(names) or 'nothing to do'}",
        flush=True,
    )
    wanted = [
        model
        for name in names
        for model in part_named(name).models(is_quick=chosen.quick, search_s=chosen.search)
    ]
    with Builds(wanted, machine, chosen.folder):
        for name in names:
            left_s = end_s - time.monotonic()
            deadline_s = time.monotonic() + max(0.0, left_s) * (1.0 if len(names) == 1 else SHARES[name])
            result = in_process(name, deadline_s, chosen)
            results = results.with_part(name, result)
            write_results(chosen.results, results)
            show(name, result)
    failed = [name for name in names if not results.parts[name].has_passed]
    print(
        f"{time.monotonic() - started_s:.0f} s; "
        + (f"not passed: {', '.join(failed)}" if failed else "all passed")
    )
    return 1 if failed else 0


def in_process(name: str, deadline_s: float, chosen: argparse.Namespace) -> PartResult:
    """A part that does not end well has not passed, whatever it has found by then."""
    print(f"== {name}", flush=True)
    started_s = time.monotonic()
    path = result_path(chosen.folder, name)
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.hardware", "--run-part", name, "--deadline", f"{deadline_s:.3f}"]
    command += [
        "--folder",
        str(chosen.folder),
        "--search",
        str(chosen.search),
        *(["--quick"] if chosen.quick else []),
    ]
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        limit_s = max(0.0, deadline_s - started_s) + _GRACE_S
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=limit_s, check=False)
        problems = () if done.returncode == 0 else (f"its process ended with status {done.returncode}",)
    except subprocess.TimeoutExpired:
        problems = ("it did not end in time",)
    seconds = round(time.monotonic() - started_s, 1)
    kept = (
        msgspec.json.decode(path.read_bytes(), type=PartResult)
        if path.exists()
        else PartResult(problems=() if problems else ("it left no result",))
    )
    return msgspec.structs.replace(kept, problems=kept.problems + problems, seconds=seconds)


def run_part(chosen: argparse.Namespace) -> int:
    """In the part's own process: its result goes to a file."""
    setting = Setting(
        folder=chosen.folder,
        deadline_s=chosen.deadline,
        result_path=result_path(chosen.folder, chosen.run_part),
        is_quick=chosen.quick,
        search_s=chosen.search,
    )
    setting.keep(part_named(chosen.run_part).run(setting))
    return 0


def result_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.result.json"


def show(name: str, result: PartResult) -> None:
    print(f"== {name}: {'passed' if result.has_passed else 'NOT PASSED'}, {result.seconds:.1f} s", flush=True)
    for what in result.left_out:
        print(f"  left out: {what}")
    for problem in result.problems:
        print(f"  problem: {problem}")


if __name__ == "__main__":
    sys.exit(main())
