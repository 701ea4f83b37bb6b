"""Decode steps of the compiled megakernel on an NVIDIA GPU beside PyTorch: one run, interleaved rounds.

`python benchmarks/gpu_decode.py [--quick] [--json FILE] [--search S] [--machine FILE] [--budget S]`, and
lists of what is measured (`gpu_cells.py`): `--shapes`, `--formats`, `--batches`, `--contexts`, `--peers`.
Weights are random; peers are in `gpu_peers.py`. A step is a batch of sequences of equal context, each with KV
of its own, greedy, its best tokens included; times are of the GPU's own clock. The bound is the bytes that a
step must read over the best bandwidth that a copy or a sum reached in this run. Figures of several runs are
put together by `gpu_results.py`.

A figure is the median over rounds, a ratio the median of the rounds' ratios; its spread is printed.
"""

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "kernels"))

import itertools

import msgspec
import torch

from benchmarks.gpu_bandwidth import BANDWIDTHS, measured_bandwidth
from benchmarks.gpu_builds import BuildMissingError, Builds, built
from benchmarks.gpu_cells import Selection, add_options, selection_of
from benchmarks.gpu_machine import described_run
from benchmarks.gpu_memory import opened
from benchmarks.gpu_models import GpuModel
from benchmarks.gpu_peers import Kind, Peer, PeerWeights, allow_recompiling
from benchmarks.gpu_steps import Pool, chain, groups_of, num_blocks_of, rows_of
from benchmarks.gpu_table import Cell, Line, table
from benchmarks.harness import parser, write_figures
from megakernel.cuda_compiled import CompiledCuda
from megakernel.cuda_device import CudaError
from megakernel.cuda_driver import open_driver
from megakernel.cuda_runtime import CudaRuntime
from megakernel.gpu_machine import pick_machine
from megakernel.shapes import SHAPES
from megakernel.step import Rows
from megakernel.user_cache import cache_folder

ROUNDS, ROUNDS_QUICK = 7, 5
STEPS, STEPS_QUICK = 30, 20
WARM_UP_STEPS = 3
BUDGET_S, BUDGET_QUICK_S = 240.0, 55.0
COMPILE_S, WHOLE_S = 30.0, 80.0
"""What compiling a peer is thought to take before one has; a whole step always."""

StepTimes = Callable[[int], list[float]]
"""(steps) -> milliseconds of each."""


