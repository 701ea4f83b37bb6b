"""The engine's side of hand-offs: which sequence waits for which, and what became of it."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

from cluster.ids import HandoffId
from cluster.messages import HandoffCancelState
from cluster.metrics import DecodeMetrics
from cluster.transfer import HandoffError, HandoffSink
from cluster.transfer.ledger import DuplicateHandoffError
from decode_workers.executor import StepExecutor
from decode_workers.inbox import Call
from decode_workers.kv_import import PoolSink
from decode_workers.sequence import Sequence


class HandoffPort(Protocol):
    """What the engine needs of `cluster.transfer.receiver.HandoffReceiver`."""

    def expect(self, handoff_id: HandoffId, first_token: int, num_tokens: int, sink: HandoffSink) -> None: ...

    def cancel(self, handoff_id: HandoffId) -> HandoffCancelState: ...


class HandoffListener(Protocol):
    """Called on the engine's thread; neither is called for a hand-off that was withdrawn."""

    def on_handoff_committed(self, sequence: Sequence, num_tokens: int) -> None: ...

    def on_handoff_failed(self, sequence: Sequence, handoff_id: HandoffId, error: HandoffError) -> None: ...


class Handoffs:
    """Expects hand-offs into sequences' blocks and reports each one's end, once, on the engine's thread."""

    def __init__(
        self,
        port: HandoffPort,
        executor: StepExecutor,
        post: Callable[[Call], None],
        metrics: DecodeMetrics,
    ) -> None:
        self._port = port
        self._executor = executor
        self._post = post
        self._metrics = metrics
        self._waiting: dict[HandoffId, Sequence] = {}

    def expect(self, sequence: Sequence, handoff_id: HandoffId, listener: HandoffListener) -> None:
        """Wait for KV of the sequence's tokens [committed, prompt - 1). Raises DuplicateHandoffError."""
        assert sequence.reservation is not None, "a hand-off needs reserved blocks"
        if handoff_id in self._waiting:
            raise DuplicateHandoffError(f"hand-off {handoff_id} is expected already")
        sink = PoolSink(
            self._executor,
            sequence.reservation.block_ids,
            self._executor.layout.block_size_tokens,
            on_commit=lambda valid: self._post(partial(self._committed, handoff_id, valid, listener)),
            on_abort=lambda error: self._post(partial(self._failed, handoff_id, error, listener)),
        )
        num_tokens = sequence.num_prompt - 1 - sequence.committed
        self._port.expect(handoff_id, sequence.committed, num_tokens, sink)
        self._waiting[handoff_id] = sequence
        self._metrics.handoffs_receiving.set(len(self._waiting))

    def withdraw(self, handoff_id: HandoffId) -> None:
        """Nothing is written to the sequence's blocks once this returns. A no-op for an ended hand-off."""
        if self._ended(handoff_id, "withdrawn") is not None:
            self._port.cancel(handoff_id)

    def _committed(self, handoff_id: HandoffId, num_tokens: int, listener: HandoffListener) -> None:
        sequence = self._ended(handoff_id, "committed")
        if sequence is not None:
            self._metrics.handoff_bytes.inc(num_tokens * self._executor.layout.bytes_per_token)
            listener.on_handoff_committed(sequence, num_tokens)

    def _failed(self, handoff_id: HandoffId, error: HandoffError, listener: HandoffListener) -> None:
        sequence = self._ended(handoff_id, error.code)
        if sequence is not None:
            listener.on_handoff_failed(sequence, handoff_id, error)

    def _ended(self, handoff_id: HandoffId, outcome: str) -> Sequence | None:
        """None: it ended before."""
        sequence = self._waiting.pop(handoff_id, None)
        if sequence is not None:
            self._metrics.handoffs.labels(outcome=outcome).inc()
            self._metrics.handoffs_receiving.set(len(self._waiting))
        return sequence
