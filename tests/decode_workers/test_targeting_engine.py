"""Targeting through the decode engine: beside other requests, in few rows, with filters, until a deadline."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from cluster.catalogue.compile import CompileTarget, compile_upload
from cluster.catalogue.file import Catalogue
from cluster.config import DecodeConfig
from cluster.messages import (
    CatalogueRef,
    Condition,
    FailureCode,
    FinishReason,
    GenerateRequest,
    StepCost,
    TargetingParams,
    TargetingResult,
)
from decode_workers.targeting.chosen_items import choose_items
from tests.decode_workers.support import (
    EOS,
    MAX_CONTEXT_TOKENS,
    TOKENIZER,
    EngineRig,
    HashExecutor,
    drawn,
    expected_tokens,
    greedy,
    kv_of,
    kv_value,
    logits_of,
    request_of,
)

PROMPT = [40, 41, 42, 43, 44, 45, 46]
ITEMS = tuple(
    dict.fromkeys("".join(random.Random(seed).choices("abc", k=1 + seed % 7)) for seed in range(60))
)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return compiled(tmp_path_factory.mktemp("catalogue") / "items", ITEMS)


def compiled(path: Path, texts: tuple[str, ...]) -> Catalogue:
    lines = [
        json.dumps(
            {"id": f"id-{place}", "text": text, "bid": place / 4, "kind": "even" if place % 2 == 0 else "odd"}
        )
        for place, text in enumerate(texts)
    ]
    compile_upload(
        ["\n".join(lines).encode()],
        path,
        upload_format="jsonl",
        name="items",
        version=1,
        target=CompileTarget(tokenizer=TOKENIZER, end_token=EOS, fingerprint="hash-1"),
    )
    return Catalogue.open(path)


def ask(rig: EngineRig, catalogue: Catalogue, request: GenerateRequest) -> None:
    assert request.targeting is not None
    rig.engine.roster.submit(request, choose_items(catalogue, request.targeting))


def targeting(request_id: str = "t", prompt: list[int] = PROMPT, **changes: object) -> GenerateRequest:
    ref = CatalogueRef(name="items", version=1, checksum="0", num_bytes=0, path="")
    deadline = changes.pop("deadline_unix_ns", None)
    params = TargetingParams(**{"catalogue": ref, "k": 5, "beams": 64, **changes})  # type: ignore[arg-type]
    return request_of(request_id, prompt, greedy(1), targeting=params, deadline_unix_ns=deadline)


def path_of(text: str) -> tuple[int, ...]:
    return (*TOKENIZER.encode(text, allow_special=False), EOS)


def item_score(prompt: list[int], text: str, texts: tuple[str, ...], scoring: str) -> float:
    """Of the item's tokens and its end, one after the other."""
    score, values, path = 0.0, kv_of(prompt), path_of(text)
    for place, token in enumerate(path):
        logits = logits_of(values[-1]).astype(np.float64)
        allowed = list(range(len(logits)))
        if scoring == "catalogue":
            allowed = sorted({p[place] for p in map(path_of, texts) if p[:place] == path[:place]})
        logits = logits[allowed]
        score += logits[allowed.index(token)] - logits.max() - math.log(np.exp(logits - logits.max()).sum())
        values.append(kv_value(token, len(values), values))
    return score


def best(prompt: list[int], texts: tuple[str, ...], k: int, scoring: str = "vocabulary") -> list[str]:
    return sorted(texts, key=lambda text: -item_score(prompt, text, texts, scoring))[:k]


def result_of(rig: EngineRig, request_id: str = "t") -> TargetingResult:
    result = rig.finished(request_id).targeting
    assert result is not None
    return result


def texts_of(result: TargetingResult) -> list[str]:
    assert [item.rank for item in result.items] == list(range(1, len(result.items) + 1))
    return [item.text for item in result.items]


@pytest.mark.parametrize("scoring", ["vocabulary", "catalogue"])
@pytest.mark.parametrize("max_rows", [1, 3, 64])
def test_the_best_items_come_with_their_scores(catalogue: Catalogue, scoring: str, max_rows: int) -> None:
    rig = EngineRig(HashExecutor(num_blocks=128), DecodeConfig(max_rows_per_step=max_rows))
    ask(rig, catalogue, targeting(scoring=scoring))
    rig.run()
    result = result_of(rig)
    assert texts_of(result) == best(PROMPT, ITEMS, 5, scoring)
    for item in result.items:
        assert item.logprob == pytest.approx(item_score(PROMPT, item.text, ITEMS, scoring), abs=1e-4)
        assert item.item_id == f"id-{ITEMS.index(item.text)}"
        assert item.bid == ITEMS.index(item.text) / 4
    assert result.is_complete
    assert rig.reason("t") is FinishReason.STOP
    assert rig.used_tokens == 0
    assert rig.tokens("t") == []


