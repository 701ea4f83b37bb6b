"""What reductions of a row's logits are: the definition that every executor's head is held to."""

import msgspec
import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]

MAX_TOP_K = 64
"""`kMaxTopK` of head_rows.h."""


class Reductions(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Of rows of logits over the whole vocabulary. A row with a NaN has NaN for a maximum, and everywhere."""

    token_ids: Int32Array
    """[rows] the maximum's token: the lowest of equals; the first NaN's where there is one."""
    maxima: Float32Array
    """[rows]"""
    log_sums: Float32Array
    """[rows] log-sum-exp; NaN where nobody asked for it, the maximum where that is infinite."""
    top_token_ids: Int32Array
    """[rows, top_k] by falling logit, ascending among equals."""
    top_logits: Float32Array
    """[rows, top_k]"""


def reduce_rows(logits: Float32Array, top_k: int = 0, *, needs_log_sums: bool = True) -> Reductions:
    """By a pass over `logits`, [rows, vocab]; `top_k` is at most the vocabulary's size."""
    token_ids = logits.argmax(axis=1)  # NumPy's is the first NaN where there is one
    maxima = logits[np.arange(len(logits)), token_ids]
    log_sums = np.full(len(logits), np.nan, dtype=np.float32)
    if needs_log_sums:
        with np.errstate(invalid="ignore"):
            shifted = logits.astype(np.float64) - maxima[:, None]
            sums = maxima + np.log(np.exp(shifted).sum(axis=1))
        log_sums[:] = np.where(np.isfinite(maxima), sums, maxima)
    top_token_ids = np.empty((len(logits), top_k), dtype=np.int32)
    for row, top in zip(logits, top_token_ids, strict=True):
        top[:] = _top(row, top_k)
    top_logits = np.take_along_axis(logits, top_token_ids, axis=1)
    is_nan = np.isnan(maxima)
    top_token_ids[is_nan] = token_ids[is_nan, None]
    top_logits[is_nan] = np.nan
    return Reductions(
        token_ids=token_ids.astype(np.int32),
        maxima=maxima,
        log_sums=log_sums,
        top_token_ids=top_token_ids,
        top_logits=top_logits,
    )


def _top(row: Float32Array, top_k: int) -> npt.NDArray[np.int64]:
    if top_k == 0:
        return np.empty(0, dtype=np.int64)
    edge = np.partition(row, len(row) - top_k)[len(row) - top_k]
    kept = np.flatnonzero(~(row < edge))
    order = np.lexsort((kept, -row[kept]))
    return np.asarray(kept[order[:top_k]])
