"""Decode steps of the compiled megakernel beside llama.cpp's: one run, interleaved rounds, the same GGUF.

`python benchmarks/decode.py [--quick] [--json FILE] [--model FILE.gguf] [--threads N]`. Without
llama-cpp-python the ratios to it are left out. Both run greedy steps without speculation over a context that
is there already; sampling is not timed. Sequences of a batch share their context's KV in both. The figure
of a cell is the median over rounds; a round times the two one after the other.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "kernels"))

from benchmarks.harness import parser, write_figures
from decode_workers.megakernel_executor import MegaKernelExecutor
from decode_workers.step_batch import NO_PARENT, StepBatch
from megakernel.artifact_cache import ArtifactCache
from megakernel.buckets import BUCKETS
from megakernel.machine import load_machine
from megakernel.model.gguf import GgufWeights
from megakernel.model.load import PACKAGED_MODEL, open_model
from megakernel.probe import measure_memory
from megakernel.recipe import recipe_for

BLOCK_TOKENS = 32
CONTEXTS, CONTEXTS_QUICK = (64, 512, 2048, 8192), (64, 512, 2048)
BATCHES, BATCHES_QUICK = (1, 4, 16), (1,)
ROWS_CONTEXT = 512
ROUNDS, ROUNDS_QUICK = 7, 5
STEPS, STEPS_QUICK = 24, 12
WARM_UP_STEPS = 3
SETTLE_S = 0.05
"""Between the two, so that neither's idle threads still spin."""


class Cell(NamedTuple):
    """Rows of one step, each of a sequence of its own, after `context` tokens."""

    rows: int
    context: int


Step = Callable[[Cell], None]


class Ours:
    def __init__(self, model: str, threads: int, max_context: int) -> None:
        opened = open_model(model)
        self.weights = opened.weights
        recipe = recipe_for(opened, load_machine("cpu"), threads, "float16")
        self.artifact = ArtifactCache().find_or_build(recipe, opened.weights).artifact
        self.context_blocks = -(-max_context // BLOCK_TOKENS)
        num_blocks = self.context_blocks + -(-BUCKETS[-1] // BLOCK_TOKENS)
        self.executor = MegaKernelExecutor(self.artifact.load(), opened.fingerprint, num_blocks, BLOCK_TOKENS)
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(0, opened.weights.shape.vocab_size, max_context).astype(np.int32)
        self._fill()

    def step(self, cell: Cell) -> None:
        self.executor.run(self._batch(cell))

    def streamed_bytes(self) -> int:
        """Of weights, read once a step, as the file stores them."""
        assert isinstance(self.weights, GgufWeights)
        skipped = set() if self.weights.shape.has_tied_head else {"embed"}
        tensors = [self.weights.raw(name) for name in self.weights.names - skipped]
        return sum(tensor.data.nbytes for tensor in tensors if len(tensor.shape) > 1)

    def _fill(self) -> None:
        """The whole context, as chains of rows."""
        table = np.arange(self.context_blocks, dtype=np.int32)[None, :]
        for start in range(0, len(self.tokens), BUCKETS[-1]):
            tokens = self.tokens[start : start + BUCKETS[-1]]
            at = np.arange(start, start + len(tokens), dtype=np.int32)
            self.executor.run(
                StepBatch(
                    token_ids=tokens,
                    positions=at,
                    slots=at,
                    parents=np.arange(-1, len(tokens) - 1, dtype=np.int32),
                    sequence_starts=np.array([0, len(tokens)], dtype=np.int32),
                    context_lengths=np.array([start], dtype=np.int32),
                    block_tables=table,
                    needs_logits=np.zeros(len(tokens), dtype=np.bool_),
                )
            )

    def _batch(self, cell: Cell) -> StepBatch:
        rows = cell.rows
        table = np.arange(self.context_blocks, dtype=np.int32)
        first_slot = self.context_blocks * BLOCK_TOKENS
        return StepBatch(
            token_ids=self.tokens[:rows],
            positions=np.full(rows, cell.context, dtype=np.int32),
            slots=np.arange(first_slot, first_slot + rows, dtype=np.int32),
            parents=np.full(rows, NO_PARENT, dtype=np.int32),
            sequence_starts=np.arange(rows + 1, dtype=np.int32),
            context_lengths=np.full(rows, cell.context, dtype=np.int32),
            block_tables=np.tile(table, (rows, 1)),
            needs_logits=np.ones(rows, dtype=np.bool_),
        )


class LlamaCpp:
    """llama.cpp's decode call, with as little of Python around it as there can be."""

    def __init__(self, model: Path, threads: int, max_context: int, max_rows: int, tokens: Any) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)  # kept: C calls it until the end
        llama_cpp.llama_log_set(self.quiet, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(model).encode(), llama_cpp.llama_model_default_params()
        )
        assert self.model, f"llama.cpp cannot load {model}"
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = max_context + 2 * max_rows + 64
        parameters.n_batch = parameters.n_ubatch = 512
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.n_seq_max = max_rows
        parameters.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        assert self.context, "llama.cpp makes no context"
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(512, 0, max_rows)
        self.tokens = tokens
        self.max_rows = max_rows
        self.filled = 0

    def prepare(self, cell: Cell) -> None:
        """The first `cell.context` tokens in every sequence; contexts only grow."""
        assert cell.context >= self.filled
        for start in range(self.filled, cell.context, 512):
            end = min(start + 512, cell.context)
            self._decode([(int(self.tokens[at]), at, 0) for at in range(start, end)], wants_logits=False)
        for sequence in range(1, self.max_rows):
            self.api.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)
        self.filled = cell.context

    def step(self, cell: Cell) -> None:
        self._decode(
            [(int(self.tokens[row]), cell.context, row) for row in range(cell.rows)], wants_logits=True
        )
        for row in range(cell.rows):
            self.api.llama_memory_seq_rm(self.memory, row, cell.context, -1)

    def close(self) -> None:
        self.api.llama_batch_free(self.batch)
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)

    def _decode(self, entries: list[tuple[int, int, int]], wants_logits: bool) -> None:
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wants_logits
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = self.api.llama_decode(self.context, batch)
        assert status == 0, f"llama_decode says {status}"
        self.api.llama_synchronize(self.context)


