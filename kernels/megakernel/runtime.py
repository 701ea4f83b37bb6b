"""Loads a compiled library and runs its steps: packed weights, KV pool and worker threads are its own."""

import ctypes
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.artifact import Progress
from megakernel.codegen_limits import KvFormat
from megakernel.compiled import Compiled, compile_here
from megakernel.head import Reductions
from megakernel.library import EngineConfig, StepInput, load_library
from megakernel.model.rope import rope_frequencies
from megakernel.model.shape import ModelShape
from megakernel.model.weights import Weights
from megakernel.multi_step import HostRun, MultiStep, StepRun, check_multi_step
from megakernel.program import Program
from megakernel.step import (
    BoolArray,
    FloatArray,
    IntArray,
    Rows,
    StepError,
    StepOutput,
    check_held_lengths,
)

WAIT_LIMIT_S = 10.0
SPINS = 2_000
"""Of a wait before it sleeps, tens of microseconds: one that spins on while another program has the awaited
worker's core uses up the time that the scheduler would give that worker next."""
TOKENS_A_SMALL_BLOCK = 16
"""`kTokensABlock` of step.h."""
_DTYPES: dict[KvFormat, type[np.generic]] = {"float16": np.float16, "float32": np.float32}


class Stamps(msgspec.Struct, frozen=True, eq=False):
    """`[instructions, 3]` monotonic nanoseconds a worker: reached, waits over, done."""

    workers: tuple[npt.NDArray[np.int64], ...]


