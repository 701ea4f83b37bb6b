"""Blocks of K: a default tile's smallest load fits beside its input, for any rows that a bucket may have."""

import pytest

from megakernel.default_plan import plan_linear
from megakernel.footprint import cuda_linear_footprint, page_needs
from megakernel.graph import uniform_formats, usual_formats
from megakernel.k_blocks import k_blocks
from megakernel.linear_tiles import linear_roles
from megakernel.machine import load_machine
from megakernel.model.shape import ModelShape
from megakernel.pack_cuda import PACKED_FORMATS
from megakernel.shapes import SHAPES
from tests.megakernel.test_compiled_programs import MACHINES

ROWS = (*range(1, 18), 32, 64)


def formats_of(shape: ModelShape) -> list[dict[str, str]]:
    return [usual_formats(shape), *(uniform_formats(shape, name) for name in PACKED_FORMATS)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("machine", [*MACHINES, "h100-ada"])
def test_every_default_tile_fits_with_any_rows(shape, machine):
    known = load_machine(machine)
    for formats in formats_of(SHAPES[shape]):
        for role in linear_roles(SHAPES[shape], formats, known):
            columns = plan_linear(role, known).tile_columns
            for rows in ROWS:
                tile = {"columns": columns, "rows": rows, "stored": role.formats}
                blocks = k_blocks(k=role.in_features, machine=known, **tile)
                needed = cuda_linear_footprint(
                    k=blocks.load_k, input_k=blocks.input_k, in_features=role.in_features, **tile
                )
                assert page_needs(needed, known.page_bytes).total <= known.num_pages, (role.name, tile)
                if blocks.input_k < role.in_features:
                    assert blocks.input_k % blocks.load_k == 0
