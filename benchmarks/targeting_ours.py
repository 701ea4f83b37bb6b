"""Targeting through the decode engine as `benchmarks/targeting.py` drives it: one question at a time."""

import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

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
from decode_workers.engine import DecodeEngine
from decode_workers.inbox import Inbox
from decode_workers.megakernel_executor import MegaKernelExecutor
from decode_workers.step_batch import StepBatch, StepResult
from decode_workers.targeting.chosen_items import ChosenItems, choose_items
from decode_workers.targeting.search import TargetingSearch

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


class TrieClock:
    """Sums what searches take for themselves: rows to run, and what their logits decide."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in ("root_ask", "wanted_rows", "take", "give"):
            setattr(TargetingSearch, name, self._timed(getattr(TargetingSearch, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            started_s = time.perf_counter()
            result = method(*arguments)
            self.seconds += time.perf_counter() - started_s
            return result

        return run


class NoHandoffs:
    def expect(self, *_: object) -> None:
        raise AssertionError("no request here waits for a hand-off")

    def cancel(self, _: HandoffId) -> HandoffCancelState:
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
        self._clock = TrieClock()
        self._num_asked = 0
        self._items: dict[tuple[str, str], ChosenItems] = {}

    @property
    def trie_s(self) -> float:
        """Of the last question."""
        return self._clock.seconds

    def ask(
        self,
        prompt: list[int],
        catalogue: Catalogue,
        *,
        table: StepTable | None,
        k: int = 20,
        beams: int = 20,
        scoring: Literal["vocabulary", "catalogue"] = "vocabulary",
        tenant: str = "",
    ) -> TargetingResult:
        """`table`: what the search predicts by; None: token by token."""
        self._num_asked += 1
        self.executor.run_s, self.executor.rows, self._clock.seconds = 0.0, [], 0.0
        self.engine.roster.predict_by(table)
        ref = CatalogueRef(name="sample", version=1, checksum="", num_bytes=0, path="")
        params = TargetingParams(catalogue=ref, k=k, beams=beams, scoring=scoring)
        key = (catalogue.checksum, scoring)
        if key not in self._items:
            self._items[key] = choose_items(catalogue, params)
        request = GenerateRequest(
            request_id=RequestId(str(self._num_asked)),
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=1, seed=0, temperature=0.0),
            tenant=tenant,
            targeting=params,
        )
        self.engine.roster.submit(request, self._items[key])
        while True:
            for event in self.engine.step():
                if isinstance(event, SequenceFinished):
                    assert event.targeting is not None
                    return event.targeting
                raise AssertionError(event)
