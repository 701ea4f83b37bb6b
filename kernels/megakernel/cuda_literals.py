"""Numbers that depend on SM and layer, as C++: literals chosen by comparisons, tables where these are many.

`None` stands for a place whose number nobody reads: any will do, so that its neighbours' expression holds.
"""

from collections.abc import Sequence

Row = Sequence[int | None]
"""By worker."""
Grid = Sequence[Row]
"""By layer."""

_MOST_PIECES, _MOST_LAYER_GROUPS = 4, 2
_CONSTANT_BYTES = 60 * 1024
"""Of the 64 KB that a kernel has; parameters and the compiler's own numbers take some."""


class Literals:
    """Writes expressions in `w.sm` and `layer`, and the constants they read."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._names: dict[tuple[int, ...], str] = {}

    @property
    def constants(self) -> list[str]:
        return [
            f"__constant__ {_type(values)} {name}[] = {{{', '.join(map(str, values))}}};"
            for values, name in self._names.items()
        ]

    @property
    def is_too_large(self) -> bool:
        return sum(len(values) * _bytes(values) for values in self._names) > _CONSTANT_BYTES

    def number(self, grid: Grid) -> str:
        """Of type uint32_t; 0 where all is None."""
        groups = _layer_groups(grid)
        if len(groups) > _MOST_LAYER_GROUPS and not any(stride for _, _, stride in groups):
            return self.of_layer(groups)
        text, start = "", 0
        for end, row, stride in groups:
            value = self.of_worker(row)
            if stride:
                layers = f"(layer - {start}u)" if start else "layer"
                value = f"({value} + {layers} * {stride % 2**32}u)"
            text += value if end == len(grid) else f"layer < {end}u ? {value} : "
            start = end
        return f"({text})" if len(groups) > 1 else text

    def of_layer(self, groups: Sequence[tuple[int, Row, int]]) -> str:
        """By a layer's number the place of its row among those that there are. A compiler would turn
        comparisons into a jump table."""
        rows: list[tuple[int, ...]] = []
        places, start = [], 0
        for end, row, _ in groups:
            filled = tuple((value or 0) % 2**32 for value in row)
            if filled not in rows:
                rows.append(filled)
            places += [rows.index(filled)] * (end - start)
            start = end
        table = self.table([value for row in rows for value in row])
        return f"{table}[{self.table(places)}[layer] * {len(rows[0])}u + w.sm]"

    def of_worker(self, row: Row) -> str:
        pieces = _pieces(row)
        if len(pieces) > _MOST_PIECES:
            # What stands for nobody's number may be below zero.
            return f"{self.table([(value or 0) % 2**32 for value in row])}[w.sm]"
        text = ""
        for end, base, slope in pieces:
            value = _affine(base, slope)
            text += value if end == len(row) else f"w.sm < {end}u ? {value} : "
        return f"({text})" if len(pieces) > 1 else text

    def table(self, values: Sequence[int]) -> str:
        """The name of a constant array."""
        return self._names.setdefault(tuple(values), f"{self._prefix}{len(self._names)}")


def _affine(base: int, slope: int) -> str:
    """Unsigned, so that what is below zero on the way comes back."""
    if slope == 0:
        return f"{base}u"
    factor = "w.sm" if slope == 1 else f"w.sm * {slope % 2**32}u"
    return f"({factor} + {base % 2**32}u)" if base else factor


def _pieces(row: Row) -> list[tuple[int, int, int]]:
    """(end, base, slope) of workers whose numbers are base + slope * worker, greedily."""
    known = [(worker, value) for worker, value in enumerate(row) if value is not None]
    pieces: list[tuple[int, int, int]] = []
    start = 0
    while start < len(known):
        lengths = {slope: _length(known, start, slope) for slope in (0, _slope(known, start))}
        slope = max(lengths, key=lambda slope: lengths[slope])
        worker, value = known[start]
        start += lengths[slope]
        end = known[start][0] if start < len(known) else len(row)
        pieces.append((end, value - slope * worker, slope))
    return pieces or [(len(row), 0, 0)]


def _slope(known: Sequence[tuple[int, int]], start: int) -> int:
    """Between the first two, where it is whole; else 0."""
    if start + 1 == len(known):
        return 0
    (worker, value), (next_worker, next_value) = known[start : start + 2]
    slope, rest = divmod(next_value - value, next_worker - worker)
    return 0 if rest else slope


def _length(known: Sequence[tuple[int, int]], start: int, slope: int) -> int:
    """How many from `start` on are on the line; two are on any that is not flat: these count as one."""
    worker, value = known[start]
    end = start
    while end < len(known) and known[end][1] == value + slope * (known[end][0] - worker):
        end += 1
    return 1 if slope and end - start == 2 else end - start


def _layer_groups(grid: Grid) -> list[tuple[int, list[int | None], int]]:
    """(end, first row, stride) of layers whose numbers grow evenly, greedily."""
    groups: list[tuple[int, list[int | None], int]] = []
    start = 0
    while start < len(grid):
        base, stride, end = list(grid[start]), None, start + 1
        while end < len(grid):
            both = zip(grid[end], base, strict=True)
            steps = {value - held for value, held in both if value is not None and held is not None}
            step = stride
            if step is None and any(value is not None for value in grid[end]):
                step = min(steps) // (end - start) if steps else 0
            shift = (step or 0) * (end - start)
            if steps - {shift}:
                break
            stride = step
            for worker, value in enumerate(grid[end]):
                if value is not None and base[worker] is None:
                    base[worker] = value - shift
            end += 1
        groups.append((end, base, stride or 0))
        start = end
    return groups


def _type(values: Sequence[int]) -> str:
    return "uint16_t" if _bytes(values) == 2 else "uint32_t"


def _bytes(values: Sequence[int]) -> int:
    return 2 if max(values) < 2**16 else 4
