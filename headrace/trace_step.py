"""Runs decode steps in the megakernel on this machine, with a time stamp at every instruction."""

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from megakernel.artifact import Progress
from megakernel.artifact_cache import ArtifactCache
from megakernel.buckets import BUCKETS
from megakernel.compiled import Compiled, compile_here
from megakernel.machine import load_machine
from megakernel.measure import WARM_UP_STEPS
from megakernel.model.load import OpenedModel, open_model
from megakernel.program import Program
from megakernel.recipe import Recipe, compile_programs, prove, recipe_for
from megakernel.runtime import Runtime
from megakernel.step_rows import BLOCK_TOKENS, decode_rows, fill_context, num_blocks
from megakernel.timeline import BytesOf, Timeline, bytes_read, measured_timeline


class TraceError(ValueError):
    """What cannot be traced, and why; `headrace trace` shows it."""


class Ready(msgspec.Struct, frozen=True, eq=False):
    """A program that can run."""

    program: Program
    runtime: Runtime
    bytes_of: BytesOf


class Traced(msgspec.Struct, frozen=True, kw_only=True):
    timeline: Timeline
    """Of the median step."""
    step_us: tuple[float, ...]
    """Of all timed steps, in order."""


@contextmanager
def opened(
    model: str, num_rows: int, context_tokens: int, progress: Progress | None = None
) -> Iterator[Ready]:
    """The model compiled for the CPU in hand and the bucket of `num_rows`.

    Raises TraceError, and what `open_model`, compiling and `Runtime` raise.
    """
    bucket = next((bucket for bucket in BUCKETS if bucket >= num_rows), None)
    if bucket is None or num_rows < 1:
        raise TraceError(f"a step has 1 to {BUCKETS[-1]} rows, not {num_rows}")
    source = open_model(model)
    shape = source.weights.shape
    if not 0 <= context_tokens < shape.max_context_tokens:
        raise TraceError(
            f"{context_tokens} tokens of context: the model takes 0 to {shape.max_context_tokens - 1}"
        )
    machine = load_machine("cpu")
    recipe = recipe_for(source, machine, machine.num_workers, "float16")
    compiled = _compiled(recipe, source, bucket, progress)
    program = next(program for program in compiled.programs if program.bucket == bucket)
    with Runtime(compiled, num_blocks(num_rows, context_tokens), BLOCK_TOKENS) as runtime:
        fill_context(runtime, context_tokens)
        yield Ready(program, runtime, bytes_read(program, machine, recipe.formats, context_tokens))


def _compiled(recipe: Recipe, source: OpenedModel, bucket: int, progress: Progress | None) -> Compiled:
    """The artifact that serves on this machine, or, where there is none yet, its program for one bucket."""
    if artifact := ArtifactCache().find(recipe):
        return artifact.load()
    one = msgspec.structs.replace(recipe, buckets=(bucket,))
    programs = compile_programs(one, one.plan())
    prove(one, programs)
    return compile_here(programs, source.weights, formats=one.formats, progress=progress)


def trace_steps(ready: Ready, num_rows: int, context_tokens: int, num_steps: int) -> Traced:
    """The median of `num_steps` steps, after some that warm up."""
    rows = decode_rows(num_rows, context_tokens)
    for _ in range(WARM_UP_STEPS):
        ready.runtime.run(rows)
    timelines = []
    for _ in range(num_steps):
        stamps = ready.runtime.new_stamps(num_rows)
        ready.runtime.run(rows, stamps=stamps)
        lanes = [worker.tolist() for worker in stamps.workers]
        timelines.append(measured_timeline(ready.program, lanes, ready.bytes_of))
    by_time = sorted(timelines, key=lambda timeline: timeline.makespan_us)
    return Traced(
        timeline=by_time[(len(by_time) - 1) // 2],
        step_us=tuple(timeline.makespan_us for timeline in timelines),
    )
