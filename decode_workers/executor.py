"""The seam between the decode engine and what runs a step."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from cluster.kv_layout import KvLayout
from cluster.messages import StepCost
from decode_workers.step_batch import Int32Array, StepBatch, StepResult
from megakernel.multi_step import MultiStep, StepRun


class StepExecutor(Protocol):
    """Runs steps and owns the KV pool's memory. Driven by one thread, except `write_kv`."""

    @property
    def layout(self) -> KvLayout: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def buckets(self) -> Sequence[int]:
        """Row counts compiled for, ascending; a batch never has more rows than the last."""
        ...

    def run(self, batch: StepBatch) -> StepResult:
        """One step. A row's result is the same, bit for bit, whatever other rows are in the batch."""
        ...

    def copy_slots(self, source: Int32Array, destination: Int32Array) -> None:
        """Copy KV of all layers from slots to slots (copy-on-write; an accepted path moving to its place).

        The sets may overlap: all of `source` is read before any of `destination` is written.
        """
        ...

    def write_kv(self, layer: int, slots: Int32Array, data: memoryview) -> None:
        """Put one layer of len(slots) tokens, in wire order (KvLayout), into slots no row is using.

        Called from the hand-off's thread while `run` may be running on other slots.
        """
        ...

    def measure(self) -> tuple[StepCost, ...]:
        """Milliseconds a step by row bucket, measured now on a scratch batch."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class MultiStepExecutor(StepExecutor, Protocol):
    """One that can also run several steps without the host in between."""

    @property
    def max_steps_per_launch(self) -> int:
        """1: nothing is won by more."""
        ...

    def start(self, run: MultiStep) -> StepRun:
        """Begin a run; until it has ended, `run`, `copy_slots`, `measure` and `start` must not be called.

        Its tokens are those that `run` would give, one step after the other. Raises StepError.
        """
        ...
