"""An engine around one executor, asked for one catalogue; and a toy model, compiled for this CPU."""

import json
from collections.abc import Iterable
from pathlib import Path as FilePath

from cluster.catalogue.compile import CompileTarget, compile_upload
from cluster.catalogue.file import Catalogue
from cluster.config import DecodeConfig
from cluster.messages import CatalogueRef, SequenceFinished, TargetingParams, TargetingResult
from cluster.model_card import ModelCard
from cluster.placement.predict import StepTable
from cluster.text import Tokenizer
from decode_workers.engine import DecodeEngine
from decode_workers.executor import StepExecutor
from decode_workers.inbox import Inbox
from decode_workers.megakernel_executor import MegaKernelExecutor
from decode_workers.targeting.chosen_items import choose_items
from megakernel.compiled import compile_here
from megakernel.machine import Machine
from megakernel.pipeline import compile_program
from tests.decode_workers.brute_force import Path, PrefixSets, Scored
from tests.decode_workers.support import CARD, TOKENIZER, VOCAB_SIZE, NoHandoffs, greedy, request_of
from tests.tiny_model import TinyWeights, tiny_weights

_NUM_BLOCKS, _BLOCK = 128, 16
_ONE_CORE = Machine(
    name="one core",
    kind="cpu",
    num_workers=1,
    scratch_bytes=1 << 20,
    page_bytes=4096,
    bandwidth_gb_s=20.0,
    worker_bandwidth_gb_s=12.0,
    load_latency_us=0.2,
    sync_us=0.5,
    macs_per_us={"F32": 10_000.0},
    instruction_us=0.1,
)


def toy_weights() -> TinyWeights:
    """For the byte tokenizer."""
    return tiny_weights(
        5, vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=32, num_heads=2, num_kv_heads=1
    )


def toy_executor(folder: FilePath) -> MegaKernelExecutor:
    """Raises BuildError where there is no compiler."""
    weights = toy_weights()
    program = compile_program(weights.shape, CARD.fingerprint, _ONE_CORE, 64, formats=weights.formats)
    compiled = compile_here(
        [program], weights, kv_format="float32", library_folder=folder, extra_flags=("-O1",)
    )
    return MegaKernelExecutor(compiled, CARD.fingerprint, _NUM_BLOCKS, _BLOCK)


class TargetingRig:
    def __init__(
        self,
        texts: Iterable[str],
        folder: FilePath,
        executor: StepExecutor,
        card: ModelCard = CARD,
        tokenizer: Tokenizer = TOKENIZER,
    ) -> None:
        self.end_token = card.eos_token_ids[0]
        self.paths: dict[str, Path] = {
            text: (*tokenizer.encode(text, allow_special=False), self.end_token) for text in texts
        }
        self.sets = PrefixSets(self.paths.values())
        target = CompileTarget(tokenizer=tokenizer, end_token=self.end_token, fingerprint=card.fingerprint)
        self._catalogue = _compiled(tuple(self.paths), folder / "items", target)
        self._engine = DecodeEngine(
            executor, tokenizer, card, DecodeConfig(), handoffs=NoHandoffs(), inbox=Inbox()
        )
        self._num_asked = 0

    def ask(self, context: list[int], table: StepTable | None, **params: object) -> TargetingResult:
        """`table`: what the search predicts by; None: token by token."""
        self._num_asked += 1
        ref = CatalogueRef(name="items", version=1, checksum="0", num_bytes=0, path="")
        targeting = TargetingParams(**{"catalogue": ref, **params})  # type: ignore[arg-type]
        request = request_of(str(self._num_asked), context, greedy(1), targeting=targeting)
        self._engine.roster.predict_by(table)
        self._engine.roster.submit(request, choose_items(self._catalogue, targeting))
        while True:
            for event in self._engine.step():
                assert isinstance(event, SequenceFinished), event
                result = event.targeting
                assert result is not None
                assert result.is_complete
                self._engine.kv.check()
                return result

    def found(self, result: TargetingResult) -> list[Scored]:
        """Every item is one of the catalogue's, and comes once."""
        assert all(item.text in self.paths for item in result.items)
        found = [(item.logprob, self.paths[item.text]) for item in result.items]
        assert len({path for _, path in found}) == len(found)
        return found


def _compiled(texts: tuple[str, ...], path: FilePath, target: CompileTarget) -> Catalogue:
    lines = [json.dumps({"id": str(place), "text": text}) for place, text in enumerate(texts)]
    compile_upload(
        ["\n".join(lines).encode()], path, upload_format="jsonl", name="items", version=1, target=target
    )
    return Catalogue.open(path)
