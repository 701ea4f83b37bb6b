"""What drafts win, and cost, when a small model writes advertisements: with drafts and without, interleaved.

`python benchmarks/creatives.py [--quick] [--json FILE] [--model FILE.gguf] [--threads N]`. One sequence at a
time through the decode engine with the compiled megakernel, prompts in the prefix cache; time is taken from
the first token's step on, and the tokens are checked to be the same both ways. A round's requests are all
new to the drafter: what it knows of their texts, it has learned in that round.

- *rewrite*: the prompt has the text that the answer repeats with an edit. Greedy, each its own campaign.
- *template*: creatives of one campaign that share phrases. Greedy.
- *phrases*: creatives with no example in their prompts, each its own campaign, whose phrases are a catalogue.
  Greedy. `acceptance_length_no_phrases` is that of the same drafted without it.
- *adversarial*: temperature 2: nothing can be foreseen, and what drafting costs is all that shows.

`rewrite_vs_llamacpp_lookup`: llama.cpp's prompt lookup (llama-cpp-python) on the same prompts, milliseconds a
token. A figure is the median over rounds of a round's ratio; its spread is printed.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "kernels"))

from benchmarks.creatives_peer import LlamaLookup
from benchmarks.creatives_phrases import compiled_phrases, phrases_in
from benchmarks.creatives_texts import rewrite_prompts, template_prompts, unprompted_prompts
from benchmarks.decode import Figures
from benchmarks.decode_ours import OurModel
from benchmarks.decode_peers import open_if_installed
from benchmarks.harness import parser, write_figures
from cluster.catalogue.fetch import fetch_catalogue
from cluster.catalogue.local import LocalCatalogues
from cluster.config import DecodeConfig
from cluster.ids import Epoch, RequestId
from cluster.messages import (
    CatalogueRef,
    GenerateRequest,
    SamplingParams,
    SequenceFailed,
    TokensEmitted,
)
from cluster.text import Tokenizer
from cluster.transfer.receiver import HandoffReceiver
from decode_workers.drafting.history import History
from decode_workers.drafting.phrase_files import PhraseFiles
from decode_workers.drafting.speculator import Speculator
from decode_workers.engine import DecodeEngine
from decode_workers.inbox import Inbox
from decode_workers.megakernel_executor import MegaKernelExecutor
from headrace.served_model import served_model
from megakernel.model.gguf import GgufWeights
from megakernel.model.load import PACKAGED_MODEL

ROUNDS, ROUNDS_QUICK = 7, 3
REQUESTS, REQUESTS_QUICK = 8, 3
TEMPLATE_REQUESTS, TEMPLATE_REQUESTS_QUICK = 16, 6
MAX_TOKENS, MAX_TOKENS_QUICK = 96, 48
NUM_BLOCKS, BLOCK_TOKENS = 512, 16
MEASUREMENTS = 3


class Spent(NamedTuple):
    """Behind the first token's step."""

    seconds: float
    num_tokens: int
    num_steps: int

    def plus(self, other: "Spent") -> "Spent":
        return Spent(
            self.seconds + other.seconds,
            self.num_tokens + other.num_tokens,
            self.num_steps + other.num_steps,
        )


NOTHING = Spent(0.0, 0, 0)


