"""Decode steps and prompts of the compiled megakernel beside other engines: one run, interleaved rounds.

`python benchmarks/decode.py [--quick] [--json FILE] [--model FILE.gguf] [--threads N]`. Peers are llama.cpp,
OpenVINO GenAI and transformers, as far as they are installed; all take the same GGUF's values and as many
threads. Steps are greedy, without speculation, over a context that is there already. Sampling is left out
for ours, llama.cpp and transformers; OpenVINO's own clock includes its argmax. Sequences of a batch share
their context's KV in ours and in llama.cpp. The longest context is one short of what the model takes.

A figure is the median over rounds, a ratio the median of the rounds' ratios; its spread is printed.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "kernels"))

from benchmarks import host_time
from benchmarks.decode_ours import Cell, OurDecode, OurModel, OurPrefill
from benchmarks.decode_peers import LlamaCpp, OpenVino, Transformers, open_if_installed
from benchmarks.harness import parser, write_figures
from megakernel.model.gguf import GgufWeights
from megakernel.model.load import PACKAGED_MODEL
from megakernel.probe import measure_memory

CONTEXTS, CONTEXTS_QUICK = (64, 512, 2048, 8192), (64, 512, 2048)
BATCHES, BATCHES_QUICK = (1, 4, 16), (1,)
OTHER_PEERS_CONTEXTS, OTHER_PEERS_CONTEXTS_QUICK = (64, 512), (64,)
"""Of OpenVINO and transformers, at batch 1."""
ROWS, ROWS_CONTEXT = (1, 8, 16), 512
PROMPT_TOKENS = 512
ROUNDS, ROUNDS_QUICK = 9, 5
STEPS, STEPS_QUICK = 24, 12
FEWEST_STEPS = 3
ROUND_S = 0.6
"""A round of steps that take this long is not made longer, whatever STEPS says."""
WARM_UP_STEPS = 2
SETTLE_S = 0.05
"""Between two engines, so that neither's idle threads still spin."""

MeanMs = Callable[[Cell, int], float]
"""(cell, most steps) -> milliseconds a step."""
Rounds = dict[str, list[float]]
"""Milliseconds by whose and round."""


def stepping(step: Callable[[Cell], None]) -> MeanMs:
    def mean_ms(cell: Cell, steps: int) -> float:
        for _ in range(WARM_UP_STEPS):
            step(cell)
        started_s = time.perf_counter()
        done = 0
        while done < FEWEST_STEPS or (done < steps and time.perf_counter() - started_s < ROUND_S):
            step(cell)
            done += 1
        return (time.perf_counter() - started_s) * 1e3 / done

    return mean_ms


