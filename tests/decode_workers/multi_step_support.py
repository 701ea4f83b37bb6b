"""`HashExecutor` with runs of several steps, as a GPU has them: it may be steps ahead of who listens."""

from collections import deque
from collections.abc import Callable

import msgspec
import numpy as np

from decode_workers.step_batch import Int32Array, StepBatch, StepResult
from megakernel.multi_step import HostRun, MultiStep, StepRun, StepTokens, check_multi_step
from megakernel.step import Rows, StepError, StepOutput
from tests.decode_workers.support import MAX_CONTEXT_TOKENS, VOCAB_SIZE, HashExecutor


class MultiHashExecutor(HashExecutor):
    """Asserts that nothing else runs beside a run."""

    def __init__(
        self,
        num_blocks: int = 32,
        *,
        num_ahead: Callable[[], int] = lambda: 0,
        max_steps_per_launch: int = 64,
        max_rows: int = 64,
    ) -> None:
        """`num_ahead`: steps that the device may be ahead by, asked each time somebody listens."""
        super().__init__(num_blocks, max_rows=max_rows)
        self.max_steps_per_launch = max_steps_per_launch
        self.num_ahead = num_ahead
        self.asked: list[MultiStep] = []
        self.run_under_way: AheadRun | None = None

    def start(self, run: MultiStep) -> StepRun:
        assert self.run_under_way is None, "two runs at once"
        check_multi_step(
            run,
            max_rows=self.buckets[-1],
            vocab_size=VOCAB_SIZE,
            max_context_tokens=MAX_CONTEXT_TOKENS,
        )
        self.asked.append(run)
        self.run_under_way = AheadRun(self, run)
        return self.run_under_way

    def run(self, batch: StepBatch) -> StepResult:
        assert self.run_under_way is None, "a step beside a run"
        return super().run(batch)

    def copy_slots(self, source: Int32Array, destination: Int32Array) -> None:
        assert self.run_under_way is None, "KV copied beside a run"
        super().copy_slots(source, destination)

    def run_rows(self, rows: Rows) -> StepOutput:
        fields = {name: getattr(rows, name) for name in StepBatch.__struct_fields__}
        try:
            result = super().run(StepBatch(**fields))
        except MemoryError as error:
            raise StepError(str(error)) from error
        assert result.reductions is not None
        return StepOutput(
            logits=result.logits, reductions=result.reductions, allowed_logits=np.empty(0, dtype=np.float32)
        )


class AheadRun:
    """Steps go into a ring as they are run: up to `num_ahead` of them before anybody asks."""

    def __init__(self, executor: MultiHashExecutor, run: MultiStep) -> None:
        self._executor = executor
        self._host_run = HostRun(executor.run_rows, run, executor.layout.block_size_tokens)
        self._ring: deque[StepTokens | StepError | None] = deque()
        self.has_stopped = False
        self._go_ahead()

    def next(self) -> StepTokens | None:
        assert self._executor.run_under_way is self, "asked after the end"
        self._go_ahead(at_least=1)
        told = self._ring.popleft()
        if isinstance(told, StepTokens):
            self._go_ahead()
            return told
        self._executor.run_under_way = None
        if told is None:
            return None
        raise told

    def stop(self) -> None:
        self.has_stopped = True
        self._host_run.stop()

    def _go_ahead(self, at_least: int = 0) -> None:
        while len(self._ring) < max(at_least, self._executor.num_ahead()):
            if self._ring and not isinstance(self._ring[-1], StepTokens):
                return
            try:
                self._ring.append(self._host_run.next())
            except StepError as error:
                self._ring.append(error)


def asked_steps(executor: MultiHashExecutor) -> list[int]:
    return [run.num_steps for run in executor.asked]


def without_stamps(event: object) -> object:
    """An event as it would be at any other time."""
    if hasattr(event, "stamps_ns"):
        return msgspec.structs.replace(event, stamps_ns={})  # type: ignore[type-var]
    return event