class Writer:
    """An engine that writes one creative at a time, with drafts or without."""

    def __init__(self, model: str, threads: int, folder: Path) -> None:
        ours, served, config = OurModel(model, threads), served_model(model), DecodeConfig()
        self.folder, self.card = folder, served.card
        self.catalogues = LocalCatalogues(folder / "fetched", fetch_catalogue)
        assert isinstance(ours.weights, GgufWeights), "llama.cpp reads GGUF files only"
        self.path = ours.weights.path
        self.tokenizer = Tokenizer.of(served)
        self.executor = MegaKernelExecutor(ours.artifact.load(), ours.fingerprint, NUM_BLOCKS, BLOCK_TOKENS)
        self.engine = DecodeEngine(
            self.executor,
            self.tokenizer,
            served.card,
            config,
            handoffs=HandoffReceiver(self.executor.layout, lambda: Epoch(1), config.handoff_timeout_s),
            inbox=Inbox(),
            drafter=Speculator(
                History(config.draft_history_nodes, config.draft_history_nodes_per_tenant),
                PhraseFiles(self.catalogues, self.tokenizer, self.card.vocab_size),
            ),
        )
        self._num_requests = 0

    def measure(self) -> None:
        """Some times: the budget's table is the last, and the first steps warm up."""
        for _ in range(MEASUREMENTS):
            costs = self.engine.measure()
        print("step table: " + ", ".join(f"{cost.rows} rows {cost.ms:.2f} ms" for cost in costs), flush=True)

    def write(
        self,
        prompt: str,
        sampling: SamplingParams,
        campaign: str | None,
        phrases: CatalogueRef | None = None,
    ) -> tuple[list[int], Spent]:
        """`campaign` None: without drafts."""
        self._num_requests += 1
        self.engine.roster.submit(
            GenerateRequest(
                request_id=RequestId(f"r{self._num_requests}"),
                prompt_token_ids=tuple(self.tokenizer.encode(prompt, allow_special=True)),
                sampling=sampling,
                campaign=campaign or "",
                speculate=campaign is not None,
                phrases=phrases,
            )
        )
        tokens: list[int] = []
        started_s, num_first, num_steps = 0.0, 0, 0
        while self.engine.has_work:
            events = self.engine.step()
            num_steps += num_first > 0
            for event in events:
                assert not isinstance(event, SequenceFailed), event
                if isinstance(event, TokensEmitted):
                    tokens += [token.token_id for token in event.tokens]
            if tokens and not num_first:
                started_s, num_first = time.perf_counter(), len(tokens)
        return tokens, Spent(time.perf_counter() - started_s, len(tokens) - num_first, num_steps)