class GpuDecode:
    """Measures cell after cell until all are done or the deadline is near."""

    def __init__(
        self,
        compiled_of: Callable[[GpuModel], CompiledCuda],
        deadline_s: float,
        selection: Selection,
        *,
        is_quick: bool,
        search_s: float,
    ) -> None:
        """`deadline_s` of `time.monotonic()`; `compiled_of` may raise BuildMissingError. `is_quick`: fewer
        rounds."""
        allow_recompiling()
        self.compiled_of, self.deadline_s = compiled_of, deadline_s
        self.selection, self.search_s = selection, search_s
        self.rounds, self.steps = (ROUNDS_QUICK, STEPS_QUICK) if is_quick else (ROUNDS, STEPS)
        self.weights: dict[tuple[str, bool], PeerWeights] = {}
        """By shape and whether they are int4; of one shape at a time."""
        self.compile_s: dict[Kind, float] = {}
        self.figures: dict[str, float] = {}
        self.lines: list[Line] = []
        self.left_out: list[str] = []
        self.bandwidth_gb_s = 0.0

    def run(self, on_cell: Callable[[], None] = lambda: None) -> None:
        """`on_cell`: called after each cell."""
        self.measure_bandwidth()
        for cells in self.selection.groups():
            if self.left_s < 2.0:
                self.leave_out(f"{cells[0].shape}, batch {cells[0].batch}: no time left")
                continue
            with self.ours(cells) as runtimes:
                for cell in cells:
                    self.measure_cell(cell, runtimes, self.selection.peers_everywhere)
                    on_cell()
        whole = self.selection.whole_cell
        if whole is not None and self.left_s > WHOLE_S:
            with self.ours([whole]) as runtimes:
                self.measure_cell(whole, runtimes, ("reduce_overhead",))
        self.measure_bandwidth()
        on_cell()

    @property
    def left_s(self) -> float:
        return self.deadline_s - time.monotonic()

    def leave_out(self, what: str) -> None:
        self.left_out.append(what)
        print(f"  left out: {what}", flush=True)

    def measure_bandwidth(self) -> None:
        """Before and after: the best of both is the bound."""
        found = measured_bandwidth()
        print(
            "bandwidth: " + ", ".join(f"{name} {value:.0f} GB/s" for name, value in found.items()), flush=True
        )
        for name, value in found.items():
            self.figures[name] = max(value, self.figures.get(name, 0.0))
        self.bandwidth_gb_s = max(self.bandwidth_gb_s, *found.values())
        self.note_shares()

    def note_shares(self) -> None:
        for line in self.lines:
            share = line.share_of_bound(self.bandwidth_gb_s)
            self.figures[f"share_of_bound_{line.format}_{line.cell.name}"] = share

    def table(self) -> str:
        return table(self.lines, self.bandwidth_gb_s)

    @contextlib.contextmanager
    def ours(self, cells: Sequence[Cell]) -> Iterator[dict[str, CudaRuntime]]:
        """Of cells of one shape and batch: by format, those that were compiled in time and fit."""
        shape, batch = cells[0].shape, cells[0].batch
        num_blocks = batch * num_blocks_of(max(cell.context for cell in cells))
        for known in [known for known in self.weights if known[0] != shape]:
            del self.weights[known]
        free_torch_memory()
        with contextlib.ExitStack() as stack:
            runtimes: dict[str, CudaRuntime] = {}
            for format in self.selection.formats:
                model = self.selection.model(shape, format, batch, self.search_s)
                try:
                    compiled = self.compiled_of(model)
                    runtimes[format] = stack.enter_context(opened(compiled, num_blocks))
                except (BuildMissingError, CudaError) as error:
                    self.leave_out(f"{model.name}: {error}")
            yield runtimes

    def measure_cell(self, cell: Cell, runtimes: dict[str, CudaRuntime], peers: Sequence[Kind]) -> None:
        if self.left_s < 1.0:
            self.leave_out(f"{cell.name}: no time left")
            return
        print(cell.name, flush=True)
        free_torch_memory()
        timed: dict[str, StepTimes] = {}
        for format, runtime in runtimes.items():
            timed[f"ours_{format}"] = launches(runtime, decode_rows(runtime, cell))
        for kind in peers:
            if (peer := self.peer(kind, cell)) is not None:
                timed[kind] = replays(peer)
        rounds = self.interleaved(timed)
        self.report(cell, runtimes, rounds)
        self.note_shares()

    def peer(self, kind: Kind, cell: Cell) -> Peer | None:
        """None where it does not run here, or there is no time to compile it."""
        expected_s = 0.0 if kind == "eager" else self.compile_s.get(kind, COMPILE_S)
        if kind == "reduce_overhead":
            expected_s = WHOLE_S
        if self.left_s < expected_s + 5.0:
            self.leave_out(f"{cell.name}, {kind}: compiling it may take {expected_s:.0f} s")
            return None
        started_s = time.monotonic()
        is_int4 = kind == "int4"
        known = cell.shape, is_int4
        try:
            if known not in self.weights:
                self.weights[known] = PeerWeights(SHAPES[cell.shape], is_int4=is_int4)
            peer = Peer(kind, self.weights[known], cell.batch, cell.context)
        except Exception as error:
            first = str(error).strip().splitlines()[:1]
            self.leave_out(f"{cell.name}, {kind}: {type(error).__name__}: {' '.join(first)}")
            return None
        self.compile_s[kind] = time.monotonic() - started_s
        if kind != "eager":
            print(f"  {kind} is ready after {self.compile_s[kind]:.1f} s", flush=True)
        return peer

    def interleaved(self, timed: dict[str, StepTimes]) -> dict[str, list[float]]:
        """Medians by round."""
        rounds: dict[str, list[float]] = {name: [] for name in timed}
        for number in range(self.rounds + 1):
            for name in tuple(timed):
                try:
                    found = statistics.median(timed[name](self.steps))
                except Exception as error:
                    self.leave_out(f"{name}: {type(error).__name__}: {error}")
                    del timed[name], rounds[name]
                    continue
                if number:  # the first round warms up
                    rounds[name].append(found)
        return rounds

    def report(self, cell: Cell, runtimes: dict[str, CudaRuntime], rounds: dict[str, list[float]]) -> None:
        for name, values in rounds.items():
            self.figures.setdefault(f"{name}_ms_{cell.name}", statistics.median(values))
            print(
                f"  {name:16} {statistics.median(values):8.3f} ms  ({min(values):.3f} to {max(values):.3f})",
                flush=True,
            )
        for format, runtime in runtimes.items():
            own = rounds.get(f"ours_{format}")
            if not own:
                continue
            ratios = {}
            for name, values in rounds.items():
                if not name.startswith("ours_"):
                    each = [other / mine for other, mine in zip(values, own, strict=True)]
                    ratios[name] = (statistics.median(each), min(each), max(each))
                    self.figures[f"{name}_over_ours_{format}_{cell.name}"] = ratios[name][0]
            self.add_line(
                Line(
                    cell=cell,
                    format=format,
                    ms=statistics.median(own),
                    spread_ms=(min(own), max(own)),
                    num_bytes=step_bytes(runtime.compiled, cell),
                    ratios=ratios,
                )
            )

    def add_line(self, line: Line) -> None:
        """A cell that is measured again adds its peers to what there is."""
        for index, known in enumerate(self.lines):
            if (known.cell, known.format) == (line.cell, line.format):
                ratios = {**line.ratios, **known.ratios}
                self.lines[index] = msgspec.structs.replace(known, ratios=ratios)
                return
        self.lines.append(line)


