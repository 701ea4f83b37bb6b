"""Targeting through the decode engine as `benchmarks/targeting.py` drives it: one question at a time, here."""

import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.decode_ours import OurModel
from cluster.catalogue.compile import CompileTarget, compile_upload
from cluster.catalogue.file import Catalogue
from cluster.config import DecodeConfig
from cluster.ids import HandoffId, RequestId
from cluster.messages import (
    CatalogueRef,
    GenerateRequest,
    HandoffCancelState,
    SamplingParams,
    SequenceFinished,
    StepCost,
    TargetingParams,
    TargetingResult,
)
from cluster.model_card import ServedModel
from cluster.placement.predict import StepTable
from cluster.text import Tokenizer
from cluster.transfer.receiver import HandoffSink
from decode_workers.engine import DecodeEngine
from decode_workers.inbox import Inbox
from decode_workers.megakernel_executor import MegaKernelExecutor
from decode_workers.step_batch import StepBatch, StepResult
from decode_workers.targeting.chosen_items import ChosenItems
from decode_workers.targeting.slots import level_widths

POOL_TOKENS = 8192
BLOCK_TOKENS = 16


class TimedExecutor:
    """The megakernel's executor, with a clock around its steps, and their rows noted."""

    def __init__(self, inner: MegaKernelExecutor) -> None:
        self._inner = inner
        self.run_s = 0.0
        self.rows: list[int] = []

    def run(self, batch: StepBatch) -> StepResult:
        started_s = time.perf_counter()
        result = self._inner.run(batch)
        self.run_s += time.perf_counter() - started_s
        self.rows.append(batch.num_rows)
        return result

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


class NoHandoffs:
    def expect(self, handoff_id: HandoffId, first_token: int, num_tokens: int, sink: HandoffSink) -> None:
        raise AssertionError("no request here waits for a hand-off")

    def cancel(self, handoff_id: HandoffId) -> HandoffCancelState:
        return HandoffCancelState.NOT_FOUND


def compiled(chunks: Iterable[bytes], served: ServedModel, tokenizer: Tokenizer) -> Catalogue:
    """Its file is gone when this returns; the catalogue keeps its contents."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "catalogue"
        compile_upload(
            chunks,
            path,
            upload_format="jsonl",
            name="sample",
            version=1,
            target=CompileTarget(
                tokenizer=tokenizer,
                end_token=served.card.eos_token_ids[0],
                fingerprint=served.card.fingerprint,
            ),
        )
        return Catalogue.open(path)


class OurTargeting:
    def __init__(self, model: OurModel, served: ServedModel, tokenizer: Tokenizer) -> None:
        self.executor = TimedExecutor(
            MegaKernelExecutor(
                model.artifact.load(), model.fingerprint, POOL_TOKENS // BLOCK_TOKENS, BLOCK_TOKENS
            )
        )
        self.engine = DecodeEngine(
            self.executor,  # type: ignore[arg-type]
            tokenizer,
            served.card,
            DecodeConfig(),
            handoffs=NoHandoffs(),
            inbox=Inbox(),
        )
        self.costs: tuple[StepCost, ...] = self.engine.measure()
        self.table = self.engine._step_table
        self._num_asked = 0

    def choose(self, catalogue: Catalogue) -> ChosenItems:
        return ChosenItems(catalogue=catalogue, passing=None, level_widths=level_widths(catalogue.trie))

    def ask(
        self,
        prompt: list[int],
        items: ChosenItems,
        *,
        table: StepTable | None,
        k: int = 20,
        beams: int = 20,
        scoring: str = "vocabulary",
        tenant: str = "",
    ) -> TargetingResult:
        """`table`: what the search predicts by; None: token by token."""
        self._num_asked += 1
        self.executor.run_s, self.executor.rows = 0.0, []
        self.engine.roster.predict_by(table)
        ref = CatalogueRef(name="sample", version=1, checksum="", num_bytes=0, path="")
        request = GenerateRequest(
            request_id=RequestId(str(self._num_asked)),
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=1, seed=0, temperature=0.0),
            tenant=tenant,
            targeting=TargetingParams(catalogue=ref, k=k, beams=beams, scoring=scoring),  # type: ignore[arg-type]
        )
        self.engine.roster.submit(request, items)
        while True:
            for event in self.engine.step():
                if isinstance(event, SequenceFinished):
                    assert event.targeting is not None
                    return event.targeting
                raise AssertionError(event)
