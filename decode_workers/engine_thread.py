"""The one thread that drives the engine: it steps while there is work and sleeps while there is none."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from cluster.messages import DecodeEvent
from decode_workers.engine import DecodeEngine
from decode_workers.inbox import Inbox

MAX_SLEEP_S = 1.0
MAX_FAILED_STEPS = 3
"""Steps that may fail in a row before the worker calls itself unhealthy."""

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


class EngineThread:
    """`deliver` gets each step's events, `on_crash` what ended the thread; both are called from it."""

    def __init__(
        self,
        engine: DecodeEngine,
        inbox: Inbox,
        deliver: Callable[[list[DecodeEvent]], None],
        on_crash: Callable[[Exception], None],
        stall_timeout_s: float,
    ) -> None:
        self._engine = engine
        self._inbox = inbox
        self._deliver = deliver
        self._on_crash = on_crash
        self._stall_timeout_s = stall_timeout_s
        self._is_stopping = False
        self._is_working = False
        self._progress_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="decode-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End the thread after the steps that have begun; false where it is still in one."""
        self._is_stopping = True
        self._inbox.post(lambda: None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def ask(self, question: Callable[[], Answer]) -> Future[Answer]:
        """Call it on the engine's thread, between two steps of its own; those of a run may be under way."""
        future: Future[Answer] = Future()

        def answer() -> None:
            try:
                future.set_result(question())
            except Exception as error:  # noqa: BLE001 - it is the asker's, raised from the future
                future.set_exception(error)

        self._inbox.post(answer)
        return future

    def find_fault(self) -> str | None:
        """Why the engine is unhealthy: by progress, not by being alive. None while it is well."""
        if not self._thread.is_alive():
            return "the engine's thread is not running"
        silence_s = time.monotonic() - self._progress_s
        if self._is_working and silence_s > self._stall_timeout_s:
            return f"no step for {silence_s:.1f} s with work queued"
        if self._engine.num_failed_steps >= MAX_FAILED_STEPS:
            return f"the last {self._engine.num_failed_steps} steps failed"
        return None

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._work()
                self._is_working = False
                self._inbox.wait(self._sleep_s())
        except Exception as error:
            logger.exception("the decode engine crashed")
            self._on_crash(error)
        finally:
            self._engine.end_run()

    def _work(self) -> None:
        """Step until there is nothing to do."""
        self._progress_s, self._is_working = time.monotonic(), True
        while not self._is_stopping:
            self._inbox.drain()
            events = self._engine.step()
            self._progress_s = time.monotonic()
            if events:
                self._deliver(events)
            if not len(self._inbox) and not self._engine.has_work:
                return

    def _sleep_s(self) -> float:
        due_ns = self._engine.roster.next_due_ns()
        if due_ns is None:
            return MAX_SLEEP_S
        return min(MAX_SLEEP_S, max(0.0, (due_ns - time.time_ns()) / 1e9))
