"""The receiver's state machine against a model of it, and its promise about writes under threads."""

import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from cluster.ids import HandoffId
from cluster.messages import HandoffCancelState as Cancelled
from cluster.transfer import HandoffError
from cluster.transfer import ledger as ledger_module
from cluster.transfer.ledger import DuplicateHandoffError, Expectation, Handoff, HandoffLedger, HandoffState
from tests.cluster.transfer.loopback import KeepingSink, chunk

TIMEOUT_S = 10.0


def expectation(handoff_id: HandoffId) -> Expectation:
    return Expectation(handoff_id=handoff_id, first_token=0, num_tokens=4)


class Modelled:
    """What the model believes of one hand-off."""

    def __init__(self, sink: KeepingSink, now_s: float) -> None:
        self.sink = sink
        self.state = HandoffState.EXPECTED
        self.progress_s = now_s
        self.push: Handoff | None = None
        self.num_writes = 0
        self.num_interrupts = 0
        self.is_told = True
        """Whether the sink should have heard of an abort."""


class LedgerMachine(RuleBasedStateMachine):
    ids: Bundle[HandoffId] = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.ledger = HandoffLedger(clock=lambda: self.now_s)
        self.model: dict[HandoffId, Modelled] = {}
        self.num_made = 0

    @rule(target=ids)
    def expect(self) -> HandoffId:
        handoff_id = HandoffId(f"kv-{self.num_made}")
        self.num_made += 1
        sink = KeepingSink()
        self.ledger.expect(expectation(handoff_id), sink)
        self.model[handoff_id] = Modelled(sink, self.now_s)
        return handoff_id

    @rule(handoff_id=ids)
    def expect_again(self, handoff_id: HandoffId) -> None:
        with pytest.raises(DuplicateHandoffError):
            self.ledger.expect(expectation(handoff_id), KeepingSink())

    @rule(handoff_id=ids)
    def begin(self, handoff_id: HandoffId) -> None:
        known = self.model[handoff_id]

        def interrupted() -> None:
            known.num_interrupts += 1

        if known.state is HandoffState.EXPECTED:
            known.push = self.ledger.begin(handoff_id, interrupted)
            known.state, known.progress_s = HandoffState.IN_FLIGHT, self.now_s
        else:
            with pytest.raises(HandoffError) as caught:
                self.ledger.begin(handoff_id, interrupted)
            is_done = known.state is HandoffState.COMMITTED
            assert caught.value.code == ("already_complete" if is_done else "not_found")

    @rule(handoff_id=ids)
    def write(self, handoff_id: HandoffId) -> None:
        known = self.model[handoff_id]
        if known.push is None:
            return
        if known.state is HandoffState.IN_FLIGHT:
            self.ledger.write(known.push, chunk(0, known.num_writes, 1))
            known.num_writes += 1
            known.progress_s = self.now_s
        else:
            with pytest.raises(HandoffError):
                self.ledger.write(known.push, chunk(0, 0, 1))

    @rule(handoff_id=ids)
    def commit(self, handoff_id: HandoffId) -> None:
        known = self.model[handoff_id]
        if known.push is None:
            return
        if known.state is HandoffState.IN_FLIGHT:
            self.ledger.commit(known.push)
            known.state = HandoffState.COMMITTED
        elif known.state is not HandoffState.COMMITTED:
            with pytest.raises(HandoffError):
                self.ledger.commit(known.push)

    @rule(handoff_id=ids)
    def abort(self, handoff_id: HandoffId) -> None:
        known = self.model[handoff_id]
        if known.push is None:
            return
        ended = self.ledger.abort(known.push, HandoffError("internal", "said the test"))
        assert ended == (known.state is HandoffState.IN_FLIGHT)
        if ended:
            known.state = HandoffState.ABORTED

    @rule(handoff_id=ids, tells_sink=st.booleans())
    def cancel(self, handoff_id: HandoffId, tells_sink: bool) -> None:
        known = self.model[handoff_id]
        state = self.ledger.cancel(
            handoff_id, HandoffError("cancelled", "said the test"), tells_sink=tells_sink
        )
        assert state == {
            HandoffState.EXPECTED: Cancelled.CANCELLED_BEFORE_ADVERTISE,
            HandoffState.IN_FLIGHT: Cancelled.CANCEL_REQUESTED_IN_FLIGHT,
            HandoffState.COMMITTED: Cancelled.ALREADY_COMPLETE,
        }.get(known.state, Cancelled.NOT_FOUND)
        if known.state in ledger_module.LIVE_STATES:
            known.state, known.is_told = HandoffState.CANCELLED, tells_sink

    @precondition(lambda self: self.model)
    @rule(seconds=st.sampled_from([1.0, TIMEOUT_S / 2, TIMEOUT_S]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        wait_s = self.ledger.expire(TIMEOUT_S)
        waits = []
        for known in self.model.values():
            if known.state in ledger_module.LIVE_STATES:
                remaining = known.progress_s + TIMEOUT_S - self.now_s
                if remaining <= 0:
                    known.state = HandoffState.ABORTED
                else:
                    waits.append(remaining)
        assert wait_s == min(waits, default=None)

    @invariant()
    def sinks_heard_exactly_what_happened(self) -> None:
        for known in self.model.values():
            sink = known.sink
            assert sink.num_writes == known.num_writes
            assert (sink.committed is not None) == (known.state is HandoffState.COMMITTED)
            ended_badly = known.state in (HandoffState.ABORTED, HandoffState.CANCELLED)
            assert (sink.aborted is not None) == (ended_badly and known.is_told)
            was_interrupted = ended_badly and known.push is not None
            assert known.num_interrupts == (1 if was_interrupted else 0)

    @invariant()
    def only_the_living_are_live(self) -> None:
        live = sum(known.state in ledger_module.LIVE_STATES for known in self.model.values())
        assert self.ledger.num_live == live


LedgerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLedger = LedgerMachine.TestCase


def test_finished_ids_are_forgotten_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MAX_FINISHED_REMEMBERED", 3)
    ledger = HandoffLedger()
    for i in range(5):
        ledger.expect(expectation(HandoffId(f"kv-{i}")), KeepingSink())
        handoff = ledger.begin(HandoffId(f"kv-{i}"), lambda: None)
        ledger.commit(handoff)
    codes = []
    for i in range(5):
        with pytest.raises(HandoffError) as caught:
            ledger.begin(HandoffId(f"kv-{i}"), lambda: None)
        codes.append(caught.value.code)
    assert codes == ["not_found"] * 2 + ["already_complete"] * 3


def test_an_interrupt_or_a_sink_that_takes_the_callers_lock_does_not_deadlock() -> None:
    """The decode engine cancels while holding its own lock, which its callbacks take too."""
    engine_lock = threading.Lock()

    class LockingSink(KeepingSink):
        def abort(self, error: HandoffError) -> None:
            with engine_lock:
                super().abort(error)

    ledger = HandoffLedger()
    sink = LockingSink()
    ledger.expect(expectation(HandoffId("kv-a")), sink)
    handoff = ledger.begin(HandoffId("kv-a"), lambda: None)
    with engine_lock:
        aborting = threading.Thread(
            target=ledger.abort, args=(handoff, HandoffError("timeout", "said the test"))
        )
        aborting.start()
        # Whichever comes first: neither waits for the other's lock.
        ledger.cancel(HandoffId("kv-a"), HandoffError("cancelled", "said the test"), tells_sink=False)
    aborting.join(5)
    assert not aborting.is_alive()


@pytest.mark.parametrize("_attempt", range(20))
def test_no_write_follows_an_end_whatever_the_threads_do(_attempt: int) -> None:
    ledger = HandoffLedger()
    sink = KeepingSink()
    ledger.expect(expectation(HandoffId("kv-a")), sink)
    handoff = ledger.begin(HandoffId("kv-a"), lambda: None)
    start = threading.Barrier(2)
    refused: list[str] = []

    def write_until_refused() -> None:
        start.wait(5)
        try:
            for token in range(100_000):
                ledger.write(handoff, chunk(0, token, 1))
        except HandoffError as error:
            refused.append(error.code)

    writer = threading.Thread(target=write_until_refused)
    writer.start()
    start.wait(5)
    ledger.cancel(HandoffId("kv-a"), HandoffError("cancelled", "said the test"), tells_sink=False)
    writes = sink.num_writes
    writer.join(10)
    assert refused == ["cancelled"]
    assert sink.num_writes == writes
