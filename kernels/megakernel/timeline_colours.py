"""Colours of the timeline's picture, for light and for dark backgrounds."""

from collections.abc import Mapping
from types import MappingProxyType

ROLE_COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "embed": "#868e96",
        "qkv": "#1c7ed6",
        "attention": "#7048e8",
        "o": "#0b7285",
        "gate_up": "#2f9e44",
        "down": "#5c7a0b",
        "head": "#c2255c",
    }
)
"""Strong, so that what is light beside them is a bubble."""
_LIGHT = {
    "paper": "#ffffff",
    "text": "#1f2328",
    "axis": "#59636e",
    "idle": "#e6e9ed",
    "waiting": "#ffd08a",
    "loading": "#ffc2d1",
    "busy": "#6e7781",
    "mark": "#1f2328",
    "number": "#ffffff",
}
_DARK = {
    "paper": "#0d1117",
    "text": "#e6edf3",
    "axis": "#9198a1",
    "idle": "#c9d1d9",
    "waiting": "#ffe0ad",
    "loading": "#ffd6e0",
    "busy": "#3d444d",
    "mark": "#0d1117",
    "number": "#ffffff",
}


def style() -> str:
    fixed = [
        "text{font:12px system-ui,-apple-system,'Segoe UI',sans-serif}",
        "text.title{font-size:18px;font-weight:600}",
        "text.caption{font-weight:600}",
        "text.axis{font-size:11px}",
        "text.inside{fill:#ffffff;text-anchor:middle;font-size:11px;pointer-events:none}",
        "text.number{text-anchor:middle;font-size:10px;font-weight:700;pointer-events:none}",
        "circle.mark{stroke:#ffffff;stroke-width:1}",
        *(f".role-{role}{{fill:{colour}}}" for role, colour in ROLE_COLOURS.items()),
    ]
    dark = "".join(_themed(_DARK))
    return "".join([*fixed, *_themed(_LIGHT)]) + f"@media (prefers-color-scheme:dark){{{dark}}}"


def _themed(colours: Mapping[str, str]) -> list[str]:
    return [
        f".paper{{fill:{colours['paper']}}}",
        f"text{{fill:{colours['text']}}}",
        f"text.axis{{fill:{colours['axis']}}}",
        f"text.number{{fill:{colours['number']}}}",
        f".tick{{stroke:{colours['axis']};fill:none}}",
        *(f".{kind}{{fill:{colours[kind]}}}" for kind in ("idle", "waiting", "loading", "busy", "mark")),
        "text.inside{fill:#ffffff}",
    ]
