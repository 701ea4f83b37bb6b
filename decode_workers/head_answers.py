"""What a batch asked of the head, answered from whole logits rows: for executors that have those anyway."""

import numpy as np

from decode_workers.step_batch import BoolArray, Float32Array, Int32Array, StepBatch, StepResult
from megakernel.head import reduce_rows


def is_logit_row(batch: StepBatch) -> BoolArray:
    """[rows] rows that the head is run for."""
    return batch.needs_logits if batch.needs_best is None else batch.needs_logits | batch.needs_best


def has_allowed(batch: StepBatch) -> BoolArray:
    """[rows] rows that name the tokens they may take."""
    named = np.zeros(batch.num_rows, dtype=np.bool_)
    if batch.allowed_starts is not None:
        named[is_logit_row(batch)] = np.diff(batch.allowed_starts) > 0
    return named


def handed_out(batch: StepBatch) -> Int32Array:
    """Rows whose whole logits are the result's, ascending."""
    is_whole = batch.needs_logits
    if batch.allowed_starts is not None:
        is_whole = is_whole & ~has_allowed(batch)
    return np.flatnonzero(is_whole).astype(np.int32)


def answer(batch: StepBatch, logits: Float32Array) -> StepResult:
    """`logits` are those of the logit rows, `[logit rows, vocab]`."""
    rows = handed_out(batch)
    if batch.needs_best is None and batch.allowed_starts is None:
        return StepResult(rows=rows, logits=logits)
    place = np.cumsum(is_logit_row(batch)) - 1
    """[rows] where a logit row's logits are."""
    reductions = None
    if batch.needs_best is not None:
        reduced = logits[place[batch.needs_best]]
        reductions = reduce_rows(reduced, batch.top_k, needs_log_sums=batch.needs_log_sums)
    allowed_logits = None
    if batch.allowed_starts is not None:
        allowed_rows = np.repeat(np.arange(len(logits)), np.diff(batch.allowed_starts))
        allowed_logits = logits[allowed_rows, batch.allowed_token_ids]
    return StepResult(
        rows=rows, logits=logits[place[rows]], reductions=reductions, allowed_logits=allowed_logits
    )
