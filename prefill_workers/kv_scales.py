"""Whether TensorRT-LLM's KV pool of 8 bits can hold a checkpoint's KV: the pool has no scales.

Quantizers write a scale of K and one of V a layer, by which a stored value is to be multiplied. In an FP8
pool TensorRT-LLM's PyTorch backend takes 1 for all of them, whatever the checkpoint says
(docs/tensorrt-llm.md has where that was read). So the pool's values are KV as they are, and all that scales
still say is its range.
"""

import json
import logging
import math
from pathlib import Path

import numpy as np

from megakernel.model.safetensors import KV_SCALE_SUFFIXES, SafetensorsFile, weight_files

logger = logging.getLogger(__name__)

_LARGEST_E4M3 = 448
_CONFIG = "hf_quant_config.json"
_16_BITS = f"For a pool of 16 bits, set `kv_cache_quant_algo` to null in {_CONFIG}"


class KvScaleError(ValueError):
    """A checkpoint whose KV the pool cannot hold. The message names the fix; ends the engine's start."""


def check_kv_scales(folder: Path, kv_dtype: str) -> None:
    """`kv_dtype` is what TensorRT-LLM is given: `auto` goes by the checkpoint.

    Raises KvScaleError; ModelFormatError for files that cannot be read.
    """
    algorithm = "FP8" if kv_dtype == "fp8" else _kv_algorithm(folder) if kv_dtype == "auto" else None
    if algorithm is None:
        return
    if algorithm != "FP8":
        raise KvScaleError(f"{folder / _CONFIG} asks for KV in {algorithm}; known is FP8. {_16_BITS}")
    scales = read_kv_scales(folder)
    for name, scale in scales.items():
        if scale > 1:
            raise KvScaleError(
                f"{folder}: `{name}` is {scale:g}, so KV has values up to {scale * _LARGEST_E4M3:g}: "
                f"TensorRT-LLM's FP8 pool has no scales, and cuts them off at {_LARGEST_E4M3}. {_16_BITS}"
            )
    if any(scale < 1 for scale in scales.values()):
        logger.warning(
            "TensorRT-LLM does not use the %d KV scales of %s, from %g on: small values of KV lose "
            "precision. %s",
            len(scales),
            folder,
            min(scales.values()),
            _16_BITS,
        )


def read_kv_scales(folder: Path) -> dict[str, float]:
    """By tensor. Raises KvScaleError for what is not one positive number, ModelFormatError."""
    scales = {
        name: _number(file, name)
        for file in map(SafetensorsFile, weight_files(folder))
        for name in file.tensors
        if name.endswith(KV_SCALE_SUFFIXES)
    }
    for name, scale in scales.items():
        if not 0 < scale < math.inf:
            raise KvScaleError(f"{folder}: `{name}` is {scale}, expected a positive number")
    return scales


def _number(file: SafetensorsFile, name: str) -> float:
    tensor = file.tensors[name]
    raw = file.view(tensor.offset, tensor.num_bytes)
    if tensor.format == "F32" and len(raw) == 4:
        return float(raw.view("<f4")[0])
    if tensor.format == "F16" and len(raw) == 2:
        return float(raw.view("<f2")[0])
    if tensor.format == "BF16" and len(raw) == 2:
        return float((raw.view("<u2").astype(np.uint32) << 16).view(np.float32)[0])
    raise KvScaleError(
        f"{file.path}: `{name}` is {tensor.format} of shape {list(tensor.shape)}, expected one number of "
        "F32, F16 or BF16"
    )


def _kv_algorithm(folder: Path) -> str | None:
    path = folder / _CONFIG
    if not path.is_file():
        return None
    try:
        algorithm = json.loads(path.read_bytes())["quantization"].get("kv_cache_quant_algo")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KvScaleError(f"{path} is not a quantizer's file: expected an object `quantization`") from error
    return None if algorithm is None else str(algorithm)
