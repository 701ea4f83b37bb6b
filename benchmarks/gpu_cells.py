"""Which shapes, formats, batches and contexts are measured on a GPU, and in which order."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import get_args

import msgspec

from benchmarks.gpu_models import GpuModel
from benchmarks.gpu_peers import Kind
from benchmarks.gpu_table import Cell
from megakernel.pack_cuda import PACKED_FORMATS
from megakernel.shapes import SHAPES

WHOLE_CELL_AT = (1, 512)
"""Batch and context at which the whole step is compiled in torch's own way too: once and last, as it takes a
minute or more."""
_NONE = "none"


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """All of it in the order of interest: the last are left out where time is short."""

    shapes: tuple[str, ...] = ("qwen3-1.7b", "qwen2.5-1.5b", "llama-3.2-1b")
    formats: tuple[str, ...] = ("Q4_0", "Q8_0", "BF16")
    batches: tuple[int, ...] = (1, 16, 4, 8, 2)
    contexts: tuple[int, ...] = (512, 2048, 64)
    peers: tuple[Kind, ...] = ("eager", "compiled", "int4", "reduce_overhead")

    def groups(self) -> Iterator[tuple[Cell, ...]]:
        """Cells of one batch and shape, whose kernels are the same: every shape of a batch, then the next."""
        for batch in self.batches:
            for shape in self.shapes:
                yield tuple(Cell(shape, batch, context) for context in self.contexts)

    @property
    def peers_everywhere(self) -> tuple[Kind, ...]:
        return tuple(kind for kind in self.peers if kind != "reduce_overhead")

    @property
    def whole_cell(self) -> Cell | None:
        """Where `reduce_overhead` is measured: of the first shape."""
        batch, context = WHOLE_CELL_AT
        is_chosen = "reduce_overhead" in self.peers and batch in self.batches and context in self.contexts
        return Cell(self.shapes[0], batch, context) if is_chosen else None

    def model(self, shape: str, format: str, batch: int, search_s: float) -> GpuModel:
        return GpuModel(shape_name=shape, format=format, bucket=batch, search_s=search_s)

    def models(self, search_s: float) -> list[GpuModel]:
        """In the order of need."""
        return [
            self.model(cells[0].shape, format, cells[0].batch, search_s)
            for cells in self.groups()
            for format in self.formats
        ]


QUICK = Selection(
    shapes=("qwen3-1.7b",),
    formats=("Q4_0", "BF16"),
    batches=(1,),
    contexts=(512,),
    peers=("eager", "compiled"),
)


def add_options(options: argparse.ArgumentParser) -> None:
    every = Selection()
    for name, read, known in (
        ("shapes", names_of(tuple(SHAPES)), every.shapes),
        ("formats", names_of(PACKED_FORMATS), every.formats),
        ("batches", sizes_of, every.batches),
        ("contexts", sizes_of, every.contexts),
        ("peers", names_of(get_args(Kind), can_be_none=True), every.peers),
    ):
        said = ",".join(str(value) for value in known)
        also = f", or {_NONE}" if name == "peers" else ""
        options.add_argument(
            f"--{name}", type=read, metavar="LIST", help=f"in this order; {said} where not given{also}"
        )


def selection_of(options: argparse.Namespace) -> Selection:
    """What was asked for, and else the usual (`--quick`: less of it)."""
    asked = {name: getattr(options, name) for name in Selection.__struct_fields__}
    asked = {name: value for name, value in asked.items() if value is not None}
    return msgspec.structs.replace(QUICK if options.quick else Selection(), **asked)


def names_of(known: Sequence[str], *, can_be_none: bool = False) -> Callable[[str], tuple[str, ...]]:
    def read(text: str) -> tuple[str, ...]:
        if can_be_none and text == _NONE:
            return ()
        names = tuple(dict.fromkeys(text.split(",")))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown) or 'nothing'} is not among {', '.join(known)}"
            )
        return names

    return read


def sizes_of(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of positive numbers, such as 1,16")
    return sizes
