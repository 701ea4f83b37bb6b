"""Several steps in one launch: what the kernel is handed, and how the host follows it while it runs."""

import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.cuda_arguments import LAST_STEP, MultiStepArguments, RowFlag
from megakernel.cuda_device import Address, CudaError, Driver, Stream
from megakernel.cuda_memory import HostStaging, Staging, place_arrays
from megakernel.cuda_rows import Limits, StepTables
from megakernel.draft_automaton import DraftAutomaton
from megakernel.multi_step import (
    MultiStep,
    SequenceState,
    StepTokens,
    check_multi_step,
    without_top,
)
from megakernel.step import IntArray, StepError

POLL_S = 20e-6
"""Between looks at how far the kernel is: a small part of a step."""
_CONTROL_BYTES = 256
_ALLOWED_AT = 32
"""Of the control words, so many after `told`: in another line of the cache."""


class RunTables(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Arrays of MultiStepArguments that are copied to the device, by the same names."""

    remaining: IntArray
    chain_lengths: IntArray
    draft_states: IntArray
    stop_starts: IntArray
    stop_token_ids: IntArray
    results: IntArray
    begun: IntArray


def step_tables(run: MultiStep, limits: Limits) -> tuple[StepTables, RunTables]:
    """The first step's rows, as the kernel writes those of the next, and what it keeps of sequences.

    Raises StepError.
    """
    check_multi_step(
        run,
        max_rows=limits.max_rows,
        vocab_size=limits.vocab_size,
        max_context_tokens=limits.max_context_tokens,
    )
    max_blocks = _check_blocks(run, limits)
    num_rows, rows_a_sequence = run.num_rows, run.rows_a_sequence
    token_ids, positions, contexts = (np.zeros(num_rows, dtype=np.int32) for _ in range(3))
    slots = np.arange(limits.num_slots, limits.num_slots + num_rows, dtype=np.int32)
    lengths = np.zeros(run.num_sequences, dtype=np.int32)
    for index in range(run.num_sequences):
        chain, context = SequenceState(run, index).chain(), int(run.context_lengths[index])
        own = slice(index * rows_a_sequence, index * rows_a_sequence + len(chain))
        places = np.arange(context, context + len(chain), dtype=np.int32)
        blocks = run.block_tables[index, places // limits.block_size_tokens]
        token_ids[own], positions[own], contexts[own] = chain, places, context
        slots[own] = blocks * limits.block_size_tokens + places % limits.block_size_tokens
        lengths[index] = len(chain)
    sequences = np.arange(run.num_sequences, dtype=np.int32)
    tables = StepTables(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        context_lengths=contexts,
        table_rows=np.repeat(sequences, rows_a_sequence),
        # All rows of a chain share one path: each of them reads as much of it as it has ancestors.
        path_starts=np.repeat(sequences * np.int32(rows_a_sequence), rows_a_sequence),
        path_slots=np.empty(0, dtype=np.int32),
        block_tables=np.ascontiguousarray(run.block_tables[:, :max_blocks]),
        row_flags=np.full(num_rows, RowFlag.WANTS_REDUCTIONS, dtype=np.int32),
        needed_spans=np.full(-(-limits.num_spans // 32), 0xFFFFFFFF, dtype=np.uint32),
        allowed_starts=np.zeros(num_rows + 1, dtype=np.int32),
        allowed_token_ids=np.empty(0, dtype=np.int32),
    )
    states = np.zeros(run.num_sequences, dtype=np.int32) if run.draft_states is None else run.draft_states
    kept = RunTables(
        remaining=run.max_new_tokens,
        chain_lengths=lengths,
        draft_states=states,
        stop_starts=run.stop_starts,
        stop_token_ids=run.stop_token_ids,
        results=np.zeros(1, dtype=np.int32),
        begun=np.zeros(1, dtype=np.int32),
    )
    return tables, kept


def _check_blocks(run: MultiStep, limits: Limits) -> int:
    """Blocks of the longest sequence, at its end."""
    size = limits.block_size_tokens
    # The last token that a sequence emits needs no KV; the pending one does.
    needed = -(-(run.context_lengths + run.max_new_tokens) // size)
    width = run.block_tables.shape[1]
    if (needed > width).any():
        at = int(needed.argmax())
        raise StepError(f"sequence {at}: its block table of {width} blocks needs {needed[at]}")
    is_used = np.arange(width) < needed[:, None]
    is_wrong = is_used & ((run.block_tables < 0) | (run.block_tables >= limits.num_blocks))
    if is_wrong.any():
        at, place = (int(found) for found in np.argwhere(is_wrong)[0])
        block = run.block_tables[at, place]
        raise StepError(f"sequence {at}: block {block} is not in a pool of {limits.num_blocks}")
    return int(needed.max())


class RunMemory:
    """What runs need beside a step's tables, kept from run to run."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.ring = HostStaging(driver)
        control = driver.allocate_host(_CONTROL_BYTES)
        self._control: npt.NDArray[np.uint32] = control.array.view(np.uint32)
        self._control_address: Address = control.address
        self._drafts: DraftAutomaton | None = None
        self._draft_staging = Staging(driver)
        self._draft_offsets: dict[str, int] = {}

    @property
    def told(self) -> int:
        return int(self._control[0])

    def allow(self, num_steps: int) -> None:
        self._control[_ALLOWED_AT] = num_steps

    def prepare(self, run: MultiStep, arguments: MultiStepArguments, stream: Stream, num_slots: int) -> None:
        """Everything of `arguments` but the tables."""
        words = run.num_sequences + 3 * run.num_rows
        self.ring.grown_to(4 * run.num_steps * words)
        self._control[0] = 0
        self.allow(run.num_steps)
        arguments.ring = self.ring.host.address
        arguments.told = self._control_address
        arguments.allowed = self._control_address + 4 * _ALLOWED_AT
        arguments.num_steps = run.num_steps
        arguments.num_sequences = run.num_sequences
        arguments.rows_a_sequence = run.rows_a_sequence
        arguments.first_unused_slot = num_slots
        self._put_drafts(run.drafts, arguments, stream)

    def step_at(self, run: MultiStep, number: int) -> StepTokens:
        """What step `number` told."""
        sequences, rows = run.num_sequences, run.num_rows
        words = sequences + 3 * rows
        start = 4 * number * words
        held = self.ring.host.array[start : start + 4 * words].copy()
        token_ids = held[4 * sequences :].view(np.int32)[:rows]
        maxima, log_sums = held[4 * (sequences + rows) :].view(np.float32).reshape(2, rows)
        if not run.needs_log_sums:
            log_sums[:] = np.nan
        return StepTokens(
            counts=held[: 4 * sequences].view(np.int32), reductions=without_top(token_ids, maxima, log_sums)
        )

    def _put_drafts(
        self, drafts: DraftAutomaton | None, arguments: MultiStepArguments, stream: Stream
    ) -> None:
        """Copied once for as many runs as name the same one after the other."""
        names = DraftAutomaton.__struct_fields__
        if drafts is None:
            for name in names:
                setattr(arguments, name, None)
            return
        if drafts is not self._drafts:
            self._drafts = None
            arrays = {name: getattr(drafts, name) for name in names}
            self._draft_offsets, num_bytes = place_arrays(arrays)
            staging = self._draft_staging.grown_to(num_bytes)
            for name, offset in self._draft_offsets.items():
                array: npt.NDArray[Any] = arrays[name]
                staging.host.array[offset : offset + array.nbytes].view(array.dtype)[...] = array
            self._driver.copy_to_device(stream, staging.device, staging.host.array[:num_bytes])
            self._drafts = drafts
        for name in names:
            setattr(arguments, name, self._draft_staging.device + self._draft_offsets[name])
        arguments.key_mask = len(drafts.keys) - 1


class CudaRun:
    """`StepRun` of one launch that has been asked for."""

    def __init__(
        self,
        run: MultiStep,
        memory: RunMemory,
        driver: Driver,
        stream: Stream,
        *,
        failed: Callable[[CudaError | None], StepError | None],
        ended: Callable[[int], None],
    ) -> None:
        """`failed`: what went wrong, by the driver or by what the kernel reported; None: nothing has.
        `ended` is told, once, how many steps ran."""
        self._run = run
        self._memory = memory
        self._driver, self._stream = driver, stream
        self._failed, self._ended = failed, ended
        self._num_read = 0
        self._has_ended = False

    def next(self) -> StepTokens | None:
        """Raises StepError; the runtime is of no use then."""
        while not self._has_ended:
            told = self._memory.told
            if told & ~LAST_STEP > self._num_read:
                self._num_read += 1
                return self._memory.step_at(self._run, self._num_read - 1)
            if told & LAST_STEP:
                self._has_ended = True
                self._ended(self._num_read)
            elif not self._is_running() and told == self._memory.told:
                self._has_ended = True
                raise self._failed(None) or StepError("the kernel ended before its last step")
            else:
                time.sleep(POLL_S)
        return None

    def stop(self) -> None:
        if not self._has_ended:
            self._memory.allow(0)

    def _is_running(self) -> bool:
        try:
            is_running = not self._driver.is_idle(self._stream)
        except CudaError as error:
            self._has_ended = True
            raise (self._failed(error) or StepError(str(error))) from error
        return is_running
