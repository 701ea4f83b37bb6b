"""Where TensorRT-LLM's double is, and whether a real one is in its place."""

import importlib.util
from pathlib import Path

DOUBLE = Path(__file__).parent / "trtllm_double"


def has_real_tensorrt() -> bool:
    found = importlib.util.find_spec("tensorrt_llm")
    return found is not None and not str(found.origin).startswith(str(DOUBLE))
