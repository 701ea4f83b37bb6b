"""Joins Prometheus text expositions of many processes into one valid exposition."""

from collections.abc import Mapping


class _Family:
    def __init__(self) -> None:
        self.help = ""
        self.type = ""
        self.samples: list[str] = []


class ExpositionMerger:
    """A family is announced once, by whoever came first; every later sample of it goes below that."""

    def __init__(self) -> None:
        self._families: dict[str, _Family] = {}

    def add(self, text: str, labels: Mapping[str, str] | None = None) -> None:
        """`labels` are put on every sample. Lines before any family's announcement are dropped."""
        prefix = label_text(labels or {})
        family: _Family | None = None
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = self._announced(line)
            elif line and not line.startswith("#") and family is not None:
                family.samples.append(with_labels(line, prefix))

    def text(self) -> str:
        lines: list[str] = []
        for family in self._families.values():
            lines += filter(None, (family.help, family.type))
            lines += family.samples
        return "\n".join(lines) + "\n" if lines else ""

    def _announced(self, line: str) -> _Family:
        _, keyword, name, *_ = [*line.split(" ", 3), ""]
        family = self._families.setdefault(name, _Family())
        if keyword == "HELP":
            family.help = family.help or line
        else:
            family.type = family.type or line
        return family


def label_text(labels: Mapping[str, str]) -> str:
    """`name="value"` pairs as an exposition writes them."""
    return ",".join([f'{name}="{_escaped(value)}"' for name, value in labels.items()])


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def with_labels(sample: str, labels: str) -> str:
    """`sample` is one line: `name value` or `name{...} value`; a name holds neither brace nor space."""
    if not labels:
        return sample
    brace, space = sample.find("{"), sample.find(" ")
    if brace == -1 or (space != -1 and space < brace):
        return f"{sample[:space]}{{{labels}}}{sample[space:]}"
    separator = "" if sample[brace + 1 : brace + 2] == "}" else ","
    return f"{sample[: brace + 1]}{labels}{separator}{sample[brace + 1 :]}"