class Figures:
    """Collects medians and ratios, and shows each as it comes."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def put(self, name: str, value: float, note: str = "") -> None:
        self.values[name] = value
        print(f"  {name:32} {value:9.4g}  {note}", flush=True)

    def ratio(self, name: str, others: list[float], ours: list[float]) -> None:
        ratios = [other / own for other, own in zip(others, ours, strict=True)]
        self.put(name, statistics.median(ratios), f"({min(ratios):.3g} to {max(ratios):.3g})")


class Comparison:
    def __init__(self, model: str, threads: int, is_quick: bool) -> None:
        self.is_quick = is_quick
        self.rounds, self.steps = (ROUNDS_QUICK, STEPS_QUICK) if is_quick else (ROUNDS, STEPS)
        self.threads = threads
        self.model = OurModel(model, threads)
        assert isinstance(self.model.weights, GgufWeights), "llama.cpp reads GGUF files only"
        self.most = self.model.weights.shape.max_context_tokens - 1
        self.batches = BATCHES_QUICK if is_quick else BATCHES
        self.contexts = [self.fitting(context) for context in (CONTEXTS_QUICK if is_quick else CONTEXTS)]
        self.decode = OurDecode(self.model, max(self.contexts), max(*ROWS, *self.batches))
        path, tokens = self.model.weights.path, self.decode.tokens
        self.llama = open_if_installed(
            "llama.cpp", LlamaCpp, path, threads, max(self.contexts), max(self.batches), tokens
        )
        self.openvino = open_if_installed("OpenVINO", OpenVino, path, threads, tokens)
        self.transformers = open_if_installed(
            "transformers", Transformers, self.model.weights, threads, tokens, "float32"
        )
        self.figures = Figures()

    def fitting(self, context: int) -> int:
        """Rotary positions end where the model's context does, and the step itself needs one."""
        return min(context, self.most)

    def run(self) -> dict[str, float]:
        self.measure_prompts()
        for cell in self.cells():
            self.measure_cell(cell)
        self.measure_rows()
        self.measure_bandwidth()
        self.decode.close()
        if self.llama is not None:
            self.llama.close()
        return self.figures.values

    def measure_rows(self) -> None:
        """What more rows cost, in turn with one row."""
        print(f"rows beside one row, context {ROWS_CONTEXT}", flush=True)
        self.decode.prepare(Cell(max(ROWS), ROWS_CONTEXT))
        ours = stepping(self.decode.step)
        times: dict[int, list[float]] = {rows: [] for rows in ROWS}
        for _ in range(self.rounds):
            for rows, values in times.items():
                values.append(ours(Cell(rows, ROWS_CONTEXT), self.steps))
        for rows in ROWS[1:]:
            self.figures.ratio(f"rows{rows}_over_rows1", times[rows], times[1])

    def measure_bandwidth(self) -> None:
        """Reads of all threads and steps in turn: what memory gives changes from one second to the next."""
        cell = Cell(1, self.contexts[0])
        print(f"read bandwidth, beside rows 1, context {cell.context}", flush=True)
        self.decode.prepare(cell)
        ours = stepping(self.decode.step)
        reads: list[float] = []
        shares: list[float] = []
        for _ in range(self.rounds):
            reads.append(measure_memory(self.threads).bandwidth_gb_s)
            gb_s = self.model.streamed_bytes() / (ours(cell, self.steps) * 1e6)
            shares.append(gb_s / reads[-1])
        self.figures.put("read_bandwidth_gb_s", statistics.median(reads))
        spread = f"({min(shares):.3g} to {max(shares):.3g})"
        self.figures.put("bandwidth_fraction_b1_c64", statistics.median(shares), spread)

    def cells(self) -> list[Cell]:
        """Ascending by context: a peer's context only grows."""
        cells = [Cell(rows, context) for rows in self.batches for context in self.contexts]
        return sorted(cells, key=lambda cell: (cell.context, cell.rows))

    def measure_cell(self, cell: Cell) -> Rounds:
        print(f"batch {cell.rows}, context {cell.context}", flush=True)
        self.decode.prepare(cell)
        runners: dict[str, MeanMs] = {"ours": stepping(self.decode.step), **self.peers(cell)}
        times: Rounds = {name: [] for name in runners}
        for _ in range(self.rounds):
            for name, mean_ms in runners.items():
                time.sleep(SETTLE_S)
                times[name].append(mean_ms(cell, self.steps))
        label = f"b{cell.rows}_c{'8192' if cell.context == self.most else cell.context}"
        for name, values in times.items():
            self.figures.put(f"{name}_ms_{label}", statistics.median(values))
            if name != "ours":
                self.figures.ratio(f"vs_{name}_{label}", values, times["ours"])
        return times

    def peers(self, cell: Cell) -> dict[str, MeanMs]:
        found: dict[str, MeanMs] = {}
        if self.llama is not None:
            self.llama.prepare(cell)
            found["llamacpp"] = stepping(self.llama.step)
        others = OTHER_PEERS_CONTEXTS_QUICK if self.is_quick else OTHER_PEERS_CONTEXTS
        if cell.rows == 1 and cell.context in others:
            if self.openvino is not None:
                found["openvino"] = self.openvino.mean_ms
            if self.transformers is not None:
                self.transformers.prepare(cell)
                found["transformers"] = stepping(self.transformers.step)
        return found

    def measure_prompts(self) -> None:
        """A prompt of 512 tokens, a new one each round, into an empty cache."""
        print(f"prompts of {PROMPT_TOKENS} tokens", flush=True)
        ours = OurPrefill(self.model, PROMPT_TOKENS)
        runners: dict[str, Callable[[np.ndarray], None]] = {"ours": ours.prompt}
        if self.llama is not None:
            runners["llamacpp"] = self.llama.prompt
        times: Rounds = {name: [] for name in runners}
        rng = np.random.default_rng(1)
        for round_number in range(self.rounds + 1):
            tokens = rng.integers(0, self.model.weights.shape.vocab_size, PROMPT_TOKENS).astype(np.int32)
            for name, prompt in runners.items():
                time.sleep(SETTLE_S)
                started_s = time.perf_counter()
                prompt(tokens)
                if round_number > 0:  # the first warms up
                    times[name].append((time.perf_counter() - started_s) * 1e3)
        ours.close()
        for name, values in times.items():
            self.figures.put(f"{name}_prefill512_tokens_s", PROMPT_TOKENS / statistics.median(values) * 1e3)
        if "llamacpp" in times:
            self.figures.ratio("prefill512_vs_llamacpp", times["llamacpp"], times["ours"])


def peak_memory(model: str, threads: int) -> dict[str, float]:
    """Of a process that does nothing but decode: see peak_memory.py."""
    script = Path(__file__).with_name("peak_memory.py")
    command = [sys.executable, str(script), "--model", model, "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    report: dict[str, float] = json.loads(done.stdout)
    return report


def show(title: str, figures: Iterable[tuple[str, float]], into: Figures) -> None:
    print(title, flush=True)
    for name, value in figures:
        into.put(name, value)


def main() -> int:
    options = parser("Decode steps and prompts of the compiled megakernel beside other engines.")
    options.add_argument("--model", default=PACKAGED_MODEL, help="a GGUF file or the packaged model's name")
    options.add_argument("--threads", type=int, default=2)
    arguments = options.parse_args()
    comparison = Comparison(arguments.model, arguments.threads, arguments.quick)
    comparison.run()
    figures = comparison.figures
    show("peak memory", peak_memory(arguments.model, arguments.threads).items(), figures)
    show("host time a step", host_time.measured(arguments.quick).items(), figures)
    write_figures(arguments.json, figures.values, runs=comparison.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
