"""Matrix products whose rows never depend on the company they keep, bit for bit (DESIGN.md section 2).

A BLAS picks its kernel, and so its order of additions, by the number of rows. Here a product only ever
runs at row counts ("tiles") that were checked, when the model was loaded, to give the very bits of one
base tile, on random data, wherever in the tile a row stands and whatever stands beside it. Callers pad
with zero rows up to a bucket; a bucket that failed the check is looped over in the largest tile that passed.
"""

from collections.abc import Callable, Iterable

import torch
from torch.nn import functional

BASE_ROWS = 8
"""The tile whose bits define the result."""
ROW_BUCKETS = (4, 8, 16, 32, 64, 128, 256)
"""Row counts a product is tried at, ascending powers of two: each divides all later ones."""
_SMALL_SAMPLE = 32
"""Rows that small tiles are checked on."""

RowProduct = Callable[[torch.Tensor], torch.Tensor]


class RowVarianceError(RuntimeError):
    """This machine's matrix product gives a row other bits in another place of the same tile.

    Handled by whoever loads the model: nothing can be promised about tokens there.
    """


def bucket_for(num_rows: int, buckets: Iterable[int]) -> int:
    """The smallest bucket that holds `num_rows`, or the largest there is."""
    largest = 0
    for bucket in buckets:
        if bucket >= num_rows:
            return bucket
        largest = bucket
    return largest


def verified_tiles(product: RowProduct, sample: torch.Tensor, tiles: Iterable[int]) -> tuple[int, ...]:
    """The tiles at which `product` gives each row of `sample` [rows, ...] the bits of the base tile.

    `sample` has a multiple of the largest tile's rows, and of _SMALL_SAMPLE. Raises RowVarianceError where
    the base tile itself fails.
    """
    expected = _in_tiles(product, sample, BASE_ROWS)
    passed = tuple(tile for tile in tiles if _passes(product, sample, expected, tile))
    if BASE_ROWS not in passed:
        raise RowVarianceError(
            f"a product over {BASE_ROWS} rows of {tuple(sample.shape[1:])} depends on the order of rows "
            f"or on other products on this device ({sample.device}, {sample.dtype})"
        )
    return passed


def _passes(product: RowProduct, sample: torch.Tensor, expected: torch.Tensor, tile: int) -> bool:
    num_rows = max(tile, _SMALL_SAMPLE)
    sample, expected = sample[:num_rows], expected[:num_rows]
    return torch.equal(_in_tiles(product, sample, tile), expected) and torch.equal(
        _in_tiles(product, sample.roll(3, 0), tile), expected.roll(3, 0)
    )


def _in_tiles(product: RowProduct, rows: torch.Tensor, tile: int) -> torch.Tensor:
    if len(rows) == tile:
        return product(rows)
    return torch.cat([product(part) for part in torch.split(rows, tile)])


def _can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN's packed product is there: on x86 about three times MKL's at few rows."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch._C._has_mkldnn
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class RowInvariantLinear:
    """x [rows, in] -> x @ weight.T + bias [rows, out], row by row the same bits in any batch.

    Holds `weight` [out, in] once, in the layout the machine multiplies fastest; the caller drops its own.
    `tiles_by_shape` remembers what was verified, so that a model's equal layers are checked once.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tiles_by_shape: dict[tuple[int, int, bool], tuple[int, ...]],
    ) -> None:
        out_features, in_features = weight.shape
        self._is_packed = _can_pack(weight)
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight, BASE_ROWS) if self._is_packed else weight
        )
        self._bias = bias
        key = (out_features, in_features, bias is not None)
        if key not in tiles_by_shape:
            generator = torch.Generator().manual_seed(1)
            sample = torch.randn(ROW_BUCKETS[-1], in_features, generator=generator)
            tiles_by_shape[key] = verified_tiles(
                self._product, sample.to(weight.device, weight.dtype), ROW_BUCKETS
            )
        self.tiles = tiles_by_shape[key]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows` is padded to a multiple of the smallest tile, a power of two of them."""
        tile = next(tile for tile in reversed(self.tiles) if len(rows) % tile == 0)
        return _in_tiles(self._product, rows, tile)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        if self._is_packed:
            packed: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                rows, self._weight, self._bias, "none", [], ""
            )
            return packed
        return functional.linear(rows, self._weight, self._bias)


def smallest_common_tile(tiles: Iterable[tuple[int, ...]]) -> int:
    """The fewest rows at which every one of several products may run."""
    return min(set[int].intersection(*map(set, tiles)))
