"""Every live sequence and how it moves: submitted, admitted, handed KV, finished; the events tell of it.

Not thread-safe: the engine's thread owns it. `status` alone may be called from anywhere.
"""

import time
from collections.abc import Callable
from enum import StrEnum

from cluster.block_pool import OutOfBlocksError
from cluster.config import DecodeConfig
from cluster.ids import HandoffId, RequestId
from cluster.messages import (
    DecodeEvent,
    FailureCode,
    FinishReason,
    GenerateRequest,
    HandoffFailed,
    Reserved,
    SequenceFailed,
    SequenceFinished,
    StepCost,
    WorkerStatus,
)
from cluster.metrics import DecodeMetrics
from cluster.placement.predict import StepTable
from cluster.timeline import Stage
from cluster.transfer import HandoffError
from cluster.transfer.ledger import DuplicateHandoffError
from decode_workers.handoffs import Handoffs
from decode_workers.intake import Intake, InvalidRequestError
from decode_workers.kv_pool import KvPool, Reservation
from decode_workers.scheduler import AdmissionQueue
from decode_workers.sequence import Sequence, SequenceState
from decode_workers.targeting.chosen_items import ChosenItems
from decode_workers.timers import Timers

HANDOFF_PATIENCE = 2.0
"""A sequence waits this many hand-off timeouts in all for its KV, then computes it here."""


class _Due(StrEnum):
    DEADLINE = "deadline"
    HANDOFF = "handoff"


