"""The one thread that drives a prefill engine: admit, step, release; asleep when there is nothing to do.

Who holds a job's blocks, and until when:

    queued     nobody      `submit` .. admission
    computing  the engine  admission .. its PrefillDone
    held       the engine  .. `withdraw`, which the servicer calls once the hand-off ended either way

Blocks are released nowhere else, whatever failed: until `withdraw`, the transport may read them.
"""

import contextlib
import logging
import threading
import time
from concurrent.futures import Future, InvalidStateError
from typing import TypeVar

from cluster.ids import HandoffId, RequestId
from cluster.messages import Record, StepCost
from cluster.metrics import PrefillMetrics
from prefill_workers.batcher import PrefillQueue
from prefill_workers.engine import Held, PrefillDone, PrefillEngine, PrefillFailed, PrefillJob
from prefill_workers.kv_export import KvExport
from prefill_workers.step_table import measure_step_table

MAX_CONSECUTIVE_FAILURES = 3
"""An engine whose steps fail this often in a row is taken for broken."""

logger = logging.getLogger(__name__)

T = TypeVar("T")


class JobFailedError(Exception):
    """The engine could not compute this job. Handled by the servicer: INTERNAL."""


class EngineStoppedError(Exception):
    """The engine's thread is not running: stopping, or dead of an earlier error. UNAVAILABLE."""


class EngineLoad(Record, frozen=True, kw_only=True):
    queued_requests: int
    running_requests: int
    queued_tokens: int
    free_kv_tokens: int
    held: Held


class Ticket:
    """One job's way through the loop; the futures are resolved from the engine's thread."""

    def __init__(self, handoff_id: HandoffId, job: PrefillJob, export: KvExport) -> None:
        self.handoff_id = handoff_id
        self.job = job
        self.export = export
        self.admitted: Future[None] = Future()
        self.computed: Future[PrefillDone] = Future()

    def fail(self, error: Exception) -> None:
        with contextlib.suppress(InvalidStateError):
            self.admitted.set_exception(error)
        with contextlib.suppress(InvalidStateError):
            self.computed.set_exception(error)
        self.export.fail(error)