@contextmanager
def llama_cpp_if_there(*arguments: Any) -> Iterator[LlamaCpp | None]:
    try:
        theirs = LlamaCpp(*arguments)
    except ImportError:
        print("llama-cpp-python is not installed (pip install 'headrace[bench]'): ours alone is measured")
        yield None
        return
    try:
        yield theirs
    finally:
        theirs.close()


def mean_ms(step: Step, cell: Cell, steps: int) -> float:
    """Of steps in a row, after a few that warm up."""
    time.sleep(SETTLE_S)
    for _ in range(WARM_UP_STEPS):
        step(cell)
    started = time.perf_counter()
    for _ in range(steps):
        step(cell)
    return (time.perf_counter() - started) * 1e3 / steps


Medians = dict[tuple[str, Cell], float]
"""Milliseconds a step, by whose and which."""


def measure(
    ours: Ours, theirs: LlamaCpp | None, cells: list[Cell], compared: set[Cell], quick: bool
) -> Medians:
    rounds, steps = (ROUNDS_QUICK, STEPS_QUICK) if quick else (ROUNDS, STEPS)
    medians: Medians = {}
    for cell in cells:
        runners: dict[str, Step] = {"ours": ours.step}
        if theirs is not None and cell in compared:
            theirs.prepare(cell)
            runners["llamacpp"] = theirs.step
        times: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(rounds):
            for name, step in runners.items():
                times[name].append(mean_ms(step, cell, steps))
        for name, values in times.items():
            medians[name, cell] = statistics.median(values)
        shown = ", ".join(f"{name} {medians[name, cell]:.3f} ms" for name in times)
        print(f"rows {cell.rows:2}, context {cell.context:5}: {shown}", flush=True)
    return medians


def figures_of(medians: Medians, ours: Ours, bandwidth_gb_s: float) -> dict[str, float]:
    figures: dict[str, float] = {}
    for (name, cell), ms in medians.items():
        at = f"b{cell.rows}_c{cell.context}"
        figures[f"{name}_ms_{at}"] = ms
        if name == "llamacpp":
            figures[f"vs_llamacpp_{at}"] = ms / medians["ours", cell]
    first = medians["ours", Cell(1, 64)]
    figures["read_bandwidth_gb_s"] = bandwidth_gb_s
    figures["bandwidth_fraction_b1_c64"] = ours.streamed_bytes() / (first * 1e6) / bandwidth_gb_s
    one = medians["ours", Cell(1, ROWS_CONTEXT)]
    for rows in (8, 16):
        figures[f"rows{rows}_over_rows1"] = medians["ours", Cell(rows, ROWS_CONTEXT)] / one
    return figures


def main() -> int:
    options = parser("Decode steps of the compiled megakernel beside llama.cpp's, on the same GGUF.")
    options.add_argument("--model", default=PACKAGED_MODEL, help="a GGUF file or the packaged model's name")
    options.add_argument("--threads", type=int, default=2)
    arguments = options.parse_args()

    contexts = CONTEXTS_QUICK if arguments.quick else CONTEXTS
    batches = BATCHES_QUICK if arguments.quick else BATCHES
    # Rotary positions end where the model's context does: the step itself needs one.
    most = open_model(arguments.model).weights.shape.max_context_tokens - 1
    compared = {Cell(rows, min(context, most)) for rows in batches for context in contexts}
    cells = compared | {Cell(rows, ROWS_CONTEXT) for rows in (1, 8, 16)}
    ordered = sorted(cells, key=lambda cell: (cell.context, cell.rows))

    ours = Ours(arguments.model, arguments.threads, ordered[-1].context)
    assert isinstance(ours.weights, GgufWeights), "llama.cpp reads GGUF files only"
    before = measure_memory(arguments.threads).bandwidth_gb_s
    largest = max(batches)
    with llama_cpp_if_there(
        ours.weights.path, arguments.threads, ordered[-1].context, largest, ours.tokens
    ) as theirs:
        medians = measure(ours, theirs, ordered, compared, arguments.quick)
    after = measure_memory(arguments.threads).bandwidth_gb_s
    figures = figures_of(medians, ours, max(before, after))
    ours.executor.close()
    for name, value in figures.items():
        print(f"{name:28} {value:.4g}")
    write_figures(arguments.json, figures, runs=ROUNDS_QUICK if arguments.quick else ROUNDS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
