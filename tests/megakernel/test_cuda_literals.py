"""Literals by SM and layer: as a compiler reads them, they are the numbers they were written from."""

import re
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.build import find_compiler
from megakernel.cuda_literals import Literals

MAIN = """
#include <cstdint>
#include <cstdio>
#define __constant__ static const
struct {{ uint32_t sm; }} w;
{constants}
int main() {{
    for (uint32_t layer = 0; layer < {layers}; layer++)
        for (w.sm = 0; w.sm < {workers}; w.sm++) printf("%u ", uint32_t({text}));
}}
"""


def affine(start: int, by_worker: int, by_layer: int, workers: int, layers: int):
    return [[start + by_worker * sm + by_layer * layer for sm in range(workers)] for layer in range(layers)]


@st.composite
def grids(draw):
    """Noise, even growth, even growth with odd ones among it; some numbers that nobody reads."""
    workers, layers = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    step = st.integers(-3, 3)
    grid = affine(100, draw(step), draw(step), workers, layers)
    for _ in range(draw(st.integers(0, 3))):
        sm, layer = draw(st.integers(0, workers - 1)), draw(st.integers(0, layers - 1))
        grid[layer][sm] = draw(st.one_of(st.none(), st.integers(0, 70_000)))
    if draw(st.booleans()):
        number = st.one_of(st.none(), st.integers(0, 3))
        grid = [[draw(number) for _ in range(workers)] for _ in range(layers)]
    return grid


@settings(max_examples=40, deadline=None)
@given(grids())
def test_what_a_compiler_reads(tmp_path_factory, grid):
    literals = Literals("kTable")
    text = literals.number(grid)
    source = MAIN.format(
        constants="\n".join(literals.constants), layers=len(grid), workers=len(grid[0]), text=text
    )
    folder = tmp_path_factory.mktemp("literals")
    (folder / "main.cpp").write_text(source)
    compiler = find_compiler().path
    subprocess.run([compiler, "-O0", "-o", folder / "main", folder / "main.cpp"], check=True)
    found = subprocess.run([folder / "main"], check=True, capture_output=True, text=True).stdout.split()
    wanted = [value for row in grid for value in row]
    assert all(value is None or value == int(read) for read, value in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("grid", "text"),
    [
        ([[7, 7, 7]], "7u"),
        ([[0, 1, 2, 3]], "w.sm"),
        ([[5, 4, 3, 2]], f"(w.sm * {2**32 - 1}u + 5u)"),
        ([[1, 1, 0, 0, 0]], "(w.sm < 2u ? 1u : 0u)"),
        ([[None, 4, None, 4]], "4u"),
        ([[None, None]], "0u"),
        ([[2, 2], [5, 5], [8, 8]], "(2u + layer * 3u)"),
        ([[2, 2], [5, 5], [0, 0], [9, 9]], "(layer < 2u ? (2u + layer * 3u) : (0u + (layer - 2u) * 9u))"),
    ],
)
def test_how_they_are_written(grid, text):
    assert Literals("k").number(grid) == text


def test_many_pieces_become_one_table_however_often_they_are_asked_for():
    literals = Literals("kTable")
    row = [3, 1, 4, 1, 5, 9, 2, 6]
    assert literals.number([row]) == literals.number([row, row]) == "kTable0[w.sm]"
    assert literals.constants == ["__constant__ uint16_t kTable0[] = {3, 1, 4, 1, 5, 9, 2, 6};"]
    assert not literals.is_too_large


def test_more_than_constant_memory_holds():
    literals = Literals("k")
    for start in range(300):
        literals.table([70_000 + start, *range(60)])
    assert literals.is_too_large
    assert re.match(r"__constant__ uint32_t k0\[\] = \{70000, 0, 1,", literals.constants[0])