class EngineLoop:
    """Every method but the private ones may be called from any thread."""

    def __init__(
        self, engine: PrefillEngine, max_queued: int, metrics: PrefillMetrics, stall_timeout_s: float
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._stall_timeout_s = stall_timeout_s
        self._changed = threading.Condition()
        # All below is guarded by `_changed`.
        self._queue = PrefillQueue(max_queued)
        self._tickets: dict[HandoffId, Ticket] = {}
        self._to_release: list[Ticket] = []
        self._is_stopping = False
        self._error: BaseException | None = None
        self._free_kv_tokens, self._held = 0, Held(num_jobs=0)
        # All below is the engine thread's own.
        self._admitted: dict[RequestId, Ticket] = {}
        self._computing: dict[RequestId, Ticket] = {}
        self._failed: set[RequestId] = set()
        self._num_consecutive_failures = 0
        self._turn_started_s: float | None = None
        self._thread: threading.Thread | None = None

    def start(self, max_step_tokens: int, vocab_size: int) -> Future[tuple[StepCost, ...]]:
        """Start the thread; resolves with the step table once measured, or with why the engine failed."""
        ready: Future[tuple[StepCost, ...]] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(ready, max_step_tokens, vocab_size), name="prefill-engine", daemon=True
        )
        self._thread.start()
        return ready

    def stop(self, timeout_s: float) -> bool:
        """Fail what is left and end after the current step; whether the thread ended in time. Blocks."""
        self._end(None)
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def submit(self, ticket: Ticket, deadline_unix_ns: int | None) -> None:
        """Queue a job. Raises QueueFullError or EngineStoppedError. Ids must differ."""
        with self._changed:
            if not self._can_run:
                raise EngineStoppedError(f"the prefill engine is not running: {self._error or 'stopping'}")
            self._queue.offer(ticket.handoff_id, ticket.job, deadline_unix_ns)
            self._tickets[ticket.handoff_id] = ticket
            self._changed.notify()

    def withdraw(self, handoff_id: HandoffId) -> None:
        """Drop a job wherever it is: out of the queue, or its blocks released after the current step."""
        with self._changed:
            ticket = self._tickets.pop(handoff_id, None)
            if ticket is not None and not self._queue.remove(handoff_id):
                self._to_release.append(ticket)
                self._changed.notify()

    def is_queued(self, handoff_id: HandoffId) -> bool:
        with self._changed:
            return handoff_id in self._queue

    def load(self) -> EngineLoad:
        with self._changed:
            running = [t for t in self._tickets.values() if t.handoff_id not in self._queue]
            return EngineLoad(
                queued_requests=len(self._queue),
                running_requests=len(running),
                queued_tokens=self._queue.num_tokens + sum(t.export.num_tokens_missing for t in running),
                free_kv_tokens=self._free_kv_tokens,
                held=self._held,
            )

    def is_healthy(self) -> bool:
        """The thread runs, and no turn of it takes longer than the stall timeout."""
        started_s = self._turn_started_s
        is_stalled = started_s is not None and time.monotonic() - started_s > self._stall_timeout_s
        return self._can_run and not is_stalled

    @property
    def _can_run(self) -> bool:
        is_alive = self._thread is not None and self._thread.is_alive()
        return is_alive and self._error is None and not self._is_stopping

    def _run(self, ready: Future[tuple[StepCost, ...]], max_step_tokens: int, vocab_size: int) -> None:
        try:
            most = min(max_step_tokens, self._engine.free_kv_tokens)
            table = measure_step_table(self._engine, most, vocab_size)
            self._publish()
            ready.set_result(table)
            while self._wait_for_work():
                self._turn_started_s = time.monotonic()
                self._turn()
                self._turn_started_s = None
        except Exception as error:
            logger.exception("the prefill engine's thread died")
            self._end(error)
            if not ready.done():
                ready.set_exception(error)

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False to end."""
        with self._changed:
            while not self._is_stopping:
                if self._to_release or self._is_steppable() or self._next_admissible() is not None:
                    return True
                self._changed.wait()
            return False

    def _turn(self) -> None:
        self._release_withdrawn()
        self._admit_what_fits()
        if self._is_steppable():
            self._step()
        self._publish()

    def _is_steppable(self) -> bool:
        # A failed job would fail the next step too: it leaves first, which its servicer sees to.
        return not self._failed and self._engine.has_work()

    def _release_withdrawn(self) -> None:
        with self._changed:
            tickets, self._to_release = self._to_release, []
        for ticket in tickets:
            request_id = ticket.job.request_id
            if self._admitted.pop(request_id, None) is not None:
                self._engine.release(request_id)
            self._computing.pop(request_id, None)
            self._failed.discard(request_id)

    def _next_admissible(self) -> Ticket | None:
        """The most urgent ticket, where the engine can take it, or never will; `_changed` is held."""
        head = self._queue.head()
        if head is None:
            return None
        # What was released may have an end that the engine still waits for.
        is_idle = not self._admitted and not self._engine.has_work()
        return self._tickets[head.handoff_id] if self._engine.can_admit(head.job) or is_idle else None

    def _admit_what_fits(self) -> None:
        while True:
            with self._changed:
                ticket = self._next_admissible()
                if ticket is None:
                    return
                self._queue.remove(ticket.handoff_id)
            self._admit(ticket)

    def _admit(self, ticket: Ticket) -> None:
        job = ticket.job
        if not self._engine.can_admit(job):
            ticket.fail(JobFailedError(f"the engine, idle, has no room for {len(job.token_ids)} tokens"))
            return
        try:
            self._engine.admit(job, ticket.export.put)
        except Exception as error:
            logger.exception("admitting %s", job.request_id)
            ticket.fail(JobFailedError(f"the engine refused the job: {error}"))
            return
        self._admitted[job.request_id] = self._computing[job.request_id] = ticket
        with contextlib.suppress(InvalidStateError):
            ticket.admitted.set_result(None)

    def _step(self) -> None:
        try:
            finished = self._engine.step()
        except Exception as error:
            self._num_consecutive_failures += 1
            self._fail_computing(JobFailedError(f"the engine's step failed: {error}"))
            if self._num_consecutive_failures >= MAX_CONSECUTIVE_FAILURES or not self._failed:
                raise
            logger.exception("a prefill step failed")
            return
        self._num_consecutive_failures = 0
        for end in finished:
            ticket = self._computing.pop(end.request_id)
            if isinstance(end, PrefillFailed):
                self._failed_alone(ticket, end)
            else:
                self._finish(ticket, end)

    def _finish(self, ticket: Ticket, done: PrefillDone) -> None:
        self._metrics.computed_tokens.inc(len(ticket.job.token_ids) - done.cached_tokens)
        self._metrics.cached_tokens.inc(done.cached_tokens)
        ticket.export.forward_ended()
        with contextlib.suppress(InvalidStateError):
            ticket.computed.set_result(done)

    def _failed_alone(self, ticket: Ticket, failed: PrefillFailed) -> None:
        logger.error("prefill of %s: %s", failed.request_id, failed.message)
        ticket.fail(JobFailedError(failed.message))

    def _fail_computing(self, error: JobFailedError) -> None:
        self._failed.update(self._computing)
        for ticket in self._computing.values():
            ticket.fail(error)
        self._computing.clear()

    def _publish(self) -> None:
        free_kv_tokens, held = self._engine.free_kv_tokens, self._engine.held
        with self._changed:
            self._free_kv_tokens, self._held = free_kv_tokens, held

    def _end(self, error: BaseException | None) -> None:
        with self._changed:
            self._error = self._error or error
            self._is_stopping = True
            tickets = list(self._tickets.values())
            self._changed.notify()
        for ticket in tickets:
            ticket.fail(EngineStoppedError(f"the prefill engine is not running: {error or 'stopping'}"))