def free_torch_memory() -> None:
    """Runtimes do not take theirs from torch, and a peer's caches and graphs are in a cycle with it."""
    gc.collect()
    torch.cuda.empty_cache()


def decode_rows(runtime: CudaRuntime, cell: Cell) -> Rows:
    parts = [(cell.context, chain(1))] * cell.batch
    groups = groups_of(parts, Pool(runtime.num_blocks), runtime.shape.vocab_size)
    return rows_of(groups, needs_logits=False, needs_best=True)


def step_bytes(compiled: CompiledCuda, cell: Cell) -> int:
    """That a step reads of weights and KV; a head that is tied to the embedding is read once, its rows are
    not counted again."""
    shape = compiled.shape
    kv_bytes = 2 * 2 * shape.num_kv_heads * shape.head_dim * shape.num_layers
    return compiled.layout.num_bytes + cell.batch * (cell.context + 1) * kv_bytes


def launches(runtime: CudaRuntime, rows: Rows) -> StepTimes:
    def times(steps: int) -> list[float]:
        return runtime.launch_ms(rows, WARM_UP_STEPS + steps)[WARM_UP_STEPS:]

    return times


def replays(peer: Peer) -> StepTimes:
    def times(steps: int) -> list[float]:
        for _ in range(WARM_UP_STEPS):
            peer.step()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for event in events[1:]:
            peer.step()
            event.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]

    return times


def main() -> None:
    options = parser("decode on an NVIDIA GPU, beside PyTorch")
    options.add_argument("--machine", metavar="FILE", help="a description of this GPU")
    options.add_argument(
        "--search", type=float, default=0.0, metavar="SECONDS", help="of schedule search a program"
    )
    options.add_argument(
        "--budget", type=float, metavar="SECONDS", help="for measuring, after all is compiled"
    )
    add_options(options)
    chosen = options.parse_args()
    selection = selection_of(chosen)
    driver = open_driver()
    facts = driver.facts
    driver.close()
    machine = pick_machine(facts, chosen.machine)
    folder = cache_folder() / "gpu-models"
    wanted = selection.models(chosen.search)
    print(f"compiling {len(wanted)} models for {facts.name}", flush=True)
    with Builds(wanted, machine, folder) as builds:
        builds.wait()
    budget_s = chosen.budget or (BUDGET_QUICK_S if chosen.quick else BUDGET_S)
    deadline_s = time.monotonic() + budget_s
    decode = GpuDecode(
        lambda model: built(folder, model, deadline_s).compiled,
        deadline_s,
        selection,
        is_quick=chosen.quick,
        search_s=chosen.search,
    )
    known = described_run(facts, machine, torch.version.cuda)

    def keep() -> None:
        """After every cell, so that a run that is ended early has told what it found."""
        told = {name: round(decode.figures[name], 1) for name in BANDWIDTHS if name in decode.figures}
        write_figures(chosen.json, decode.figures, decode.rounds, {**known, **told})

    decode.run(keep)
    print(decode.table())
    for what in decode.left_out:
        print(f"left out: {what}")


if __name__ == "__main__":
    main()
