"""What decode on a GPU came to, as one table."""

from collections.abc import Sequence

import msgspec


class Cell(msgspec.Struct, frozen=True):
    shape: str
    batch: int
    context: int

    @property
    def name(self) -> str:
        return f"{self.shape}_batch{self.batch}_ctx{self.context}"


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """Of the table: one of ours in one cell."""

    cell: Cell
    format: str
    ms: float
    spread_ms: tuple[float, float]
    num_bytes: int
    """That a step must read."""
    ratios: dict[str, tuple[float, float, float]]
    """Peer's time over ours: median, least, most."""

    def share_of_bound(self, bandwidth_gb_s: float) -> float:
        return self.num_bytes / bandwidth_gb_s / 1e6 / self.ms


def table(lines: Sequence[Line], bandwidth_gb_s: float) -> str:
    names = list(dict.fromkeys(name for line in lines for name in line.ratios))
    head = f"{'shape':12} {'batch':>5} {'context':>7} {'ours':>5} {'ms':>8} {'spread':>15} {'of bound':>8}"
    head += "".join(f" {'x ' + name:>24}" for name in names)
    rows = [head]
    for line in sorted(lines, key=_place):
        least, most = line.spread_ms
        row = (
            f"{line.cell.shape:12} {line.cell.batch:5} {line.cell.context:7} {line.format:>5} {line.ms:8.3f}"
        )
        row += f" {f'{least:.3f}-{most:.3f}':>15} {line.share_of_bound(bandwidth_gb_s):8.0%}"
        for name in names:
            found = line.ratios.get(name)
            shown = f"{found[0]:.2f} ({found[1]:.2f}-{found[2]:.2f})" if found else "-"
            row += f" {shown:>24}"
        rows.append(row)
    return "\n".join(rows)


def _place(line: Line) -> tuple[str, int, int, str]:
    return (line.cell.shape, line.cell.batch, line.cell.context, line.format)
