"""Whether TensorRT-LLM can run prefill here."""

from pathlib import Path

from headrace.execution import Obstacle
from prefill_workers.check_trtllm import UnusableError, check_version, installed_version
from prefill_workers.trtllm_pins import load_pins

_DOCS = "docs/tensorrt-llm.md says how"


def tensorrt_obstacle(model_source: str) -> Obstacle | None:
    """None as far as is known: starting it may show one. Imports nothing of it."""
    try:
        check_version(load_pins(), installed_version())
    except UnusableError as error:
        return Obstacle(str(error), f"install it in NVIDIA's container ({_DOCS})")
    if not Path(model_source).is_dir():
        return Obstacle(
            f"TensorRT-LLM reads Hugging Face folders, and `model.source` is {model_source}",
            "name such a folder of the same model",
        )
    return None
