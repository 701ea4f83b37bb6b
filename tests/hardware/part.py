"""What a part of the hardware run is given, and what it gives back."""

import time
from pathlib import Path
from typing import Protocol

import msgspec

from benchmarks.gpu_builds import built
from benchmarks.gpu_models import GpuModel
from megakernel.cuda_compiled import CompiledCuda
from megakernel.user_cache import write_atomically


class PartResult(msgspec.Struct, frozen=True, kw_only=True):
    problems: tuple[str, ...] = ()
    """What must not be; none: the part has passed."""
    left_out: tuple[str, ...] = ()
    """What was not tried, and why."""
    figures: dict[str, float] = {}
    seconds: float = 0.0

    @property
    def has_passed(self) -> bool:
        return not self.problems


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """Of one part's run."""

    folder: Path
    """Of compiled models."""
    deadline_s: float
    """Of `time.monotonic()`: what is not begun by then is left out."""
    result_path: Path | None = None
    """Of the part's result, for who started its process."""
    is_quick: bool = False
    search_s: float = 0.0

    def compiled(self, model: GpuModel, *, is_awaited: bool = True) -> CompiledCuda:
        """Says so where its kernels spill. Raises BuildMissingError, at once where it is not awaited."""
        found = built(self.folder, model, self.deadline_s if is_awaited else 0.0)
        if found.resource_problem:
            print(f"  {model.name}: {found.resource_problem}", flush=True)
        return found.compiled

    def keep(self, result: PartResult) -> None:
        """What there is so far: all that is left of a part that does not end."""
        if self.result_path is not None:
            write_atomically(self.result_path, msgspec.json.encode(result))

    @property
    def left_s(self) -> float:
        return self.deadline_s - time.monotonic()


class Part(Protocol):
    """A module of this folder."""

    def models(self, *, is_quick: bool, search_s: float) -> list[GpuModel]:
        """What it wants compiled, in the order of need."""
        ...

    def run(self, setting: Setting) -> PartResult: ...
