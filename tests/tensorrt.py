"""Where TensorRT-LLM's double is, and whether a real one is in its place."""

import importlib.util
import sys
from pathlib import Path

import pytest

DOUBLE = Path(__file__).parent / "trtllm_double"


def has_real_tensorrt() -> bool:
    found = importlib.util.find_spec("tensorrt_llm")
    return found is not None and not str(found.origin).startswith(str(DOUBLE))


def hide(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were none."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(DOUBLE)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]:
        monkeypatch.delitem(sys.modules, name)


def use_double() -> None:
    """For modules that import it. Skips them where a real one is installed: that needs a GPU."""
    if has_real_tensorrt():
        pytest.skip("a real TensorRT-LLM is installed", allow_module_level=True)
    if str(DOUBLE) not in sys.path:
        sys.path.append(str(DOUBLE))
