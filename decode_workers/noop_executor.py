"""Computes nothing: what a cluster costs beside its model. Every sampled token is one fixed token."""

from collections.abc import Sequence

import numpy as np

from cluster.kv_layout import KvLayout
from cluster.messages import StepCost
from decode_workers.step_batch import Int32Array, StepBatch, StepResult

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
        row = np.zeros(vocab_size, dtype=np.float32)
        row[token_id] = _FIXED_LOGIT
        # One row seen at every index; broadcast_to makes the view read-only.
        self._logits = np.broadcast_to(row, (BUCKETS[-1], vocab_size))

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
        rows = np.flatnonzero(batch.needs_logits).astype(np.int32)
        assert len(rows) <= BUCKETS[-1], f"{len(rows)} rows in a step of at most {BUCKETS[-1]}"
        return StepResult(rows=rows, logits=self._logits[: len(rows)])

    def copy_slots(self, source: Int32Array, destination: Int32Array) -> None:
        """There is no KV to copy."""

    def write_kv(self, layer: int, slots: Int32Array, data: memoryview) -> None:
        """There is no KV to write."""

    def measure(self) -> tuple[StepCost, ...]:
        """Not exactly zero: placement divides by it."""
        return tuple(StepCost(rows=rows, ms=1e-3) for rows in BUCKETS)

    def close(self) -> None:
        """Nothing is held."""
