"""Twenty items of a hundred thousand: token by token, verified at once, and beside transformers, in one run.

`python benchmarks/targeting.py [--quick] [--json FILE] [--threads N]`. The sample catalogue and briefs, the
packaged model, 20 beams, through the decode engine with the megakernel on this CPU. A brief's prompt is
cached when it is timed, but for the comparison with transformers, where each side computes it.

- `ptpv_vs_stepwise`: time without PTPV over time with it, brief by brief, the order turned each round.
- `ptpv_vs_stepwise_l20_predicted`: the same searches, on this CPU's logits, with steps that take what is
  predicted of an L20 (`python -m megakernel predict`) for this model.
- `vs_transformers`: constrained beam search of transformers on the same values in float32, prompt included.
- `restricted_vs_full_head`: what a step of 20 rows takes beside its layers with a head over all tokens, over
  what it does with one of the children of 20 nodes of the catalogue: see targeting_head.py.
- `trie_share_of_step`: bookkeeping of trie and beams over the time of steps; `..._1m` for a million items.
- `compile_1m_s`, `compile_1m_mb`: see catalogue_compile.py, which runs in a process of its own.

A figure is the median over briefs and rounds. `--quick` asks less, and compiles a million items once.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "kernels"))

from benchmarks.decode_ours import OurModel
from benchmarks.decode_peers import Transformers, open_if_installed
from benchmarks.harness import parser, write_figures
from benchmarks.targeting_head import head_times
from benchmarks.targeting_ours import OurTargeting, compiled
from cluster.catalogue.file import Catalogue
from cluster.catalogue.sample import sample_briefs, sample_jsonl
from cluster.catalogue.trie import ROOT
from cluster.placement.predict import StepTable, step_ms
from cluster.text import Tokenizer
from decode_workers.step_batch import Int32Array
from headrace.served_model import served_model
from megakernel.model.load import PACKAGED_MODEL

ITEMS, MILLION = 100_000, 1_000_000
BEAMS = 20
BRIEFS, BRIEFS_QUICK = 12, 4
ROUNDS, ROUNDS_QUICK = 5, 2
PEER_BRIEFS, PEER_BRIEFS_QUICK = 3, 1
HEAD_ROUNDS, HEAD_ROUNDS_QUICK = 60, 20
L20_MODEL, L20_BATCHES = "smollm2-135m", (1, 2, 4, 8, 16, 32, 64)
L20_CONTEXT = 64
SETTLE_S = 0.05


class Figures:
    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def put(self, name: str, value: float, note: str = "") -> None:
        self.values[name] = value
        print(f"  {name:36} {value:9.4g}  {note}", flush=True)

    def spread(self, name: str, values: list[float], note: str = "") -> None:
        self.put(name, statistics.median(values), f"({min(values):.3g} to {max(values):.3g}) {note}")


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    time.sleep(SETTLE_S)
    started_s = time.perf_counter()
    result = call()
    return (time.perf_counter() - started_s) * 1e3, result


class Comparison:
    def __init__(self, threads: int, is_quick: bool) -> None:
        self.is_quick, self.threads = is_quick, threads
        self.served = served_model(PACKAGED_MODEL)
        self.tokenizer = Tokenizer.of(self.served)
        self.model = OurModel(PACKAGED_MODEL, threads)
        self.ours = OurTargeting(self.model, self.served, self.tokenizer)
        self.catalogue = compiled(sample_jsonl(ITEMS), self.served, self.tokenizer)
        num_briefs = BRIEFS_QUICK if is_quick else BRIEFS
        self.prompts = [self.prompt(brief) for brief in sample_briefs(num_briefs, seed=1)]
        self.rounds = ROUNDS_QUICK if is_quick else ROUNDS
        self.figures = Figures()

    def prompt(self, brief: str) -> list[int]:
        text = f"<|im_start|>user\n{brief}<|im_end|>\n<|im_start|>assistant\n"
        return self.tokenizer.encode(text, allow_special=True)

    def run(self) -> None:
        table = " ".join(f"{cost.rows}:{cost.ms:.2f}" for cost in self.ours.costs)
        print(f"ms a step by rows: {table}", flush=True)
        self.measure_parallel()
        self.predict_l20()
        self.measure_head()
        self.measure_transformers()
        self.measure_million()

    def measure_parallel(self) -> None:
        """In turn, so that neither always comes after the other."""
        print(f"{BEAMS} beams over {ITEMS} items", flush=True)
        for scoring in ("vocabulary", "catalogue"):
            ratios, times, shares, steps = [], [], [], []
            for number in range(self.rounds + 1):
                for prompt in self.prompts:
                    both: dict[bool, float] = {}
                    for is_parallel in (number % 2 == 0, number % 2 == 1):
                        table = self.ours.table if is_parallel else None
                        both[is_parallel], result = timed(
                            lambda p=prompt, t=table, s=scoring: self.ours.ask(
                                p, self.catalogue, table=t, beams=BEAMS, scoring=s
                            )
                        )
                        if number and not is_parallel:
                            shares.append(self.ours.trie_s / self.ours.executor.run_s)
                            steps.append(result.num_steps)
                    if number:  # the first round fills the prefix cache
                        ratios.append(both[False] / both[True])
                        times.append(both[True])
            suffix = "" if scoring == "vocabulary" else "_catalogue"
            self.figures.spread(f"ptpv_vs_stepwise{suffix}", ratios)
            self.figures.spread(f"targeting_ms{suffix}", times)
            self.figures.spread(f"trie_share_of_step{suffix}", shares)
            self.figures.put(f"stepwise_steps{suffix}", statistics.median(steps))

    def predict_l20(self) -> None:
        l20 = self.l20_table()
        rows = ", ".join(f"{n}: {ms:.2f}" for n, ms in zip(l20.rows, l20.ms, strict=True))
        print(f"{L20_MODEL} on an L20, predicted ms by rows: {rows}", flush=True)
        ratios = []
        for prompt in self.prompts:
            took_ms = {}
            for table in (None, l20):
                self.ours.ask(prompt, self.catalogue, table=table, beams=BEAMS)
                took_ms[table is None] = sum(step_ms(l20, rows) for rows in self.ours.executor.rows)
            ratios.append(took_ms[True] / took_ms[False])
        self.figures.spread("ptpv_vs_stepwise_l20_predicted", ratios)

    def l20_table(self) -> StepTable:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "l20.json"
            command = [sys.executable, "-m", "megakernel", "predict", "--machine", "l20", "--json", str(path)]
            command += ["--model", L20_MODEL, "--context", str(L20_CONTEXT)]
            command += ["--batch", ",".join(map(str, L20_BATCHES))]
            kernels = Path(__file__).resolve().parent.parent / "kernels"
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=kernels)
            steps = json.loads(path.read_text())["steps"]
        return StepTable(
            rows=tuple(step["batch"] for step in steps), ms=tuple(step["predicted_ms"] for step in steps)
        )

    def measure_head(self) -> None:
        print(f"heads of {BEAMS} rows", flush=True)
        rounds = HEAD_ROUNDS_QUICK if self.is_quick else HEAD_ROUNDS
        full, restricted = head_times(self.model.artifact.load(), self.children(BEAMS), rounds)
        note = f"(full {full}, restricted {restricted})"
        self.figures.put("restricted_vs_full_head", full.head_ms / restricted.head_ms, note)

    def children(self, count: int) -> list[Int32Array]:
        """Tokens of the children of random nodes that have several."""
        trie = self.catalogue.trie
        branches = np.flatnonzero(np.diff(trie.first_child) > 1)[1:]  # the root's children are no round's
        nodes = np.random.default_rng(0).choice(branches, count, replace=False)
        return [trie.token[trie.first_child[node] : trie.first_child[node + 1]] for node in nodes]

    def measure_transformers(self) -> None:
        tokens = np.zeros(1, dtype=np.int32)
        peer = open_if_installed(
            "transformers", Transformers, self.model.weights, self.threads, tokens, "float32"
        )
        if peer is None:
            return
        constrained = ConstrainedBeams(peer, self.catalogue, self.served.card.eos_token_ids[0])
        ratios, same = [], []
        for number, prompt in enumerate(self.prompts[: PEER_BRIEFS_QUICK if self.is_quick else PEER_BRIEFS]):
            theirs_ms, theirs = timed(lambda p=prompt: constrained.ask(p))
            ours_ms, result = timed(
                lambda p=prompt, n=number: self.ours.ask(
                    p, self.catalogue, table=self.ours.table, beams=BEAMS, tenant=f"new-{n}"
                )
            )
            ratios.append(theirs_ms / ours_ms)
            same.append(len(set(theirs) & {item.text for item in result.items}) / BEAMS)
        self.figures.spread("vs_transformers", ratios)
        self.figures.spread("items_in_common_with_transformers", same)

    def measure_million(self) -> None:
        print(f"{MILLION} items", flush=True)
        catalogue = compiled(sample_jsonl(MILLION), self.served, self.tokenizer)
        shares = []
        for prompt in self.prompts:
            for number in range(2):
                self.ours.ask(prompt, catalogue, table=None, beams=BEAMS)
                if number:
                    shares.append(self.ours.trie_s / self.ours.executor.run_s)
        self.figures.spread("trie_share_of_step_1m", shares)


class ConstrainedBeams:
    """transformers' beam search with `prefix_allowed_tokens_fn` over the catalogue's own trie."""

    def __init__(self, peer: Transformers, catalogue: Catalogue, end_token: int) -> None:
        self.peer, self.catalogue, self.end_token = peer, catalogue, end_token

    def ask(self, prompt: list[int]) -> list[str]:
        trie, torch = self.catalogue.trie, self.peer.torch
        nodes: dict[tuple[int, ...], int] = {(): ROOT}

        def allowed(_: int, tokens: Any) -> list[int]:
            path = tuple(tokens.tolist()[len(prompt) :])
            if path not in nodes:
                parent = nodes.get(path[:-1])
                child = None if parent is None else trie.child(parent, path[-1])
                if child is None:
                    return [self.end_token]
                nodes[path] = child
            node = nodes[path]
            found = trie.token[trie.first_child[node] : trie.first_child[node + 1]].tolist()
            return found or [self.end_token]

        with torch.inference_mode():
            answer = self.peer.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
                num_beams=BEAMS,
                num_return_sequences=BEAMS,
                do_sample=False,
                length_penalty=0.0,
                early_stopping=False,
                max_new_tokens=int(trie.height[ROOT]) + 1,
                eos_token_id=self.end_token,
                pad_token_id=self.end_token,
                prefix_allowed_tokens_fn=allowed,
            )
        texts = []
        for path in answer[:, len(prompt) :].tolist():
            item = self.catalogue.find(path[: path.index(self.end_token)] if self.end_token in path else path)
            if item is not None:
                texts.append(self.catalogue.text(item))
        return texts


def compile_figures() -> dict[str, float]:
    script = Path(__file__).with_name("catalogue_compile.py")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        command = [sys.executable, str(script), "--runs", "1", "--json", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        figures: dict[str, float] = json.loads(path.read_text())["figures"]
    return figures


def main() -> int:
    options = parser("Targeting: PTPV beside token by token, and transformers.")
    options.add_argument("--threads", type=int, default=2)
    arguments = options.parse_args()
    comparison = Comparison(arguments.threads, arguments.quick)
    comparison.run()
    print("compiling, in a process of its own", flush=True)
    for name, value in compile_figures().items():
        comparison.figures.put(name, value)
    write_figures(arguments.json, comparison.figures.values, runs=comparison.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
