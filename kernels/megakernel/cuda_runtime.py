"""Runs a compiled model's steps on a GPU: packed weights, KV pool and buffers lie in its memory."""

import ctypes
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.codegen_limits import KvFormat
from megakernel.cuda_activations import rounded_values
from megakernel.cuda_arguments import EXTRA_COUNTERS, TRACE_EVENTS, TRACE_ROLES, Failure, StepArguments
from megakernel.cuda_compiled import CompiledCuda, FillWeights
from megakernel.cuda_device import Address, CudaError, Driver, Event, Kernel
from megakernel.cuda_driver import open_driver
from megakernel.cuda_failure import describe_failure
from megakernel.cuda_kv_pool import CudaKvPool
from megakernel.cuda_memory import HostStaging, Staging, place_arrays, runs_of
from megakernel.cuda_multi_step import CudaRun, RunMemory, RunTables, step_tables
from megakernel.cuda_rows import Limits, StepAsk, StepTables, read_rows
from megakernel.head import Reductions
from megakernel.model.rope import rope_frequencies
from megakernel.model.shape import ModelShape
from megakernel.multi_step import HostRun, MultiStep, StepRun
from megakernel.program import Program
from megakernel.step import FloatArray, IntArray, Rows, StepError, StepOutput

WAIT_LIMIT_S = 10.0
_WEIGHT_CHUNK_BYTES = 1 << 26
_TURN_CHUNK_POSITIONS = 4096


class _Bucket(msgspec.Struct, eq=False):
    """One compiled bucket, and how many steps it ran: its counters are never reset."""

    program: Program
    kernel: Kernel
    first_counter: int
    epoch: int = 0