class Runtime:
    """One model on this CPU. `run` and `copy_slots` are for one thread; `write_kv` and `read_kv` may run
    beside them, for slots that they leave alone.

    `num_blocks` blocks of `block_size_tokens` tokens, a multiple of 16. Raises LibraryError for a library
    that does not load here, and what `Compiled.fill_weights` raises.
    """

    def __init__(
        self,
        compiled: Compiled,
        num_blocks: int,
        block_size_tokens: int,
        *,
        wait_limit_s: float = WAIT_LIMIT_S,
    ) -> None:
        if block_size_tokens <= 0 or block_size_tokens % TOKENS_A_SMALL_BLOCK:
            raise ValueError(
                f"block size {block_size_tokens}: a multiple of {TOKENS_A_SMALL_BLOCK} is needed"
            )
        self.compiled = compiled
        self.num_blocks = num_blocks
        self.block_size_tokens = block_size_tokens
        self._dtype = np.dtype(_DTYPES[compiled.kv_format])
        self._shape = compiled.shape
        self._packed = _arena(compiled.layout.num_bytes)
        compiled.fill_weights(self._packed)
        self._library = load_library(compiled.library)
        frequencies = np.ascontiguousarray(rope_frequencies(compiled.shape), dtype=np.float64)
        config = EngineConfig(
            weights=self._packed.ctypes.data,
            frequencies=frequencies.ctypes.data,
            num_blocks=num_blocks,
            block_size_tokens=block_size_tokens,
            spins=SPINS,
            wait_limit_ns=int(wait_limit_s * 1e9),
        )
        self._engine = self._library.headrace_open(ctypes.byref(config))
        self.num_blocks, self.block_size_tokens = num_blocks, block_size_tokens
        self._input = StepInput()
        self._raise_if(self._library.headrace_error(self._engine) or None)

    @classmethod
    def of(
        cls,
        programs: Sequence[Program],
        weights: Weights,
        num_blocks: int,
        block_size_tokens: int,
        *,
        kv_format: KvFormat = "float16",
        library_folder: Path | None = None,
        extra_flags: Sequence[str] = (),
        wait_limit_s: float = WAIT_LIMIT_S,
        progress: Progress | None = None,
    ) -> "Runtime":
        """Of programs compiled on the spot, as they are. Raises BuildError, CodegenError."""
        compiled = compile_here(
            programs,
            weights,
            kv_format=kv_format,
            library_folder=library_folder,
            extra_flags=extra_flags,
            progress=progress,
        )
        return cls(compiled, num_blocks, block_size_tokens, wait_limit_s=wait_limit_s)

    @property
    def shape(self) -> ModelShape:
        return self._shape

    @property
    def kv_format(self) -> KvFormat:
        return self.compiled.kv_format

    @property
    def max_rows(self) -> int:
        """Of a step: the largest bucket."""
        return self.compiled.buckets[-1]

    def run(self, rows: Rows, stats: FloatArray | None = None, stamps: Stamps | None = None) -> FloatArray:
        """The logits of `step`."""
        return self.step(rows, stats, stamps).logits

    def step(self, rows: Rows, stats: FloatArray | None = None, stamps: Stamps | None = None) -> StepOutput:
        """One step; KV of all rows goes to their slots.

        Where no row asks for anything, the step computes nothing past the last layer's K and V.
        `stats`, `[rows over the whole vocabulary, spans, 3]`, is filled where given. Raises StepError.
        """
        step = self._input
        step.num_rows = len(rows.token_ids)
        step.num_sequences = len(rows.context_lengths)
        step.max_blocks = rows.block_tables.shape[1]
        step.token_ids = rows.token_ids.ctypes.data
        step.positions = rows.positions.ctypes.data
        step.slots = rows.slots.ctypes.data
        step.parents = rows.parents.ctypes.data
        step.sequence_starts = rows.sequence_starts.ctypes.data
        step.context_lengths = rows.context_lengths.ctypes.data
        step.block_tables = rows.block_tables.ctypes.data
        if rows.held_starts is not None:
            assert rows.held_slots is not None, "held_starts without held_slots"
            check_held_lengths(rows.held_starts, rows.held_slots, len(rows.token_ids))
        step.held_starts = _address(rows.held_starts)
        step.held_slots = _address(rows.held_slots)
        step.stats = None if stats is None else stats.ctypes.data
        output = _ask_head(step, rows, self._shape.vocab_size)
        pointers = None if stamps is None else _pointers(stamps)
        self._raise_if(self._library.headrace_run(self._engine, ctypes.byref(step), pointers))
        return output

    def new_stamps(self, num_rows: int) -> Stamps:
        """Room for one step of `num_rows` rows."""
        program = next(program for program in self.compiled.programs if program.bucket >= num_rows)
        return Stamps(tuple(np.zeros((len(worker), 3), dtype=np.int64) for worker in program.workers))

    def start(self, run: MultiStep) -> StepRun:
        """Several steps, each run when its tokens are asked for. Raises StepError."""
        check_multi_step(
            run,
            max_rows=self.max_rows,
            vocab_size=self._shape.vocab_size,
            max_context_tokens=self._shape.max_context_tokens,
        )
        return HostRun(self.step, run, self.block_size_tokens)

    def copy_slots(self, source: IntArray, destination: IntArray) -> None:
        """All of `source` is read before any of `destination` is written. Raises StepError."""
        if len(source) != len(destination):
            raise ValueError(f"{len(source)} slots cannot be copied to {len(destination)}")
        source, destination = _int32(source), _int32(destination)
        problem = self._library.headrace_copy_slots(
            self._engine, source.ctypes.data, destination.ctypes.data, len(source)
        )
        self._raise_if(problem)

    def write_kv(self, layer: int, slots: IntArray, data: memoryview | bytes) -> None:
        """One layer of len(slots) tokens in wire order: K, then V, each [tokens, kv heads, head_dim].

        Raises ValueError for another number of bytes, StepError for a slot outside the pool.
        """
        slots = _int32(slots)
        wire = np.frombuffer(data, dtype=np.uint8)
        if wire.nbytes != (expected := self._wire_bytes(len(slots))):
            raise ValueError(f"{len(slots)} tokens of one layer are {expected} bytes, not {wire.nbytes}")
        problem = self._library.headrace_write_kv(
            self._engine, layer, slots.ctypes.data, len(slots), wire.ctypes.data
        )
        self._raise_if(problem)

    def read_kv(self, layer: int, slots: IntArray) -> memoryview:
        """What `write_kv` takes, in memory of its own. Raises StepError."""
        slots = _int32(slots)
        wire = np.empty(self._wire_bytes(len(slots)), dtype=np.uint8)
        problem = self._library.headrace_read_kv(
            self._engine, layer, slots.ctypes.data, len(slots), wire.ctypes.data
        )
        self._raise_if(problem)
        return wire.data

    def buffer(self, name: str, bucket: int) -> FloatArray:
        """A copy of a buffer between ops, `[bucket, columns]`, as the last step left it."""
        program = next(program for program in self.compiled.programs if program.bucket == bucket)
        columns = next(buffer.columns for buffer in program.buffers if buffer.name == name)
        start = self._library.headrace_activations(self._engine) + self.compiled.buffer_offsets[name]
        held = (ctypes.c_float * (bucket * columns)).from_address(start)
        return np.array(held, dtype=np.float32).reshape(bucket, columns)

    def close(self) -> None:
        """Ends the workers and frees all memory; may be called twice."""
        if self._engine:
            self._library.headrace_close(self._engine)
            self._engine = None

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wire_bytes(self, num_tokens: int) -> int:
        return 2 * num_tokens * self._shape.num_kv_heads * self._shape.head_dim * self._dtype.itemsize

    @staticmethod
    def _raise_if(problem: bytes | None) -> None:
        if problem is not None:
            raise StepError(problem.decode())


