"""Measures what a prefill step costs, for the predictions that placement and admission make."""

import time
from collections.abc import Iterator

from cluster.ids import RequestId
from cluster.messages import StepCost
from cluster.transfer import KvChunk
from prefill_workers.engine import PrefillEngine, PrefillFailed, PrefillJob

SMALLEST_STEP_TOKENS = 16
STEP_GROWTH = 4
MAX_STEPS_PER_SIZE = 4096


def sizes_to_measure(max_tokens: int) -> Iterator[int]:
    """16, 64, 256, ... and the largest step itself."""
    size = SMALLEST_STEP_TOKENS
    while size < max_tokens:
        yield size
        size *= STEP_GROWTH
    yield max_tokens


def measure_step_table(engine: PrefillEngine, max_tokens: int, vocab_size: int) -> tuple[StepCost, ...]:
    """Milliseconds to compute n new tokens, ascending by n; from the engine's own thread, on an idle engine.

    Each measurement has a tenant of its own, so none finds another's KV in the prefix cache.
    """
    _measure(engine, min(SMALLEST_STEP_TOKENS, max_tokens), vocab_size, "warm-up")
    return tuple(
        StepCost(rows=size, ms=_measure(engine, size, vocab_size, f"size {size}"))
        for size in sizes_to_measure(max_tokens)
    )


def _measure(engine: PrefillEngine, num_tokens: int, vocab_size: int, name: str) -> float:
    job = PrefillJob(
        request_id=RequestId(f"step-table/{name}"),
        token_ids=tuple((7919 * i + num_tokens) % vocab_size for i in range(num_tokens)),
        first_token=0,
        tenant=f"\0step-table/{name}",
    )
    engine.admit(job, _discard)
    try:
        start_s = time.perf_counter()
        for _ in range(MAX_STEPS_PER_SIZE):
            for end in engine.step():
                if isinstance(end, PrefillFailed):
                    raise RuntimeError(f"{num_tokens} tokens: {end.message}")  # noqa: TRY004 - no bad type
                return (time.perf_counter() - start_s) * 1_000
        raise RuntimeError(f"{num_tokens} tokens were not computed in {MAX_STEPS_PER_SIZE} steps")
    finally:
        engine.release(job.request_id)
        _let_go(engine)


def _let_go(engine: PrefillEngine) -> None:
    """What was released may have an end: until then it takes room from the next one, and from the pool."""
    for _ in range(MAX_STEPS_PER_SIZE):
        if not engine.has_work():
            return
        engine.step()
    raise RuntimeError(f"a prompt was not let go of in {MAX_STEPS_PER_SIZE} steps")


def _discard(_chunk: KvChunk) -> None:
    """Measures computing, not sending."""
