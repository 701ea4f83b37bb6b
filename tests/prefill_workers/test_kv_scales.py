"""Checkpoints with KV in 8 bits: which of them TensorRT-LLM's pool, which has no scales, can hold."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from megakernel.model.weights import ModelFormatError
from prefill_workers.kv_scales import KvScaleError, check_kv_scales, read_kv_scales
from tests.megakernel.model.model_files import encode_safetensors


def write_checkpoint(
    folder: Path, scales: list[float], algorithm: str | None = "FP8", storage: str = "F32"
) -> Path:
    """K's and V's in turn, in a file each."""
    config = {"producer": {"name": "modelopt"}, "quantization": {"kv_cache_quant_algo": algorithm}}
    (folder / "hf_quant_config.json").write_text(json.dumps(config))
    weight = {"model.layers.0.self_attn.k_proj.weight": np.ones((2, 2), dtype=np.float32)}
    (folder / "weights.safetensors").write_bytes(encode_safetensors(weight, "F32"))
    for number, scale in enumerate(scales):
        part = "kv"[number % 2]
        name = f"model.layers.{number // 2}.self_attn.{part}_proj.{part}_scale"
        data = encode_safetensors({name: np.array(scale, dtype=np.float32)}, storage)
        (folder / f"scale-{number}.safetensors").write_bytes(data)
    return folder


@pytest.mark.parametrize("storage", ["F32", "F16", "BF16"])
def test_scales_are_read_layer_by_layer(tmp_path, storage: str) -> None:
    scales = [0.25, 0.5, 1.5, 1.0]
    found = read_kv_scales(write_checkpoint(tmp_path, scales, storage=storage))
    assert list(found.values()) == scales
    assert "model.layers.1.self_attn.v_proj.v_scale" in found


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_values_that_would_be_cut_off_end_the_start(tmp_path, kv_dtype: str) -> None:
    write_checkpoint(tmp_path, [0.1, 0.2, 2.5, 0.3], algorithm="FP8" if kv_dtype == "auto" else None)
    with pytest.raises(KvScaleError, match=r"layers\.1\.self_attn\.k_proj\.k_scale` is 2\.5.* up to 1120"):
        check_kv_scales(tmp_path, kv_dtype)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0, -1.0])
def test_what_is_no_scale_ends_it_too(tmp_path, scale: float) -> None:
    with pytest.raises(KvScaleError, match=r"v_scale` is .*, expected a positive number"):
        check_kv_scales(write_checkpoint(tmp_path, [0.5, scale]), "auto")


def test_scales_that_are_not_used_are_warned_of(tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        check_kv_scales(write_checkpoint(tmp_path, [0.1, 0.5, 0.2, 0.3]), "auto")
    (message,) = caplog.messages
    assert message.startswith(f"TensorRT-LLM does not use the 4 KV scales of {tmp_path}, from 0.1 on")
    assert "hf_quant_config.json" in message


@pytest.mark.parametrize(
    ("scales", "algorithm", "kv_dtype"),
    [([], "FP8", "auto"), ([1.0, 1.0], "FP8", "auto"), ([3.0], None, "auto"), ([3.0], "FP8", "float32")],
)
def test_there_is_nothing_to_say_where_nothing_is_lost(tmp_path, caplog, scales, algorithm, kv_dtype) -> None:
    """No scales are scales of 1; a pool of 16 bits needs none."""
    check_kv_scales(write_checkpoint(tmp_path, scales, algorithm), kv_dtype)
    assert caplog.messages == []


def test_a_folder_of_no_quantizer_is_not_read(tmp_path) -> None:
    check_kv_scales(tmp_path, "auto")


def test_what_cannot_be_read_is_named(tmp_path) -> None:
    (tmp_path / "hf_quant_config.json").write_text("[]")
    with pytest.raises(KvScaleError, match="expected an object `quantization`"):
        check_kv_scales(tmp_path, "auto")
    with pytest.raises(KvScaleError, match="asks for KV in INT8"):
        check_kv_scales(write_checkpoint(tmp_path, [1.0], "INT8"), "auto")
    scales = {"model.layers.0.self_attn.k_proj.k_scale": np.ones(3, dtype=np.float32)}
    (tmp_path / "scale-0.safetensors").write_bytes(encode_safetensors(scales, "F32"))
    with pytest.raises(KvScaleError, match=r"shape \[3\], expected one number"):
        read_kv_scales(tmp_path)
    (tmp_path / "scale-0.safetensors").write_bytes(b"")
    with pytest.raises(ModelFormatError, match="is empty"):
        read_kv_scales(tmp_path)