def _ask_head(step: StepInput, rows: Rows, vocab_size: int) -> StepOutput:
    """Points the library to what is asked of the head, and to the arrays that it fills."""
    num_logits = int(np.count_nonzero(rows.needs_logits))
    num_best = 0 if rows.needs_best is None else int(np.count_nonzero(rows.needs_best))
    num_allowed = 0
    if rows.allowed_starts is not None:
        assert rows.allowed_token_ids is not None, "allowed_starts without allowed_token_ids"
        is_logit_row = rows.needs_logits if rows.needs_best is None else rows.needs_logits | rows.needs_best
        if len(rows.allowed_starts) != np.count_nonzero(is_logit_row) + 1:
            raise StepError(
                f"{len(rows.allowed_starts)} allowed_starts: one a row that needs logits, and one"
            )
        num_allowed = len(rows.allowed_token_ids)
        if rows.allowed_starts[-1] != num_allowed:
            raise StepError(
                f"allowed_starts end at {rows.allowed_starts[-1]} of {num_allowed} allowed tokens"
            )
        if num_logits:
            is_open = rows.allowed_starts[:-1] == rows.allowed_starts[1:]
            num_logits = int(np.count_nonzero(rows.needs_logits[is_logit_row] & is_open))
    logits = np.empty((num_logits, vocab_size), dtype=np.float32)
    allowed_logits = np.empty(num_allowed, dtype=np.float32)
    values = np.empty((num_best, 2 + rows.top_k), dtype=np.float32)
    tokens = np.empty((num_best, 1 + rows.top_k), dtype=np.int32)
    step.needs_logits = rows.needs_logits.ctypes.data
    step.needs_best = _address(rows.needs_best)
    step.allowed_starts = _address(rows.allowed_starts)
    step.allowed_token_ids = _address(rows.allowed_token_ids)
    step.logits = logits.ctypes.data
    step.allowed_logits = allowed_logits.ctypes.data
    step.values = values.ctypes.data
    step.tokens = tokens.ctypes.data
    step.top_k = rows.top_k
    step.needs_log_sums = rows.needs_log_sums
    return StepOutput(
        logits=logits,
        reductions=Reductions(
            token_ids=tokens[:, 0],
            maxima=values[:, 0],
            log_sums=values[:, 1],
            top_token_ids=tokens[:, 1:],
            top_logits=values[:, 2:],
        ),
        allowed_logits=allowed_logits,
    )


def _address(array: IntArray | BoolArray | None) -> int | None:
    return None if array is None else array.ctypes.data


def _arena(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Page-aligned, in large pages where the system has them: decode reads all of it every step."""
    # Private: shared memory gets no large pages.
    memory = mmap.mmap(-1, max(num_bytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8, count=num_bytes)


def _pointers(stamps: Stamps) -> Any:
    return (ctypes.c_void_p * len(stamps.workers))(*(worker.ctypes.data for worker in stamps.workers))


def _int32(array: IntArray) -> IntArray:
    return np.ascontiguousarray(array, dtype=np.int32)
