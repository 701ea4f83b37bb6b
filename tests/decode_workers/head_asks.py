"""One step asked for less and less of the head: any executor must give what whole logits rows say."""

import msgspec
import numpy as np

from decode_workers.executor import StepExecutor
from decode_workers.step_batch import StepBatch
from megakernel.head import reduce_rows


def check_asks(executor: StepExecutor, batch: StepBatch) -> None:
    """`batch` has at least five rows that all need logits; running it again changes nothing."""
    every = executor.run(batch).logits.copy()
    num_rows, vocab = every.shape
    row = np.arange(num_rows)
    needs_logits, needs_best = row % 3 != 1, row % 2 == 1
    slices = [[], [vocab - 1], [0, 3, 17], list(range(vocab)), []]
    logit_rows = np.flatnonzero(needs_logits | needs_best)
    allowed = {int(at): slices[i % 5] for i, at in enumerate(logit_rows)}
    asked = msgspec.structs.replace(
        batch,
        needs_logits=needs_logits,
        needs_best=needs_best,
        top_k=4,
        needs_log_sums=True,
        allowed_starts=np.cumsum([0, *map(len, allowed.values())]).astype(np.int32),
        allowed_token_ids=np.array([t for tokens in allowed.values() for t in tokens], dtype=np.int32),
    )
    result = executor.run(asked)
    whole = [at for at in np.flatnonzero(needs_logits) if not allowed[int(at)]]
    assert result.rows.tolist() == whole
    assert result.rows.dtype == np.int32
    assert np.array_equal(result.logits, every[whole])
    assert result.allowed_logits is not None
    expected = [every[at, tokens] for at, tokens in allowed.items()]
    assert np.array_equal(result.allowed_logits, np.concatenate(expected))
    _check_reductions(result.reductions, every[needs_best], top_k=4)

    best_alone = msgspec.structs.replace(
        batch, needs_logits=np.zeros(num_rows, dtype=np.bool_), needs_best=np.ones(num_rows, dtype=np.bool_)
    )
    result = executor.run(best_alone)
    assert result.logits.shape == (0, vocab)
    assert result.allowed_logits is None
    assert result.reductions is not None
    assert np.array_equal(result.reductions.token_ids, every.argmax(axis=1))
    assert executor.run(batch).reductions is None


def _check_reductions(reductions, logits, top_k) -> None:
    expected = reduce_rows(logits, top_k)
    for name in ("token_ids", "maxima", "top_token_ids", "top_logits"):
        assert np.array_equal(getattr(reductions, name), getattr(expected, name)), name
    np.testing.assert_allclose(reductions.log_sums, expected.log_sums, rtol=1e-6, atol=1e-5)