class Comparison:
    def __init__(self, model: str, threads: int, is_quick: bool, folder: Path) -> None:
        self.rounds = ROUNDS_QUICK if is_quick else ROUNDS
        self.max_tokens = MAX_TOKENS_QUICK if is_quick else MAX_TOKENS
        self.num_requests = REQUESTS_QUICK if is_quick else REQUESTS
        num_templates = TEMPLATE_REQUESTS_QUICK if is_quick else TEMPLATE_REQUESTS
        self.rewrites = rewrite_prompts()[: self.num_requests]
        self.templates = template_prompts()[:num_templates]
        self.unprompted = unprompted_prompts()[: self.num_requests]
        self.writer = Writer(model, threads, folder)
        self.llama = open_if_installed("llama.cpp", LlamaLookup, self.writer.path, threads)
        if self.llama is None:
            print("without llama-cpp-python there is no rewrite_vs_llamacpp_lookup", flush=True)
        self.figures = Figures()

    def run(self) -> dict[str, float]:
        self.writer.measure()
        self.rewrite()
        self.template()
        self.phrases()
        self.adversarial()
        self.writer.executor.close()
        return self.figures.values

    def greedy(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.max_tokens, seed=0, temperature=0.0, stop=("\n\n",))

    def both(
        self,
        prompt: str,
        sampling: SamplingParams,
        campaign: str,
        is_plain_first: bool,
        phrases: CatalogueRef | None = None,
    ) -> list[Spent]:
        """Without drafts and with them."""
        written = {
            is_plain: self.writer.write(prompt, sampling, None if is_plain else campaign, phrases)
            for is_plain in (is_plain_first, not is_plain_first)
        }
        assert written[True][0] == written[False][0], "drafts changed a token"
        return [written[True][1], written[False][1]]

    def warm(self, prompts: list[str]) -> None:
        """Into the prefix cache."""
        for prompt in prompts:
            self.writer.write(prompt, SamplingParams(max_tokens=1, seed=0, temperature=0.0), None)

    def rewrite(self) -> None:
        print("rewrite", flush=True)
        self.warm(self.rewrites)
        rounds: list[list[Spent]] = []
        peers: list[tuple[float, float]] = []
        for turn in range(self.rounds):
            plain = drafted = NOTHING
            peer_s, peer_tokens = 0.0, 0
            for at, prompt in enumerate(self.rewrites):
                one, other = self.both(prompt, self.greedy(), f"rewrite-{turn}-{at}", bool(turn % 2))
                plain, drafted = plain.plus(one), drafted.plus(other)
                if self.llama is not None:
                    token_ids = self.writer.tokenizer.encode(prompt, allow_special=True)
                    spent_s, count = self.llama.write(token_ids, self.max_tokens)
                    peer_s, peer_tokens = peer_s + spent_s, peer_tokens + count
            rounds.append([plain, drafted])
            if peer_tokens:
                peers.append((peer_s / peer_tokens, drafted.seconds / drafted.num_tokens))
        self.told("rewrite", rounds)
        lengths = [drafted.num_tokens / drafted.num_steps for _, drafted in rounds]
        self.figures.put("acceptance_length_rewrite", statistics.median(lengths))
        if peers:
            theirs, ours = zip(*peers, strict=True)
            self.figures.put("llamacpp_lookup_ms_token", statistics.median(theirs) * 1e3)
            self.figures.ratio("rewrite_vs_llamacpp_lookup", list(theirs), list(ours))

    def template(self) -> None:
        print("template", flush=True)
        self.warm(self.templates)
        rounds = []
        for turn in range(self.rounds):
            plain = drafted = NOTHING
            for prompt in self.templates:
                one, other = self.both(prompt, self.greedy(), f"template-{turn}", bool(turn % 2))
                plain, drafted = plain.plus(one), drafted.plus(other)
            rounds.append([plain, drafted])
        self.told("template", rounds)
        lengths = [drafted.num_tokens / drafted.num_steps for _, drafted in rounds]
        self.figures.put("acceptance_length_template", statistics.median(lengths))

    def phrases(self) -> None:
        print("phrases", flush=True)
        self.warm(self.unprompted)
        writer = self.writer
        said = [writer.write(prompt, self.greedy(), None)[0] for prompt in self.unprompted]
        phrases = phrases_in(writer.tokenizer.decode(tokens) for tokens in said)
        ref = compiled_phrases(phrases, writer.folder / "phrases", writer.tokenizer, writer.card)
        writer.catalogues.open(ref)
        rounds, others = [], []
        for turn in range(self.rounds):
            plain = drafted = without = NOTHING
            for at, prompt in enumerate(self.unprompted):
                one, other = self.both(prompt, self.greedy(), f"phrases-{turn}-{at}", bool(turn % 2), ref)
                plain, drafted = plain.plus(one), drafted.plus(other)
                without = without.plus(writer.write(prompt, self.greedy(), f"none-{turn}-{at}")[1])
            rounds.append([plain, drafted])
            others.append(without)
        self.told("phrases", rounds)
        for name, spent in (("phrases", [drafted for _, drafted in rounds]), ("no_phrases", others)):
            lengths = [one.num_tokens / one.num_steps for one in spent]
            self.figures.put(f"acceptance_length_{name}", statistics.median(lengths))

    def adversarial(self) -> None:
        print("adversarial", flush=True)
        rounds = []
        for turn in range(2 * self.rounds):
            plain = drafted = NOTHING
            for at, prompt in enumerate(self.rewrites):
                seed = turn * 100 + at
                sampling = SamplingParams(
                    max_tokens=self.max_tokens, seed=seed, temperature=2.0, ignore_eos=True
                )
                one, other = self.both(prompt, sampling, "adversarial", bool((turn + at) % 2))
                plain, drafted = plain.plus(one), drafted.plus(other)
            rounds.append([plain, drafted])
        self.told("adversarial", rounds)

    def told(self, name: str, rounds: list[list[Spent]]) -> None:
        plain, drafted = [
            [spent.seconds / spent.num_tokens for spent in column] for column in zip(*rounds, strict=True)
        ]
        self.figures.put(f"{name}_plain_ms_token", statistics.median(plain) * 1e3)
        self.figures.put(f"{name}_ms_token", statistics.median(drafted) * 1e3)
        self.figures.ratio(f"{name}_vs_plain", plain, drafted)


def main() -> int:
    options = parser("What drafts win, and cost, when a small model writes advertisements.")
    options.add_argument("--model", default=PACKAGED_MODEL, help="a GGUF file or the packaged model's name")
    options.add_argument("--threads", type=int, default=2)
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="headrace-creatives-") as folder:
        comparison = Comparison(arguments.model, arguments.threads, arguments.quick, Path(folder))
        figures = comparison.run()
    write_figures(arguments.json, figures, runs=comparison.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
