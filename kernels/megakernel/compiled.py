"""A compiled model: all that a Runtime is opened from, in an artifact's folder or made on the spot."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from megakernel.artifact import Progress, WeightLayout, pack_weights
from megakernel.build import build
from megakernel.codegen_cpu import generate
from megakernel.codegen_limits import KvFormat
from megakernel.model.shape import ModelShape
from megakernel.model.weights import Weights
from megakernel.program import Program


class Compiled(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Programs ascend by bucket. Nothing here proves them: see `artifact_build`."""

    programs: tuple[Program, ...]
    shape: ModelShape
    kv_format: KvFormat
    layout: WeightLayout
    buffer_offsets: Mapping[str, int]
    """Bytes from the start of the activations, by buffer name."""
    library: Path
    fill_weights: Callable[[npt.NDArray[np.uint8]], None]
    """Writes the packed weights into `[layout.num_bytes]`; may raise what reading them raises."""

    @property
    def buckets(self) -> tuple[int, ...]:
        return tuple(program.bucket for program in self.programs)

    @property
    def num_workers(self) -> int:
        return len(self.programs[0].workers)


def compile_here(
    programs: Sequence[Program],
    weights: Weights,
    *,
    formats: Mapping[str, str] | None = None,
    kv_format: KvFormat = "float16",
    library_folder: Path | None = None,
    extra_flags: Sequence[str] = (),
    progress: Progress | None = None,
) -> Compiled:
    """Without a folder of its own: for tests and measurements. `formats` None: as they are stored.

    Raises BuildError, CodegenError.
    """
    generated = generate(programs, weights.formats if formats is None else formats, kv_format)
    library = build(generated.source, folder=library_folder, extra_flags=extra_flags, progress=progress)
    return Compiled(
        programs=tuple(programs),
        shape=weights.shape,
        kv_format=kv_format,
        layout=generated.layout,
        buffer_offsets=generated.buffer_offsets,
        library=library,
        fill_weights=partial(_pack, generated.layout, weights, progress),
    )


def _pack(
    layout: WeightLayout, weights: Weights, progress: Progress | None, out: npt.NDArray[np.uint8]
) -> None:
    pack_weights(layout, weights, out, progress)
