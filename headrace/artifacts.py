"""The megakernel's artifacts of a configuration: given, found in the user's cache, or built into it."""

from pathlib import Path
from typing import IO, Literal

import msgspec

from cluster.config import HeadraceConfig
from cluster.transfer.nixl import INSTALL, installed_package
from headrace.execution import Execution, Facts, Obstacle, choose, kv_format_of
from headrace.gpu import GpuUnusableError, gpu_machine, gpu_obstacle
from headrace.host import has_cuda, num_cores
from headrace.tensorrt import tensorrt_obstacle
from megakernel.artifact import Progress
from megakernel.artifact_folder import Artifact, Wanted, open_artifact
from megakernel.build import BuildError, find_compiler
from megakernel.folder_lock import hold
from megakernel.library import LibraryError
from megakernel.machine import PROBED, MachineError, load_machine
from megakernel.manifest import MANIFEST, UnsupportedModelError
from megakernel.model.load import OpenedModel
from megakernel.schedule_error import ScheduleError
from megakernel.step import StepError

Role = Literal["decode", "prefill"]
_NO_ARTIFACT = (
    BuildError,
    LibraryError,
    MachineError,
    OSError,
    ScheduleError,
    StepError,
    UnsupportedModelError,
)
"""Why one cannot be built here; each says so in its message."""


class Artifacts(msgspec.Struct, frozen=True, kw_only=True):
    """Folders by role; None where the role does not run the megakernel."""

    decode: str | None = None
    prefill: str | None = None


class Executable(msgspec.Struct, frozen=True, kw_only=True):
    execution: Execution
    artifacts: Artifacts
    was_built: bool
    holds: tuple[IO[bytes], ...]
    """As long as these are open, no cache removes the artifacts."""


def facts_of(config: HeadraceConfig, fingerprint: str) -> Facts:
    """What can be known without building anything. Raises ArtifactError for a given artifact of no use."""
    may_use_gpu = config.decode.executor in ("auto", "megakernel-cuda")
    return Facts(
        has_cuda=has_cuda(),
        obstacle=_compiler_obstacle(config, fingerprint),
        gpu_obstacle=gpu_obstacle() if may_use_gpu else None,
        tensorrt_obstacle=tensorrt_obstacle(config.model.source),
        nixl_obstacle=None if installed_package() else Obstacle("it is not installed", f"`{INSTALL}`"),
    )


def executable(config: HeadraceConfig, opened: OpenedModel, progress: Progress | None = None) -> Executable:
    """Decides what runs, and has its artifacts or GPU kernels ready; where those cannot be built, `auto` is
    what comes next.

    What `progress` raises ends a build. Raises ExecutionError, and ArtifactError for a given artifact.
    """
    facts = facts_of(config, opened.fingerprint)
    execution = choose(config, facts)
    if execution.decodes_on_gpu and (found := _build_for_gpu(opened, progress)) is not None:
        facts = msgspec.structs.replace(facts, gpu_obstacle=found)
        execution = choose(config, facts)
    try:
        return _with_artifacts(execution, opened, progress)
    except _NO_ARTIFACT as error:
        fix = "see the message; `headrace compile` tries again"
        obstacle = Obstacle(str(error), fix)
        return _with_artifacts(
            choose(config, msgspec.structs.replace(facts, obstacle=obstacle)), opened, None
        )


def _build_for_gpu(opened: OpenedModel, progress: Progress | None) -> Obstacle | None:
    """Into the user's cache, where replicas find the kernels; why that cannot be, if it cannot."""
    from megakernel.gpu_build import build_for_gpu  # brings the compiler, which others need not

    try:
        build_for_gpu(opened, gpu_machine(), progress)
    except (GpuUnusableError, *_NO_ARTIFACT) as error:
        return Obstacle(str(error), "see the message")
    return None


def threads_of(config: HeadraceConfig, role: Role) -> int | None:
    """None: nobody chose."""
    return config.decode.num_threads if role == "decode" else config.prefill.num_threads


def _with_artifacts(execution: Execution, opened: OpenedModel, progress: Progress | None) -> Executable:
    roles: list[Role] = []
    if execution.decodes_in_megakernel:
        roles.append("decode")
    if execution.prefills_in_megakernel:
        roles.append("prefill")
    config, folders, holds, was_built = execution.config, {}, [], False
    for role in roles:
        artifact, is_new = artifact_for(config, opened, threads_of(config, role), progress)
        was_built = was_built or is_new
        holds.append(hold(artifact.folder / MANIFEST))
        folders[role] = str(artifact.folder.absolute())
        config = _with_threads(config, role, artifact.manifest.num_workers)
    return Executable(
        execution=msgspec.structs.replace(execution, config=config),
        artifacts=Artifacts(**folders),
        was_built=was_built,
        holds=tuple(holds),
    )


def artifact_for(
    config: HeadraceConfig, opened: OpenedModel, num_threads: int | None, progress: Progress | None
) -> tuple[Artifact, bool]:
    """And whether it was built now. `config` has a concrete KV dtype."""
    kv_format = kv_format_of(config)
    wanted = Wanted(fingerprint=opened.fingerprint, kv_format=kv_format, num_workers=num_threads)
    if config.model.artifact is not None:
        return _given(Path(config.model.artifact), wanted, is_verified=True), False
    from megakernel.artifact_cache import ArtifactCache  # brings the compiler, which noop needs not
    from megakernel.recipe import recipe_for

    num_workers = num_threads or num_cores()
    cache = ArtifactCache()
    try:
        find_compiler()
    except BuildError:
        found = cache.find_any(msgspec.structs.replace(wanted, num_workers=num_workers))
        if found is None:
            raise
        return found, False
    recipe = recipe_for(opened, load_machine(PROBED), num_workers, kv_format)
    built = cache.find_or_build(recipe, opened.weights, progress=progress)
    return built.artifact, built.was_built


def _given(folder: Path, wanted: Wanted, *, is_verified: bool) -> Artifact:
    """Raises ArtifactError: whoever names a folder wants that one or none."""
    artifact = open_artifact(folder)
    artifact.check_for(wanted)
    if is_verified:
        artifact.verify()
    return artifact


def _compiler_obstacle(config: HeadraceConfig, fingerprint: str) -> Obstacle | None:
    if config.model.artifact is not None:
        dtype = config.model.kv_dtype
        wanted = Wanted(
            fingerprint=fingerprint,
            kv_format=None if dtype == "auto" else dtype,
            num_workers=config.decode.num_threads,
        )
        _given(Path(config.model.artifact), wanted, is_verified=False)
        return None
    try:
        find_compiler()
    except BuildError as error:
        from megakernel.artifact_cache import ArtifactCache

        wanted = Wanted(fingerprint=fingerprint, kv_format=None, num_workers=config.decode.num_threads)
        if ArtifactCache().find_any(wanted) is None:
            return Obstacle(
                str(error).partition(". ")[0],
                "install a C++ compiler (Debian, Ubuntu: `apt-get install g++`), or set `model.artifact` to "
                "the folder that `headrace compile --out` made on a machine with the same CPU",
            )
    return None


def _with_threads(config: HeadraceConfig, role: Role, num_threads: int) -> HeadraceConfig:
    section = config.decode if role == "decode" else config.prefill
    changed = msgspec.structs.replace(section, num_threads=num_threads)
    return msgspec.structs.replace(config, **{role: changed})
