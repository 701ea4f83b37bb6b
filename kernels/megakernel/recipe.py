"""All that goes into an artifact, and the key that follows from it."""

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import msgspec

from megakernel.artifact import Progress, packed_formats
from megakernel.buckets import BUCKETS
from megakernel.build import find_compiler, headers, library_flags
from megakernel.codegen_limits import KvFormat
from megakernel.cpu_identity import this_cpu
from megakernel.default_plan import default_plan
from megakernel.machine import Machine
from megakernel.manifest import FORMAT, UnsupportedModelError
from megakernel.model.load import OpenedModel
from megakernel.model.shape import ModelShape
from megakernel.pipeline import compile_program
from megakernel.plan import Plan
from megakernel.program import Program
from megakernel.validate import validate


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    fingerprint: str
    shape: ModelShape
    formats: Mapping[str, str]
    """As packed, by weight name."""
    machine: Machine
    """With as many workers as there will be threads."""
    kv_format: KvFormat
    buckets: tuple[int, ...] = BUCKETS
    extra_flags: tuple[str, ...] = ()

    def key(self, *, is_searched: bool) -> str:
        """The same only where the same artifact would be built. Raises BuildError without a compiler."""
        compiler = find_compiler()
        facts = (
            *(FORMAT, self.fingerprint, self.shape, sorted(self.formats.items()), self.machine),
            *(self.kv_format, self.buckets, is_searched, library_flags(self.extra_flags)),
            *(compiler, this_cpu(), source_hash()),
        )
        return hashlib.blake2b(msgspec.json.encode(facts), digest_size=10).hexdigest()

    def plan(self) -> Plan:
        """The one that needs no search."""
        return default_plan(self.shape, self.machine, self.buckets[-1], self.formats)


def recipe_for(opened: OpenedModel, machine: Machine, num_workers: int, kv_format: KvFormat) -> Recipe:
    weights = opened.weights
    return Recipe(
        model=opened.name,
        fingerprint=opened.fingerprint,
        shape=weights.shape,
        formats=packed_formats(weights.shape, weights.formats),
        machine=msgspec.structs.replace(machine, num_workers=num_workers),
        kv_format=kv_format,
    )


def compile_programs(recipe: Recipe, plan: Plan, progress: Progress | None = None) -> tuple[Program, ...]:
    """One a bucket, all of one plan. Raises UnsupportedModelError."""
    programs = []
    for done, bucket in enumerate(recipe.buckets):
        if progress is not None:
            progress(f"scheduling {bucket} rows", done / len(recipe.buckets))
        try:
            programs.append(
                compile_program(
                    recipe.shape, recipe.fingerprint, recipe.machine, bucket, plan, formats=recipe.formats
                )
            )
        except ValueError as error:  # the compiler's own errors about its input
            raise UnsupportedModelError(f"{recipe.model}: {error}") from error
    return tuple(programs)


def prove(recipe: Recipe, programs: tuple[Program, ...], progress: Progress | None = None) -> None:
    """Raises ScheduleError: such a program is never run."""
    for done, program in enumerate(programs):
        if progress is not None:
            progress(f"proving {program.bucket} rows", done / len(programs))
        validate(program, recipe.machine, recipe.formats)


@lru_cache(maxsize=1)
def source_hash() -> str:
    """Of the compiler's own files: another version may make other programs of the same model."""
    folder = Path(__file__).resolve().parent
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)}\0{len(content)}\0".encode())
        digest.update(content)
    digest.update(headers().encode())
    return digest.hexdigest()