def test_company_changes_neither_items_nor_tokens(catalogue: Catalogue) -> None:
    rig = EngineRig(HashExecutor(num_blocks=512), DecodeConfig(max_rows_per_step=16))
    others = {f"r{seed}": drawn(12, seed=seed, ignore_eos=True) for seed in range(3)}
    prompts = {name: [50 + place, *range(30, 30 + 5 * place)] for place, name in enumerate(others)}
    for name, sampling in others.items():
        rig.submit(request_of(name, prompts[name], sampling))
    contexts = {f"t{place}": PROMPT[place:] for place in range(3)}
    for name, prompt in contexts.items():
        ask(rig, catalogue, targeting(name, prompt, beams=64))
    rig.run()
    for name, sampling in others.items():
        assert rig.tokens(name) == expected_tokens(prompts[name], sampling)
    for name, prompt in contexts.items():
        assert texts_of(result_of(rig, name)) == best(prompt, ITEMS, 5)
    assert rig.used_tokens == 0


def test_a_filter_leaves_only_what_passes(catalogue: Catalogue) -> None:
    rig = EngineRig(HashExecutor(num_blocks=128))
    where = (Condition(attribute="kind", any_of=("odd",)), Condition(attribute="bid", at_most=6.0))
    ask(rig, catalogue, targeting(where=where, k=64))
    rig.run()
    passing = tuple(text for place, text in enumerate(ITEMS) if place % 2 == 1 and place / 4 <= 6)
    assert texts_of(result_of(rig)) == best(PROMPT, passing, 64)


def test_nothing_that_passes_is_an_empty_answer_at_once(catalogue: Catalogue) -> None:
    rig = EngineRig()
    where = (Condition(attribute="kind", any_of=("neither",)),)
    ask(rig, catalogue, targeting(where=where))
    rig.run()
    result = result_of(rig)
    assert (result.items, result.decoding, result.num_rows) == ((), "none", 0)
    assert rig.executor.batches == []


def test_what_was_found_by_the_deadline_comes_back(catalogue: Catalogue) -> None:
    rig = EngineRig(HashExecutor(num_blocks=128), DecodeConfig(max_rows_per_step=2))
    deadline = rig.clock.now_ns + 1_000_000
    ask(rig, catalogue, targeting(k=20, deadline_unix_ns=deadline))
    while not rig.executor.batches or len(rig.executor.batches) < 12:
        rig.step()
    rig.clock.now_ns = deadline
    rig.run()
    result = result_of(rig)
    assert rig.reason("t") is FinishReason.DEADLINE
    assert not result.is_complete
    assert 0 < len(result.items) < 20
    for item in result.items:
        assert item.logprob == pytest.approx(item_score(PROMPT, item.text, ITEMS, "vocabulary"), abs=1e-4)
    assert rig.used_tokens == 0


class _FlatExecutor(HashExecutor):
    """Rows cost nothing: a step takes as long with many as with one."""

    def measure(self) -> tuple[StepCost, ...]:
        return (StepCost(rows=1, ms=1.0), StepCost(rows=64, ms=1.01))


def test_where_rows_cost_little_all_that_remains_is_verified_at_once(catalogue: Catalogue) -> None:
    stepwise, parallel = EngineRig(HashExecutor(num_blocks=128)), EngineRig(_FlatExecutor(num_blocks=128))
    parallel.engine.measure()
    for rig in (stepwise, parallel):
        ask(rig, catalogue, targeting(beams=8))
        rig.run()
    assert result_of(parallel).decoding == "parallel"
    assert result_of(stepwise).decoding == "stepwise"
    assert result_of(parallel).num_steps < result_of(stepwise).num_steps
    assert sum(item.logprob for item in result_of(parallel).items) >= sum(
        item.logprob for item in result_of(stepwise).items
    )


def test_the_context_is_cached_as_any_prompt(catalogue: Catalogue) -> None:
    rig = EngineRig(HashExecutor(num_blocks=128))
    for name in ("first", "second"):
        ask(rig, catalogue, targeting(name))
        rig.run()
    assert rig.finished("second").usage.cached_tokens == len(PROMPT) - 1
    assert result_of(rig, "first").items == result_of(rig, "second").items


def test_logits_that_are_no_distribution_fail_that_search_alone(catalogue: Catalogue) -> None:
    rig = EngineRig(HashExecutor(num_blocks=128))

    def spoil(batch: object, logits: np.ndarray) -> None:
        if len(rig.executor.batches) == 3:
            logits[-1, :] = np.nan

    rig.executor.spoil = spoil
    rig.submit(request_of("r", [1, 2, 3], greedy(8, ignore_eos=True)))
    ask(rig, catalogue, targeting(scoring="catalogue"))
    rig.run()
    assert rig.failed("t").code is FailureCode.INTERNAL
    assert rig.tokens("r") == expected_tokens([1, 2, 3], greedy(8, ignore_eos=True))
    assert rig.used_tokens == 0


@pytest.mark.parametrize(
    ("prompt", "num_blocks", "says"),
    [
        (list(range(30, 30 + 4)) * (MAX_CONTEXT_TOKENS // 4 - 1), 512, "items of 7 tokens"),
        (PROMPT, 16, "KV slots: the pool has 64"),
    ],
)
def test_what_can_never_fit_is_refused(
    catalogue: Catalogue, prompt: list[int], num_blocks: int, says: str
) -> None:
    rig = EngineRig(HashExecutor(num_blocks=num_blocks))
    ask(rig, catalogue, targeting(prompt=prompt))
    rig.run()
    assert rig.failed("t").code is FailureCode.INVALID
    assert says in rig.failed("t").message