class Roster:
    def __init__(
        self,
        kv: KvPool,
        handoffs: Handoffs,
        intake: Intake,
        config: DecodeConfig,
        metrics: DecodeMetrics,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._kv = kv
        self._handoffs = handoffs
        self._intake = intake
        self._config = config
        self._metrics = metrics
        self._clock_ns = clock_ns
        self._live: dict[RequestId, Sequence] = {}
        self._queue = AdmissionQueue()
        self._awaiting: dict[RequestId, Sequence] = {}
        self.running: dict[RequestId, Sequence] = {}
        """In the order they started to run."""
        self._timers: Timers[tuple[_Due, RequestId]] = Timers()
        self._events: list[DecodeEvent] = []
        self._is_admission_blocked = False
        self._num_submitted = 0
        self.is_accepting = True

    # What routers ask for.

    def submit(self, request: GenerateRequest, items: ChosenItems | None = None) -> None:
        """Queue a request, or say at once why not. `items`: what a targeting request chooses from."""
        refusal = self._refusal(request)
        if refusal is not None:
            self._events.append(refusal)
            return
        self._num_submitted += 1
        try:
            sequence = self._intake.accept(request, arrival=self._num_submitted, items=items)
        except InvalidRequestError as error:
            self._events.append(_failed(request.request_id, FailureCode.INVALID, str(error)))
            return
        self._live[request.request_id] = sequence
        self._queue.push(sequence, self._clock_ns())
        self._is_admission_blocked = False
        if request.deadline_unix_ns is not None:
            self._timers.set((_Due.DEADLINE, request.request_id), request.deadline_unix_ns)
        if sequence.completion.finish_reason is not None:
            self.finish(sequence, sequence.completion.finish_reason)
        elif sequence.search is not None and sequence.search.is_done:
            self.finish(sequence, FinishReason.STOP)  # no item passes the filter

    def cancel(self, request_id: RequestId) -> None:
        """End a sequence with what there is. A no-op for one that ended."""
        sequence = self._live.get(request_id)
        if sequence is not None:
            self.finish(sequence, FinishReason.CANCELLED)

    def retry_handoff(self, request_id: RequestId, handoff_id: HandoffId) -> None:
        """Wait for this hand-off instead. A no-op for a sequence that waits for none."""
        sequence = self._awaiting.get(request_id)
        if sequence is not None:
            self._withdraw_handoff(sequence)
            self._expect_handoff(sequence, handoff_id)

    def prefill_locally(self, request_id: RequestId) -> None:
        """Stop waiting; the prompt runs as a chain of rows. A no-op for a sequence that waits for none."""
        sequence = self._awaiting.get(request_id)
        if sequence is not None:
            self._withdraw_handoff(sequence)
            self._start_running(sequence)

    def predict_by(self, table: StepTable | None) -> None:
        """What searches weigh one step of many rows against many of few by, from the next request on."""
        self._intake.step_table = table

    # What the step asks for.

    def expire(self) -> None:
        """Act on every deadline and hand-off timeout that has passed."""
        for what, request_id in self._timers.pop_due(self._clock_ns()):
            if what is _Due.DEADLINE:
                self.finish(self._live[request_id], FinishReason.DEADLINE)
            else:
                self.prefill_locally(request_id)

    def admit(self) -> None:
        """Reserve blocks for queued sequences, in order, until the first that does not fit."""
        while not self._is_admission_blocked:
            sequence = self._queue.first()
            if sequence is None or self._num_admitted >= self._config.max_running_sequences:
                return
            try:
                reservation = self._kv.reserve(sequence.tokens, sequence.salt, sequence.kv_tokens)
            except OutOfBlocksError:
                # Nothing changes until a sequence ends or the queue's head does.
                self._is_admission_blocked = True
            else:
                self._queue.remove(sequence)
                self._place(sequence, reservation)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        text = sequence.completion.finish(reason)
        usage = sequence.usage()
        self._retire(sequence, is_kv_sound=True)
        sequence.timeline.stamp(Stage.FINISHED)
        self._events.append(
            SequenceFinished(
                request_id=sequence.request.request_id,
                reason=sequence.completion.finish_reason or reason,
                usage=usage,
                stamps_ns=sequence.timeline.stamps_ns,
                text=text,
                stop_match=sequence.completion.stop_match,
                targeting=sequence.found_items(),
            )
        )

    def fail(self, sequence: Sequence, code: FailureCode, message: str, *, is_retryable: bool) -> None:
        """Drop a sequence whose KV may be wrong: none of it stays in the prefix cache."""
        self._retire(sequence, is_kv_sound=False)
        self._events.append(_failed(sequence.request.request_id, code, message, is_retryable=is_retryable))

    def fail_all(self, code: FailureCode, message: str) -> None:
        """Every live sequence, for its router to take elsewhere."""
        for sequence in list(self._live.values()):
            self.fail(sequence, code, message, is_retryable=True)

    def publish_prompt(self, sequence: Sequence) -> None:
        """Let others share a prompt as soon as it is computed, not only when its sequence ends."""
        sequence.is_prompt_published = True
        assert sequence.reservation is not None, "a computed prompt without blocks"
        if sequence.num_prompt - sequence.cached_tokens >= self._kv.block_size_tokens:
            self._kv.publish(sequence.reservation, sequence.tokens[: sequence.committed], sequence.salt)

    def emit(self, event: DecodeEvent) -> None:
        self._events.append(event)

    def take_events(self) -> list[DecodeEvent]:
        events, self._events = self._events, []
        return events

    # What the engine's surroundings ask for.

    @property
    def has_work(self) -> bool:
        """Whether a step now would do something."""
        return bool(self.running or self._events) or self.can_admit

    @property
    def can_admit(self) -> bool:
        """Whether a queued request may fit now."""
        is_full = self._num_admitted >= self._config.max_running_sequences
        return bool(len(self._queue)) and not (self._is_admission_blocked or is_full)

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def num_awaiting(self) -> int:
        """A hand-off's KV."""
        return len(self._awaiting)

    @property
    def num_live(self) -> int:
        return len(self._live)

    def next_due_ns(self) -> int | None:
        """When `expire` has something to do next, if nothing is submitted meanwhile."""
        return self._timers.next_ns()

    def count(self) -> None:
        """Bring the gauges up to date."""
        self._metrics.running.set(len(self.running))
        self._metrics.waiting.set(len(self._queue) + len(self._awaiting))

    def status(self, step_table: tuple[StepCost, ...]) -> WorkerStatus:
        # Copying a dict's values is one operation to other threads; each figure is right, if a step old.
        live = list(self._live.values())
        return WorkerStatus(
            queued_requests=len(self._queue),
            running_requests=self._num_admitted,
            queued_tokens=sum(s.uncomputed_prompt_tokens for s in live if self._is_own_work(s)),
            free_kv_tokens=self._kv.free_tokens,
            total_kv_tokens=self._kv.total_tokens,
            step_table=step_table,
            is_accepting=self.is_accepting and len(self._queue) < self._config.max_queued_requests,
        )

    def _is_own_work(self, sequence: Sequence) -> bool:
        """Whether the prompt runs here; what a hand-off brings is computed elsewhere."""
        return sequence.request.handoff_id is None or sequence.request.request_id in self.running

    # What hand-offs report.

    def on_handoff_committed(self, sequence: Sequence, num_tokens: int) -> None:
        sequence.timeline.stamp(Stage.HANDOFF_COMMITTED)
        sequence.committed += num_tokens
        self._start_running(sequence)

    def on_handoff_failed(self, sequence: Sequence, handoff_id: HandoffId, error: HandoffError) -> None:
        sequence.handoff_id = None
        self._emit_handoff_failed(sequence, handoff_id, str(error))

    # Moves.

    @property
    def _num_admitted(self) -> int:
        return len(self.running) + len(self._awaiting)

    def _refusal(self, request: GenerateRequest) -> SequenceFailed | None:
        request_id = request.request_id
        if not self.is_accepting:
            return _failed(request_id, FailureCode.UNAVAILABLE, "the worker is stopping", is_retryable=True)
        if request_id in self._live:
            return _failed(request_id, FailureCode.INVALID, f"request id {request_id} is in use")
        if len(self._queue) >= self._config.max_queued_requests:
            message = f"{len(self._queue)} requests are queued: at most {self._config.max_queued_requests}"
            return _failed(request_id, FailureCode.OVERLOADED, message, is_retryable=True)
        return None

    def _place(self, sequence: Sequence, reservation: Reservation) -> None:
        sequence.reservation = reservation
        sequence.committed = reservation.cached_tokens
        sequence.timeline.stamp(Stage.RESERVED)
        self._metrics.cached_tokens.inc(sequence.cached_tokens)
        handoff_id = sequence.request.handoff_id
        if handoff_id is None:
            self._start_running(sequence)
        elif sequence.committed >= sequence.num_prompt - 1:
            self._emit_reserved(sequence, handoff_id)
            self._start_running(sequence)
        else:
            sequence.state = SequenceState.AWAITING_HANDOFF
            self._awaiting[sequence.request.request_id] = sequence
            patience_ns = int(HANDOFF_PATIENCE * self._config.handoff_timeout_s * 1e9)
            self._timers.set((_Due.HANDOFF, sequence.request.request_id), self._clock_ns() + patience_ns)
            self._expect_handoff(sequence, handoff_id)

    def _expect_handoff(self, sequence: Sequence, handoff_id: HandoffId) -> None:
        try:
            self._handoffs.expect(sequence, handoff_id, self)
        except DuplicateHandoffError as error:
            self._emit_handoff_failed(sequence, handoff_id, str(error))
        else:
            sequence.handoff_id = handoff_id
            self._emit_reserved(sequence, handoff_id)

    def _withdraw_handoff(self, sequence: Sequence) -> None:
        if sequence.handoff_id is not None:
            self._handoffs.withdraw(sequence.handoff_id)
            sequence.handoff_id = None

    def _emit_reserved(self, sequence: Sequence, handoff_id: HandoffId) -> None:
        first_token = min(sequence.committed, sequence.num_prompt - 1)
        self._events.append(
            Reserved(request_id=sequence.request.request_id, handoff_id=handoff_id, first_token=first_token)
        )

    def _emit_handoff_failed(self, sequence: Sequence, handoff_id: HandoffId, message: str) -> None:
        self._events.append(
            HandoffFailed(request_id=sequence.request.request_id, handoff_id=handoff_id, message=message)
        )

    def _start_running(self, sequence: Sequence) -> None:
        request_id = sequence.request.request_id
        if self._awaiting.pop(request_id, None) is not None:
            self._timers.cancel((_Due.HANDOFF, request_id))
        sequence.state = SequenceState.RUNNING
        self.running[request_id] = sequence

    def _retire(self, sequence: Sequence, *, is_kv_sound: bool) -> None:
        """Out of every list; blocks back to the pool, what they hold to the prefix cache."""
        request_id = sequence.request.request_id
        self._is_admission_blocked = False
        match sequence.state:
            case SequenceState.QUEUED:
                self._queue.remove(sequence)
            case SequenceState.AWAITING_HANDOFF:
                self._withdraw_handoff(sequence)
                del self._awaiting[request_id]
                self._timers.cancel((_Due.HANDOFF, request_id))
            case SequenceState.RUNNING:
                del self.running[request_id]
            case SequenceState.FINISHED:
                raise AssertionError(f"{request_id} ended twice")
        self._timers.cancel((_Due.DEADLINE, request_id))
        sequence.state = SequenceState.FINISHED
        del self._live[request_id]
        if sequence.reservation is not None:
            if is_kv_sound:
                self._kv.publish(sequence.reservation, sequence.tokens[: sequence.committed], sequence.salt)
            self._kv.release(sequence.reservation)
            sequence.reservation = None


def _failed(
    request_id: RequestId, code: FailureCode, message: str, *, is_retryable: bool = False
) -> SequenceFailed:
    return SequenceFailed(request_id=request_id, code=code, message=message, is_retryable=is_retryable)
