"""Computes nothing: what a cluster costs beside its model. Every sampled token is one fixed token."""

from collections.abc import Sequence

import numpy as np

from cluster.kv_layout import KvLayout
from cluster.messages import StepCost
from decode_workers.head_answers import handed_out
from decode_workers.step_batch import Int32Array, StepBatch, StepResult
from megakernel.head import Reductions, reduce_rows

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
_FIXED_LOGIT = 1e4
"""Above all others by so much that sampling at any usual temperature picks the token too."""


class NoopExecutor:
    """`StepExecutor` without KV or weights; `token_id` must end nothing, so requests run to their limit."""

    def __init__(self, layout: KvLayout, num_blocks: int, vocab_size: int, token_id: int) -> None:
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"token_id {token_id} is outside the vocabulary [0, {vocab_size})")
        self._layout = layout
        self._num_blocks = num_blocks
        self._vocab_size = vocab_size
        # Spread as a model's are: sampling should cost what it costs.
        row = np.random.default_rng(0).standard_normal(vocab_size).astype(np.float32) * np.float32(3)
        row[token_id] = _FIXED_LOGIT
        # One row seen at every index; broadcast_to makes the view read-only.
        self._logits = np.broadcast_to(row, (BUCKETS[-1], vocab_size))
        self._reduced: dict[int, Reductions] = {}

    @property
    def layout(self) -> KvLayout:
        return self._layout

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def buckets(self) -> Sequence[int]:
        return BUCKETS

    def run(self, batch: StepBatch) -> StepResult:
        """The logits are one read-only row, shared by all rows and all steps."""
        assert batch.num_rows <= BUCKETS[-1], f"{batch.num_rows} rows in a step of at most {BUCKETS[-1]}"
        rows = handed_out(batch)
        allowed_logits = None
        if batch.allowed_token_ids is not None:
            allowed_logits = self._logits[0, batch.allowed_token_ids]
        return StepResult(
            rows=rows,
            logits=self._logits[: len(rows)],
            reductions=None
            if batch.needs_best is None
            else self._reductions(int(np.count_nonzero(batch.needs_best)), batch.top_k),
            allowed_logits=allowed_logits,
        )

    def _reductions(self, num_rows: int, top_k: int) -> Reductions:
        """Found once for each `top_k`, then cut to as many rows as ask."""
        every = self._reduced.get(top_k)
        if every is None:
            every = self._reduced[top_k] = reduce_rows(self._logits, top_k)
        rows = slice(num_rows)
        return Reductions(
            token_ids=every.token_ids[rows],
            maxima=every.maxima[rows],
            log_sums=every.log_sums[rows],
            top_token_ids=every.top_token_ids[rows],
            top_logits=every.top_logits[rows],
        )

    def copy_slots(self, source: Int32Array, destination: Int32Array) -> None:
        """There is no KV to copy."""

    def write_kv(self, layer: int, slots: Int32Array, data: memoryview) -> None:
        """There is no KV to write."""

    def measure(self) -> tuple[StepCost, ...]:
        """Not exactly zero: placement divides by it."""
        return tuple(StepCost(rows=rows, ms=1e-3) for rows in BUCKETS)

    def close(self) -> None:
        """Nothing is held."""
