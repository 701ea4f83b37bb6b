"""The hand-offs a receiver knows, as one state machine shared by its threads.

    expected -> in_flight -> committed
        \\           \\-----> aborted | cancelled
         \\-----------------> aborted | cancelled

Who may touch a sink when: `write` only in flight and under the hand-off's own lock, which every
transition takes too. So once a transition out of `in_flight` returned, no write runs or will ever run, and
the blocks behind the sink may be reused. `commit` and `abort` are called outside every lock: a sink
may take locks of its own there.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from enum import StrEnum

from cluster.ids import HandoffId
from cluster.messages import HandoffCancelState, Record
from cluster.transfer import HandoffError, HandoffSink, KvChunk

MAX_FINISHED_REMEMBERED = 4096
"""Finished ids kept, oldest dropped, so that a late or repeated push gets a true answer."""

logger = logging.getLogger(__name__)


class HandoffState(StrEnum):
    EXPECTED = "expected"
    IN_FLIGHT = "in_flight"
    COMMITTED = "committed"
    ABORTED = "aborted"
    CANCELLED = "cancelled"


LIVE_STATES = frozenset({HandoffState.EXPECTED, HandoffState.IN_FLIGHT})


class DuplicateHandoffError(ValueError):
    """This hand-off id was expected before; ids are never used twice. Handled by the decode engine."""


class Expectation(Record, frozen=True, kw_only=True):
    handoff_id: HandoffId
    first_token: int
    num_tokens: int


class Finished(Record, frozen=True, kw_only=True):
    state: HandoffState
    reason: str


class Handoff:
    """One expected hand-off; made by the ledger, written through by the Push that claimed it."""

    def __init__(self, expectation: Expectation, sink: HandoffSink, now_s: float) -> None:
        self.expectation = expectation
        self.progress_at_s = now_s
        """Monotonic seconds of the last frame, or of the expectation."""
        self._sink = sink
        self._lock = threading.Lock()
        self._state = HandoffState.EXPECTED
        self._error: HandoffError | None = None
        self._interrupt: Callable[[], None] | None = None

    @property
    def state(self) -> HandoffState:
        return self._state

    def begin(self, interrupt: Callable[[], None]) -> None:
        """Claim it for one Push; `interrupt` is called, from any thread, if somebody else ends it."""
        with self._lock:
            if self._state is not HandoffState.EXPECTED:
                raise self._error or HandoffError("not_found", "another push of this hand-off is in flight")
            self._state = HandoffState.IN_FLIGHT
            self._interrupt = interrupt

    def write(self, chunk: KvChunk) -> None:
        with self._lock:
            if self._state is not HandoffState.IN_FLIGHT:
                raise self.ended_error()
            self._sink.write(chunk)

    def ended_error(self) -> HandoffError:
        """Why it is no longer in flight, for the Push that was interrupted."""
        return self._error or HandoffError("internal", f"the hand-off is {self._state}")

    def end(self, state: HandoffState, error: HandoffError | None) -> HandoffState:
        """Leave the live states; returns the state found, and changes nothing where it was final."""
        with self._lock:
            found = self._state
            if found not in LIVE_STATES:
                return found
            if state is HandoffState.COMMITTED and found is not HandoffState.IN_FLIGHT:
                raise AssertionError(f"commit of a hand-off that is {found}")
            self._state, self._error = state, error
            interrupt, self._interrupt = self._interrupt, None
        if interrupt is not None and state is not HandoffState.COMMITTED:
            interrupt()
        return found

    def tell_committed(self) -> None:
        """Raises HandoffError where the sink cannot commit; the sink then heard `abort`."""
        try:
            self._sink.commit(self.expectation.num_tokens)
        except Exception as error:
            logger.exception("committing hand-off %s", self.expectation.handoff_id)
            failure = HandoffError("internal", f"the receiver could not commit: {error}")
            self.tell_aborted(failure)
            raise failure from error

    def tell_aborted(self, error: HandoffError) -> None:
        try:
            self._sink.abort(error)
        except Exception:
            logger.exception("aborting hand-off %s", self.expectation.handoff_id)


class HandoffLedger:
    """All live hand-offs and a bounded memory of finished ones. Any thread may call any method."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._live: dict[HandoffId, Handoff] = {}
        self._finished: OrderedDict[HandoffId, Finished] = OrderedDict()

    @property
    def num_live(self) -> int:
        return len(self._live)

    def expect(self, expectation: Expectation, sink: HandoffSink) -> None:
        """Raises DuplicateHandoffError."""
        handoff_id = expectation.handoff_id
        with self._lock:
            if handoff_id in self._live or handoff_id in self._finished:
                raise DuplicateHandoffError(f"hand-off {handoff_id} was expected before")
            self._live[handoff_id] = Handoff(expectation, sink, self._clock())

    def begin(self, handoff_id: HandoffId, interrupt: Callable[[], None]) -> Handoff:
        """Claim an expected hand-off for a Push. Raises HandoffError where there is none to claim."""
        with self._lock:
            handoff = self._live.get(handoff_id)
            finished = self._finished.get(handoff_id)
        if handoff is None:
            raise _refusal(handoff_id, finished)
        handoff.begin(interrupt)
        handoff.progress_at_s = self._clock()
        return handoff

    def write(self, handoff: Handoff, chunk: KvChunk) -> None:
        handoff.write(chunk)
        handoff.progress_at_s = self._clock()

    def commit(self, handoff: Handoff) -> None:
        """Raises the HandoffError it ended with where it ended before."""
        if handoff.end(HandoffState.COMMITTED, None) is not HandoffState.IN_FLIGHT:
            raise handoff.ended_error()
        self._remember(handoff, Finished(state=HandoffState.COMMITTED, reason="committed"))
        handoff.tell_committed()

    def abort(self, handoff: Handoff, error: HandoffError) -> bool:
        """Tell the sink, unless the hand-off ended before; returns whether it was this call that ended it."""
        if handoff.end(HandoffState.ABORTED, error) not in LIVE_STATES:
            return False
        self._remember(handoff, Finished(state=HandoffState.ABORTED, reason=str(error)))
        handoff.tell_aborted(error)
        return True

    def cancel(self, handoff_id: HandoffId, error: HandoffError, *, tells_sink: bool) -> HandoffCancelState:
        with self._lock:
            handoff = self._live.get(handoff_id)
            finished = self._finished.get(handoff_id)
        found = finished and finished.state if handoff is None else handoff.end(HandoffState.CANCELLED, error)
        if handoff is None or found not in LIVE_STATES:
            is_committed = found is HandoffState.COMMITTED
            return HandoffCancelState.ALREADY_COMPLETE if is_committed else HandoffCancelState.NOT_FOUND
        self._remember(handoff, Finished(state=HandoffState.CANCELLED, reason=str(error)))
        if tells_sink:
            handoff.tell_aborted(error)
        if found is HandoffState.EXPECTED:
            return HandoffCancelState.CANCELLED_BEFORE_ADVERTISE
        return HandoffCancelState.CANCEL_REQUESTED_IN_FLIGHT

    def expire(self, timeout_s: float) -> float | None:
        """Abort what stood still for `timeout_s`; returns seconds until the next may, if any is live."""
        now_s = self._clock()
        with self._lock:
            live = list(self._live.values())
        waits_s = []
        for handoff in live:
            wait_s = handoff.progress_at_s + timeout_s - now_s
            if wait_s > 0:
                waits_s.append(wait_s)
            else:
                self.abort(handoff, HandoffError("timeout", f"no frame for {timeout_s:g} s"))
        return min(waits_s, default=None)

    def abort_all(self, error: HandoffError) -> None:
        with self._lock:
            live = list(self._live.values())
        for handoff in live:
            self.abort(handoff, error)

    def _remember(self, handoff: Handoff, finished: Finished) -> None:
        handoff_id = handoff.expectation.handoff_id
        with self._lock:
            del self._live[handoff_id]
            self._finished[handoff_id] = finished
            while len(self._finished) > MAX_FINISHED_REMEMBERED:
                self._finished.popitem(last=False)


def _refusal(handoff_id: HandoffId, finished: Finished | None) -> HandoffError:
    """What a push of an id that is not live hears."""
    if finished is None:
        return HandoffError("not_found", f"no hand-off {handoff_id} is expected here")
    if finished.state is HandoffState.COMMITTED:
        return HandoffError("already_complete", f"hand-off {handoff_id} was committed before")
    return HandoffError("not_found", f"hand-off {handoff_id} ended before: {finished.reason}")
