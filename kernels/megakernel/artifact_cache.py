"""The user's artifacts, by key: built once, found again, the oldest of a model removed."""

import contextlib
import os
import shutil
from pathlib import Path

import msgspec

from megakernel.artifact import Progress
from megakernel.artifact_build import build_in_place
from megakernel.artifact_folder import Artifact, Wanted, open_artifact
from megakernel.folder_lock import is_held, locked
from megakernel.manifest import MANIFEST, ArtifactError
from megakernel.model.weights import Weights
from megakernel.plan import Plan
from megakernel.recipe import Recipe
from megakernel.user_cache import cache_folder

KEPT = 4
"""Artifacts of one model, the last used ones; and those whose manifest somebody holds (`folder_lock`)."""
_FINGERPRINT_CHARS = 12


class Found(msgspec.Struct, frozen=True):
    artifact: Artifact
    was_built: bool


class ArtifactCache:
    """`folder` None: in the user's cache folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_folder() / "artifacts"

    def find(self, recipe: Recipe, *, is_searched: bool | None = None) -> Artifact | None:
        """A whole one for this machine; a searched one before a plain one where `is_searched` is None.

        Raises BuildError without a compiler, whose identity is part of the key.
        """
        kinds = (True, False) if is_searched is None else (is_searched,)
        paths = [self._path(recipe, kind) for kind in kinds]
        return next((artifact for path in paths if (artifact := _usable(path, recipe))), None)

    def find_any(self, wanted: Wanted) -> Artifact | None:
        """The last used one that serves `wanted`, whatever compiler made it."""
        for path in self._newest_first(wanted.fingerprint):
            with contextlib.suppress(ArtifactError):
                artifact = open_artifact(path)
                artifact.check_for(wanted)
                artifact.verify()
                return artifact
        return None

    def find_or_build(
        self,
        recipe: Recipe,
        weights: Weights,
        *,
        plan: Plan | None = None,
        progress: Progress | None = None,
    ) -> Found:
        """`plan` is a search's: without one, an artifact that a search went into is taken first.

        Raises what `build_artifact` raises.
        """
        is_searched = plan is not None
        path = self._path(recipe, is_searched)
        if artifact := self.find(recipe, is_searched=is_searched or None):
            return Found(artifact, False)
        with locked(path, progress):
            if artifact := _usable(path, recipe):  # built while we waited
                return Found(artifact, False)
            artifact = build_in_place(path, recipe, weights, plan, progress)
        self._prune(recipe.fingerprint)
        return Found(artifact, True)

    def _path(self, recipe: Recipe, is_searched: bool) -> Path:
        key = recipe.key(is_searched=is_searched)
        return self.folder / f"{recipe.fingerprint[:_FINGERPRINT_CHARS]}-{key}"

    def _newest_first(self, fingerprint: str) -> list[Path]:
        pattern = f"{fingerprint[:_FINGERPRINT_CHARS]}-*/{MANIFEST}"
        used = {path.parent: _used_ns(path) for path in self.folder.glob(pattern)}
        return sorted(used, key=lambda path: (-used[path], path.name))

    def _prune(self, fingerprint: str) -> None:
        for path in self._newest_first(fingerprint)[KEPT:]:
            with contextlib.suppress(OSError):
                if not is_held(path / MANIFEST):
                    shutil.rmtree(path)


def _usable(path: Path, recipe: Recipe) -> Artifact | None:
    """None also for one that is damaged: it will be built again."""
    wanted = Wanted(
        fingerprint=recipe.fingerprint,
        kv_format=recipe.kv_format,
        num_workers=recipe.machine.num_workers,
    )
    try:
        artifact = open_artifact(path)
        artifact.check_for(wanted)
        artifact.verify()
    except ArtifactError:
        return None
    with contextlib.suppress(OSError):
        os.utime(path / MANIFEST)  # when it was last used
    return artifact


def _used_ns(manifest: Path) -> int:
    try:
        return manifest.stat().st_mtime_ns
    except OSError:
        return 0
