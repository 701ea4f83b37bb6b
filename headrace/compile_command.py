"""`headrace compile`: a model's artifact ahead of `headrace up`, or for another machine with the same CPU."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cluster.config import HeadraceConfig
from headrace.options import ConfigOption, ModelOption, configuration
from headrace.terminal import EXIT_USAGE, err, fail, out

if TYPE_CHECKING:
    from megakernel.artifact import Progress
    from megakernel.artifact_folder import Artifact
    from megakernel.model.weights import Weights
    from megakernel.plan_search import Searched
    from megakernel.recipe import Recipe

_SEARCHED_BUCKET = 1
"""Plain decode of one sequence, which a deadline is counted in."""


class KvFormatChoice(StrEnum):
    FLOAT16 = "float16"
    FLOAT32 = "float32"


def compile_model(
    config: ConfigOption = None,
    model: ModelOption = None,
    folder: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Write it there; default: the user's cache, for `up`."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Default: as configured, else all cores.")
    ] = None,
    kv_dtype: Annotated[
        KvFormatChoice | None, typer.Option("--kv-dtype", help="Default: as configured, else float16.")
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Look minutes for a faster schedule, and measure the best.")
    ] = False,
) -> None:
    """Compile a model for this machine: programs, library, packed weights, measured steps, report."""
    wanted = configuration(
        config, {("model", "source"): model, ("model", "kv_dtype"): kv_dtype.value if kv_dtype else None}
    )
    counts = {threads} if threads else _thread_counts(wanted)
    if folder is not None and len(counts) > 1:
        fail("prefill and decode have different num_threads: name one with --threads", EXIT_USAGE)
    for count in sorted(counts):
        _compile(wanted, folder, count, is_searched=search)


def _thread_counts(config: HeadraceConfig) -> set[int]:
    """Of every role that `headrace up` would run from an artifact."""
    from headrace.host import num_cores

    counts = {config.decode.num_threads or num_cores()}
    if config.prefill.num_replicas:
        counts.add(config.prefill.num_threads or num_cores())
    return counts


def _compile(config: HeadraceConfig, folder: Path | None, threads: int, *, is_searched: bool) -> None:
    from headrace.progress_bar import StatusBar
    from megakernel.artifact_build import build_artifact
    from megakernel.artifact_cache import ArtifactCache
    from megakernel.build import BuildError, find_compiler
    from megakernel.library import LibraryError
    from megakernel.machine import PROBED, load_machine
    from megakernel.model.load import open_model
    from megakernel.recipe import recipe_for
    from megakernel.search_command import lines_of
    from megakernel.step import StepError

    dtype = config.model.kv_dtype
    searched = None
    try:
        find_compiler()
        opened = open_model(config.model.source)
        with StatusBar(err, "measuring this CPU") as bar:
            machine = load_machine(PROBED)
            recipe = recipe_for(opened, machine, threads, "float16" if dtype == "auto" else dtype)
            cache = ArtifactCache()
            artifact = None if folder else cache.find(recipe, is_searched=is_searched or None)
            is_new = artifact is None
            if is_new and is_searched:
                searched = _searched(recipe, opened.weights, bar.show)
            plan = searched.plan if searched else None
            if folder is not None:
                artifact = build_artifact(folder, recipe, opened.weights, plan=plan, progress=bar.show)
            elif artifact is None:
                artifact = cache.find_or_build(recipe, opened.weights, plan=plan, progress=bar.show).artifact
    except (BuildError, LibraryError, StepError, OSError, ValueError) as error:
        fail(str(error))
    for line in lines_of(searched) if searched else ():
        out.print(line, highlight=False, soft_wrap=True)
    _show(artifact, threads, is_new=is_new)


def _searched(recipe: "Recipe", weights: "Weights", show: "Progress") -> "Searched":
    from megakernel.graph import DEFAULT_SPLIT_TOKENS
    from megakernel.plan_search import SearchQuestion, searched_plan

    question = SearchQuestion(
        shape=recipe.shape,
        formats=recipe.formats,
        fingerprint=recipe.fingerprint,
        weights=weights,
        machine=recipe.machine,
        bucket=_SEARCHED_BUCKET,
        split_tokens=DEFAULT_SPLIT_TOKENS,
        largest_bucket=recipe.buckets[-1],
    )
    return searched_plan(
        question,
        lambda at: show("searching for a schedule", at.evaluations / at.of),
        lambda done, of: show("measuring plans", done / of),
    )


def _show(artifact: "Artifact", threads: int, *, is_new: bool) -> None:
    manifest = artifact.manifest
    kind = "searched schedule" if manifest.is_searched else "schedule without search"
    out.print(
        f"[bold]{escape(manifest.model)}[/], {threads} threads, KV {manifest.kv_format}, {kind}"
        f"{'' if is_new else ', compiled before'}"
    )
    out.print(f"  {escape(str(artifact.folder))}", soft_wrap=True)
    sizes = (f"{name} {entry.num_bytes / 1e6:.1f} MB" for name, entry in manifest.files.items())
    out.print(f"  {', '.join(sizes)}", soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("ROWS", "CONTEXT", "MEASURED MS", "PREDICTED MS", "BOUND MS"):
        table.add_column(name, justify="right")
    for step in artifact.step_table().steps:
        table.add_row(
            str(step.rows),
            str(step.context_tokens),
            *(f"{ms:.2f}" for ms in (step.measured_ms, step.predicted_ms, step.bound_ms)),
        )
    out.print(table)
    out.print("BOUND: to read every byte once at the measured memory bandwidth")