class CudaRuntime:
    """One model on one GPU. `step` and `copy_slots` are for one thread; `write_kv` and `read_kv` may run
    beside them, for slots that they leave alone.

    `num_blocks` blocks of `block_size_tokens` tokens. `driver`, None: of the first device, is the runtime's
    from then on. Raises CudaUnavailableError, ResidencyError for a machine with fewer or smaller SMs than the
    model was compiled for, CudaError where memory is short, and what `CompiledCuda.fill_weights` raises.
    """

    def __init__(
        self,
        compiled: CompiledCuda,
        num_blocks: int,
        block_size_tokens: int,
        *,
        driver: Driver | None = None,
        wait_limit_s: float = WAIT_LIMIT_S,
    ) -> None:
        if block_size_tokens <= 0 or num_blocks <= 0:
            raise ValueError(f"{num_blocks} blocks of {block_size_tokens} tokens: both must be positive")
        self.compiled = compiled
        self.num_blocks, self.block_size_tokens = num_blocks, block_size_tokens
        self._shape = compiled.shape
        first = compiled.programs[0]
        self._limits = Limits(
            max_rows=compiled.buckets[-1],
            vocab_size=compiled.shape.vocab_size,
            max_context_tokens=compiled.shape.max_context_tokens,
            block_size_tokens=block_size_tokens,
            num_blocks=num_blocks,
            stats_span=first.stats_span,
        )
        self._problem: str | None = None
        self._is_in_run = False
        self._driver = open_driver() if driver is None else driver
        try:
            self._open(wait_limit_s)
        except BaseException:
            self.close()
            raise

    @property
    def shape(self) -> ModelShape:
        return self._shape

    @property
    def kv_format(self) -> KvFormat:
        return self.compiled.kv_format

    @property
    def max_rows(self) -> int:
        """Of a step: the largest bucket."""
        return self._limits.max_rows

    @property
    def weights_address(self) -> Address:
        """Of `compiled.layout.num_bytes` bytes, for who fills them there."""
        return self._weights

    @property
    def kv_address(self) -> Address:
        """Of the whole pool (`cuda_kv_pool`), for who fills it there: tests and benchmarks."""
        return self._kv.address

    @property
    def kv_slots(self) -> int:
        """Of a layer in that memory: the pool's, and a few of no use to others behind them."""
        return self._kv.all_slots

    def step(self, rows: Rows, stats: FloatArray | None = None) -> StepOutput:
        """One step; KV of all rows goes to their slots.

        Where no row asks for anything, the step computes nothing past the last layer's K and V.
        `stats`, `[rows over the whole vocabulary, spans, 3]`, is filled where given. Raises StepError.
        """
        self._raise_if_busy()
        asked = read_rows(rows, self._limits)
        bucket = self._bucket_of(len(rows.token_ids))
        try:
            self._put_tables(asked.tables, top_k=rows.top_k, num_allowed=asked.num_allowed)
            self._launch(bucket)
            results = self._results.host.array[: self._results_bytes]
            self._driver.copy_to_host(self._stream, results, self._results.device)
            logits = self._fetch_rows(self._logits, asked.logit_rows, self._limits.vocab_size)
            found_stats = None
            if stats is not None:
                found_stats = self._fetch_rows(self._stats, asked.full_rows, 3 * self._limits.num_spans)
            self._driver.synchronize(self._stream)
        except CudaError as error:
            raise self._fail(bucket, error) from error
        if self._failure.code:
            raise self._fail(bucket, None)
        if stats is not None and found_stats is not None:
            stats.reshape(found_stats.shape)[...] = found_stats
        return self._output(asked, rows, logits.copy())

    def start(self, run: MultiStep) -> StepRun:
        """Several steps in one launch. Raises StepError."""
        self._raise_if_busy()
        tables, kept = step_tables(run, self._limits)
        if run.num_steps == 1:  # to the kernel a plain step
            return HostRun(self.step, run, self.block_size_tokens)
        bucket = self._bucket_of(run.num_rows)
        arguments = self._arguments
        try:
            self._put_tables(tables, top_k=0, num_allowed=0, kept=kept)
            arguments.path_slots = arguments.slots
            self._run_memory.prepare(run, arguments.run, self._stream, self._limits.num_slots)
            arguments.epoch = bucket.epoch
            self._driver.launch(self._stream, bucket.kernel, arguments)
        except CudaError as error:
            raise self._fail(bucket, error, bucket.epoch) from error
        finally:
            arguments.run.num_steps = 1
        self._is_in_run = True

        def failed(error: CudaError | None) -> StepError | None:
            return self._fail(bucket, error, bucket.epoch) if error or self._failure.code else None

        def ended(num_steps: int) -> None:
            self._is_in_run = False
            bucket.epoch = (bucket.epoch + num_steps) & 0xFFFFFFFF

        return CudaRun(run, self._run_memory, self._driver, self._stream, failed=failed, ended=ended)

    def launch_ms(self, rows: Rows, num_steps: int) -> list[float]:
        """Milliseconds of each of as many steps of the same rows, one after the other, without what the host
        does for a step; their results stay where they are. Raises StepError."""
        self._raise_if_busy()
        asked = read_rows(rows, self._limits)
        bucket = self._bucket_of(len(rows.token_ids))
        try:
            self._put_tables(asked.tables, top_k=rows.top_k, num_allowed=asked.num_allowed)
            while len(self._events) <= num_steps:
                self._events.append(self._driver.new_event())
            self._driver.record(self._stream, self._events[0])
            for number in range(num_steps):
                self._launch(bucket)
                self._driver.record(self._stream, self._events[number + 1])
            self._driver.synchronize(self._stream)
        except CudaError as error:
            raise self._fail(bucket, error) from error
        return [
            self._driver.elapsed_ms(self._events[number], self._events[number + 1])
            for number in range(num_steps)
        ]

    def trace(self, rows: Rows, num_steps: int = 1) -> npt.NDArray[np.uint32]:
        """What kernels that were built with HEADRACE_TRACE tell of the last of so many steps (cuda/trace.h):
        [workers, roles, instructions + 1, events]. Such kernels run only once this was called, which gives
        them the memory for it. Raises StepError."""
        self._raise_if_busy()
        arguments, programs = self._arguments, self.compiled.programs
        count = max(len(worker) for program in programs for worker in program.workers)
        size = (len(programs[0].workers), TRACE_ROLES, count + 1, TRACE_EVENTS)
        words = np.zeros(size, dtype=np.uint32)
        if not arguments.trace:
            arguments.trace = self._driver.allocate(words.nbytes)
            arguments.trace_instructions = count
        self._driver.copy_to_device(self._stream, arguments.trace, words)
        self.launch_ms(rows, num_steps)
        self._driver.copy_to_host(self._stream, words, arguments.trace)
        self._driver.synchronize(self._stream)
        return words

    def copy_slots(self, source: IntArray, destination: IntArray) -> None:
        """All of `source` is read before any of `destination` is written. Raises StepError."""
        self._raise_if_busy()
        self._kv.copy_slots(self._stream, source, destination)

    def write_kv(self, layer: int, slots: IntArray, data: memoryview | bytes) -> None:
        """One layer of len(slots) tokens in wire order: K, then V, each [tokens, kv heads, head_dim].

        Raises ValueError for another number of bytes, StepError for a slot outside the pool.
        """
        self._raise_if_failed()
        self._kv.write(layer, slots, data)

    def read_kv(self, layer: int, slots: IntArray) -> memoryview:
        """What `write_kv` takes, in memory of its own. Raises StepError."""
        self._raise_if_failed()
        return self._kv.read(layer, slots)

    def buffer(self, name: str, bucket: int) -> FloatArray:
        """A copy of a buffer between ops, `[bucket, columns]`, as the last step left it."""
        index = self.compiled.buckets.index(bucket)
        program = self.compiled.programs[index]
        format = self.compiled.activations[index].format_of(program, name)
        columns = next(buffer.columns for buffer in program.buffers if buffer.name == name)
        start = self._activations + self.compiled.buffer_offsets[name]
        held = np.empty((bucket, columns), dtype=np.float32 if format is None else np.uint16)
        self._driver.copy_to_host(self._stream, held, start)
        self._driver.synchronize(self._stream)
        return held if format is None else rounded_values(format, held)

    def close(self) -> None:
        """Frees all memory; may be called twice."""
        self._problem = self._problem or "the runtime is closed"
        self._driver.close()

    def __enter__(self) -> "CudaRuntime":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, wait_limit_s: float) -> None:
        driver, compiled, shape = self._driver, self.compiled, self._shape
        kernels = driver.load(compiled.cubin, compiled.kernel_names, compiled.grid)
        self._buckets = [
            _Bucket(program, kernels[name], first)
            for program, name, first in zip(
                compiled.programs, compiled.kernel_names, compiled.first_counters, strict=True
            )
        ]
        self._stream = driver.new_stream()
        self._events: list[Event] = []
        self._weights = driver.allocate(compiled.layout.num_bytes)
        if compiled.fill_weights is not None:
            self._upload_weights(compiled.fill_weights)
        self._activations = driver.allocate(compiled.activation_bytes)
        self._kv = CudaKvPool(driver, shape, self._limits.num_slots, self.max_rows)
        self._logits = driver.allocate(4 * self.max_rows * shape.vocab_size)
        self._stats = driver.allocate(4 * self.max_rows * 3 * self._limits.num_spans)
        self._inputs, self._results = Staging(driver), Staging(driver)
        self._run_memory = RunMemory(driver)
        self._fetched: dict[Address, HostStaging] = {}
        self._results_bytes = 0
        failure = driver.allocate_host(ctypes.sizeof(Failure))
        self._failure = Failure.from_address(failure.array.ctypes.data)
        self._arguments = StepArguments(
            weights=self._weights,
            activations=self._activations,
            kv=self._kv.address,
            turns=self._upload_turns(),
            counters=driver.allocate(4 * (compiled.num_counters + EXTRA_COUNTERS)),
            failure=failure.address,
            logits=self._logits,
            stats=self._stats,
            num_slots=self._kv.all_slots,
            block_size_tokens=self.block_size_tokens,
            timeout_ns=int(wait_limit_s * 1e9),
        )

    def _upload_weights(self, fill: FillWeights) -> None:
        packed = np.zeros(self.compiled.layout.num_bytes, dtype=np.uint8)
        fill(packed)
        for start in range(0, len(packed), _WEIGHT_CHUNK_BYTES):
            chunk = packed[start : start + _WEIGHT_CHUNK_BYTES]
            self._driver.copy_to_device(self._stream, self._weights + start, chunk)
        self._driver.synchronize(self._stream)

    def _upload_turns(self) -> Address:
        """Cosine and sine of every position's angles."""
        frequencies = rope_frequencies(self._shape)
        num_positions, pair_bytes = self._shape.max_context_tokens, 8 * len(frequencies)
        table = self._driver.allocate(num_positions * pair_bytes)
        for start in range(0, num_positions, _TURN_CHUNK_POSITIONS):
            end = min(start + _TURN_CHUNK_POSITIONS, num_positions)
            turns = turns_of(frequencies, start, end)
            self._driver.copy_to_device(self._stream, table + start * pair_bytes, turns)
            self._driver.synchronize(self._stream)
        return table

    def _bucket_of(self, num_rows: int) -> _Bucket:
        return next(bucket for bucket in self._buckets if bucket.program.bucket >= num_rows)

    def _put_tables(
        self, tables: StepTables, *, top_k: int, num_allowed: int, kept: RunTables | None = None
    ) -> None:
        """All tables of the step in one copy, and the arguments that lead to them."""
        arguments = self._arguments
        arrays: dict[str, npt.NDArray[Any]] = msgspec.structs.asdict(tables)
        of_run = {} if kept is None else msgspec.structs.asdict(kept)
        offsets, num_bytes = place_arrays(arrays | of_run)
        staging = self._inputs.grown_to(num_bytes)
        for name, array in (arrays | of_run).items():
            start = offsets[name]
            staging.host.array[start : start + array.nbytes].view(array.dtype)[...] = array.reshape(-1)
            setattr(arguments.run if name in of_run else arguments, name, staging.device + start)
        self._driver.copy_to_device(self._stream, staging.device, staging.host.array[:num_bytes])
        arguments.num_rows = num_rows = len(tables.token_ids)
        arguments.max_blocks = tables.block_tables.shape[1]
        arguments.top_k = top_k
        sizes = (num_rows * (2 + top_k), num_rows * (1 + top_k), num_allowed)
        self._results_bytes = 4 * sum(sizes)
        results = self._results.grown_to(self._results_bytes).device
        arguments.values = results
        arguments.tokens = results + 4 * sizes[0]
        arguments.allowed_logits = results + 4 * (sizes[0] + sizes[1])

    def _launch(self, bucket: _Bucket) -> None:
        self._arguments.epoch = bucket.epoch
        bucket.epoch = (bucket.epoch + 1) & 0xFFFFFFFF
        self._driver.launch(self._stream, bucket.kernel, self._arguments)

    def _fetch_rows(self, source: Address, rows: IntArray, columns: int) -> FloatArray:
        """Rows of a device array, on their way into pinned memory that the next step writes again."""
        line = 4 * columns
        staging = self._fetched.setdefault(source, HostStaging(self._driver))
        held = staging.grown_to(len(rows) * line)[: len(rows) * line]
        for at, row, count in runs_of(rows):
            part = held[at * line : (at + count) * line]
            self._driver.copy_to_host(self._stream, part, source + row * line)
        found: FloatArray = held.view(np.float32).reshape(len(rows), columns)
        return found

    def _output(self, asked: StepAsk, rows: Rows, logits: FloatArray) -> StepOutput:
        num_rows, top_k = len(asked.tables.token_ids), rows.top_k
        held = self._results.host.array[: self._results_bytes]
        ends = np.cumsum([num_rows * (2 + top_k), num_rows * (1 + top_k)]) * 4
        values = held[: ends[0]].view(np.float32).reshape(num_rows, -1)[asked.reduced_rows]
        tokens = held[ends[0] : ends[1]].view(np.int32).reshape(num_rows, -1)[asked.reduced_rows]
        if not rows.needs_log_sums:
            values[:, 1] = np.nan
        return StepOutput(
            logits=logits,
            reductions=Reductions(
                token_ids=tokens[:, 0],
                maxima=values[:, 0],
                log_sums=values[:, 1],
                top_token_ids=tokens[:, 1:],
                top_logits=values[:, 2:],
            ),
            allowed_logits=held[ends[1] :].view(np.float32).copy(),
        )

    def _fail(self, bucket: _Bucket, error: CudaError | None, epoch: int | None = None) -> StepError:
        """What stopped the kernel, and before which steps of its bucket; from now on no step runs."""
        if self._failure.code:
            epoch = (bucket.epoch - 1) & 0xFFFFFFFF if epoch is None else epoch
            said = describe_failure(self._failure, bucket.program, bucket.first_counter, epoch)
            limit_s = self._arguments.timeout_ns / 1e9
            self._problem = f"{bucket.kernel.name} gave up after {limit_s:g} s: {said}"
        else:
            self._problem = f"{bucket.kernel.name} failed: {error}"
        return StepError(self._problem)

    def _raise_if_failed(self) -> None:
        if self._problem is not None:
            raise StepError(self._problem)

    def _raise_if_busy(self) -> None:
        self._raise_if_failed()
        if self._is_in_run:
            raise StepError("a run of several steps is under way")


def turns_of(frequencies: npt.NDArray[np.float64], start: int, end: int) -> FloatArray:
    """[positions start .. end, pairs, (cosine, sine)]: angles in float64, as on a CPU."""
    angles = np.arange(start, end, dtype=np.float64)[:, None] * frequencies
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
