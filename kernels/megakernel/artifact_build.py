"""Builds an artifact's folder: programs, proof, library, packed weights, measured steps, report, picture."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from megakernel.artifact import Progress, WeightLayout, packed_segments
from megakernel.artifact_folder import Artifact, open_artifact
from megakernel.build import Compiler, compile_library, find_compiler, library_flags
from megakernel.codegen_cpu import Generated, generate
from megakernel.codegen_limits import CodegenError
from megakernel.cpu_identity import this_cpu
from megakernel.folder_lock import locked
from megakernel.manifest import (
    LIBRARY,
    MANIFEST,
    PICTURE,
    PROGRAMS,
    REPORT,
    SOURCE,
    STEP_TABLE,
    WEIGHTS,
    ArtifactError,
    FileEntry,
    Manifest,
    UnsupportedModelError,
    entry_of,
    write_manifest,
)
from megakernel.model.weights import Weights
from megakernel.plan import Plan
from megakernel.program import Program
from megakernel.recipe import Recipe, compile_programs, prove, source_hash
from megakernel.report import compile_report
from megakernel.step_times import StepTable, measure_steps
from megakernel.timeline_svg import schedule_svg

_STAGES = {"programs": 0.1, "library": 0.6, "weights": 0.1, "steps": 0.2}
"""Shares of the time that a small model takes, for the progress bar."""


class NotAnArtifactError(ArtifactError):
    """A folder that was to be written and holds something else."""


class _Stages:
    """Progress of the whole from that of each stage."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._done = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        share = _STAGES[name]

        def show(what: str, fraction: float) -> None:
            if self._progress is not None:
                self._progress(what, min(1.0, self._done + share * fraction))

        yield show
        self._done += share


def build_artifact(
    folder: Path,
    recipe: Recipe,
    weights: Weights,
    *,
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """In a folder beside `folder`, which it then takes the place of: nobody sees half of one.

    `plan` is a search's; None: the one that needs none.
    Whoever builds the same folder at the same time waits, and builds again. An exception that `progress`
    raises ends the build and leaves nothing. Raises BuildError, UnsupportedModelError, ScheduleError for a
    program that cannot be proved, NotAnArtifactError where `folder` holds other files, and OSError.
    """
    with locked(folder, progress):
        return build_in_place(folder, recipe, weights, plan, progress)


def build_in_place(
    folder: Path,
    recipe: Recipe,
    weights: Weights,
    plan: Plan | None,
    progress: Progress | None,
) -> Artifact:
    """As `build_artifact`, by whoever holds the folder's lock."""
    _check_replaceable(folder)
    stages = _Stages(progress)
    is_searched, plan = plan is not None, plan or recipe.plan()
    with stages.stage("programs") as show:
        programs = compile_programs(recipe, plan, show)
    scratch = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)  # of a build that was killed
    scratch.mkdir(parents=True)
    try:
        write_artifact(scratch, recipe, weights, programs, plan, is_searched, stages)
        _take_place(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return open_artifact(folder)


def write_artifact(
    folder: Path,
    recipe: Recipe,
    weights: Weights,
    programs: tuple[Program, ...],
    plan: Plan,
    is_searched: bool,
    stages: _Stages | None = None,
) -> None:
    """Every file of it, into an empty folder; a program that is not proved leaves it empty."""
    stages = stages or _Stages(None)
    prove(recipe, programs)
    compiler = find_compiler()
    try:
        generated = generate(programs, recipe.formats, recipe.kv_format)
    except CodegenError as error:
        raise UnsupportedModelError(f"{recipe.model}: {error}") from error
    with stages.stage("library") as show:
        (folder / SOURCE).write_text(generated.source, encoding="utf-8")
        compile_library(folder / SOURCE, folder / LIBRARY, compiler, library_flags(recipe.extra_flags), show)
    (folder / PROGRAMS).write_bytes(msgspec.msgpack.encode(programs))
    with stages.stage("weights") as show:
        packed = _write_weights(folder / WEIGHTS, generated.layout, weights, show)
    (folder / REPORT).write_text(_report(recipe, programs, plan), encoding="utf-8")
    picture = schedule_svg(programs[0], recipe.machine, recipe.formats)
    (folder / PICTURE).write_text(picture, encoding="utf-8")
    manifest = _manifest(recipe, generated, compiler, is_searched)
    files = {WEIGHTS: packed}
    write_manifest(folder, _with_files(manifest, folder, files))
    with stages.stage("steps") as show:
        table = measure_steps(open_artifact(folder).load(), recipe.machine, recipe.formats, show)
    (folder / STEP_TABLE).write_bytes(msgspec.json.format(msgspec.json.encode(table), indent=1))
    with (folder / REPORT).open("a", encoding="utf-8") as report:
        report.write(f"\n{steps_text(table)}")
    write_manifest(folder, _with_files(manifest, folder, files))


def steps_text(table: StepTable) -> str:
    lines = ["Steps, ms: measured (predicted; to read every byte once)"]
    for step in table.steps:
        lines.append(
            f"{step.rows:4} rows, context {step.context_tokens:5}: {step.measured_ms:9.3f} "
            f"({step.predicted_ms:.3f}; {step.bound_ms:.3f})"
        )
    return "\n".join(lines) + "\n"


def _with_files(manifest: Manifest, folder: Path, known: dict[str, FileEntry]) -> Manifest:
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    files = {name: known.get(name) or entry_of(folder / name) for name in names}
    return msgspec.structs.replace(manifest, files=files)


def _manifest(recipe: Recipe, generated: Generated, compiler: Compiler, is_searched: bool) -> Manifest:
    return Manifest(
        model=recipe.model,
        model_fingerprint=recipe.fingerprint,
        shape=recipe.shape,
        machine=recipe.machine,
        num_workers=recipe.machine.num_workers,
        kv_format=recipe.kv_format,
        buckets=recipe.buckets,
        segments=tuple(generated.layout.segments.values()),
        weight_bytes=generated.layout.num_bytes,
        buffer_offsets=dict(generated.buffer_offsets),
        is_searched=is_searched,
        compiler=compiler,
        flags=library_flags(recipe.extra_flags),
        cpu=this_cpu(),
        sources=source_hash(),
        files={},
    )


def _write_weights(path: Path, layout: WeightLayout, weights: Weights, progress: Progress) -> FileEntry:
    """One segment in memory at a time."""
    digest = hashlib.blake2b(digest_size=32)
    end = 0
    with path.open("wb") as file:

        def put(data: memoryview) -> None:
            nonlocal end
            file.write(data)
            digest.update(data)
            end += len(data)

        for segment, data in packed_segments(layout, weights, progress):
            put(memoryview(bytes(segment.offset - end)))
            put(data.data)
        put(memoryview(bytes(layout.num_bytes - end)))
    return FileEntry(num_bytes=end, blake2b=digest.hexdigest())


def _report(recipe: Recipe, programs: tuple[Program, ...], plan: Plan) -> str:
    """Of the smallest and the largest bucket."""
    return "\n".join(
        compile_report(recipe.shape, recipe.machine, program, plan, formats=recipe.formats)
        for program in (programs[0], programs[-1])
    )


def _check_replaceable(folder: Path) -> None:
    if not folder.exists() or (folder / MANIFEST).exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise NotAnArtifactError(f"{folder} holds other files than an artifact's: name another folder")


def _take_place(made: Path, folder: Path) -> None:
    """What was there stays readable by whoever has it open."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    made.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
