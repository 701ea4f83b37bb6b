"""Where TensorRT-LLM's double is, for tests that import it."""

import sys
from pathlib import Path

import pytest

DOUBLE = Path(__file__).parents[1] / "trtllm_double"


def use_double() -> None:
    """Skips the module where a real one is installed: that needs a GPU, and has tests/hardware."""
    try:
        import tensorrt_llm
    except ImportError:
        sys.path.append(str(DOUBLE))
    else:
        if not str(tensorrt_llm.__file__).startswith(str(DOUBLE)):
            pytest.skip("a real TensorRT-LLM is installed", allow_module_level=True)
