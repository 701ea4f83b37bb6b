"""Whether TensorRT-LLM can run prefill here."""

import importlib.util
from pathlib import Path

from headrace.execution import Obstacle

_DOCS = "docs/tensorrt-llm.md says how"


def tensorrt_obstacle(model_source: str) -> Obstacle | None:
    """None as far as is known: starting it may show one. Imports nothing of it."""
    if importlib.util.find_spec("tensorrt_llm") is None:
        return Obstacle("tensorrt_llm is not installed", f"install it in NVIDIA's container ({_DOCS})")
    if not Path(model_source).is_dir():
        return Obstacle(
            f"TensorRT-LLM reads Hugging Face folders, and `model.source` is {model_source}",
            "name such a folder of the same model",
        )
    return None
