"""Safetensors weights: values, sharding, and refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from megakernel.model.names import expected_shapes
from megakernel.model.safetensors import SafetensorsWeights
from megakernel.model.shape import RopeScaling
from megakernel.model.weights import ModelFormatError
from tests.megakernel.model.model_files import (
    encode_safetensors,
    hf_name,
    random_tensors,
    tiny_shape,
    write_hf_folder,
)

ARCHITECTURES = ("llama", "qwen2", "qwen3")


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_names_and_formats(tmp_path: Path, architecture: str, dtype: str, num_files: int) -> None:
    shape = tiny_shape(architecture, has_tied_head=architecture != "llama")
    tensors = random_tensors(shape)
    write_hf_folder(tmp_path, shape, tensors, dtype=dtype, num_files=num_files)
    weights = SafetensorsWeights(tmp_path)
    assert weights.shape == shape
    assert weights.names == set(expected_shapes(shape))
    for name, values in tensors.items():
        dense = weights.dense(name)
        if dtype == "BF16":
            expected = (values.view(np.uint32) >> 16 << 16).view(np.float32)
        else:
            expected = values.astype(np.float16 if dtype == "F16" else np.float32).astype(np.float32)
        assert dense.dtype == np.float32
        assert dense.flags.writeable
        np.testing.assert_array_equal(dense, expected, err_msg=name)
        assert weights.formats[name] == dtype


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    shape = tiny_shape("llama")
    tensors = random_tensors(shape)
    write_hf_folder(tmp_path, shape, tensors)
    named = {hf_name(name): values for name, values in tensors.items()}
    safetensors.numpy.save_file(named, tmp_path / "model.safetensors", metadata={"format": "pt"})
    weights = SafetensorsWeights(tmp_path)
    for name, values in tensors.items():
        np.testing.assert_array_equal(weights.dense(name), values)


def test_files_without_an_index_are_all_read(tmp_path: Path) -> None:
    shape = tiny_shape("qwen2")
    tensors = random_tensors(shape)
    write_hf_folder(tmp_path, shape, tensors, num_files=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert SafetensorsWeights(tmp_path).names == set(tensors)


def test_head_of_a_tied_model_is_left_out(tmp_path: Path) -> None:
    """Some exports store the head once more although it is tied."""
    shape = tiny_shape("llama", has_tied_head=False)
    write_hf_folder(tmp_path, shape, random_tensors(shape), config={"tie_word_embeddings": True})
    weights = SafetensorsWeights(tmp_path)
    assert weights.shape.has_tied_head
    assert "head" not in weights.names


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "config",
    [{"rope_scaling": LLAMA3}, {"rope_parameters": {**LLAMA3, "rope_theta": 10_000.0}, "rope_theta": None}],
)
def test_llama_3_rope(tmp_path: Path, config: dict[str, Any]) -> None:
    shape = tiny_shape("llama")
    write_hf_folder(tmp_path, shape, random_tensors(shape), config=config)
    read = SafetensorsWeights(tmp_path).shape
    assert read.rope_theta == 10_000.0
    assert read.rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    )


def test_linear_rope(tmp_path: Path) -> None:
    shape = tiny_shape("llama")
    config = {"rope_scaling": {"type": "linear", "factor": 4.0}}
    write_hf_folder(tmp_path, shape, random_tensors(shape), config=config)
    assert SafetensorsWeights(tmp_path).shape.rope_divisors == (4.0,) * (shape.head_dim // 2)


def test_theta_of_the_rope_section_wins(tmp_path: Path) -> None:
    shape = tiny_shape("qwen3", rope_theta=1_000_000.0)
    config = {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}}
    write_hf_folder(tmp_path, shape, random_tensors(shape), config=config)
    assert SafetensorsWeights(tmp_path).shape == shape


@pytest.mark.parametrize(
    "config",
    [
        {"sliding_window": 32_768},
        {"sliding_window": 32_768, "use_sliding_window": False, "max_window_layers": 2},
        {"layer_types": ["full_attention", "full_attention"]},
    ],
)
def test_sliding_window_that_is_off_is_accepted(tmp_path: Path, config: dict[str, Any]) -> None:
    shape = tiny_shape("qwen2")
    write_hf_folder(tmp_path, shape, random_tensors(shape), config=config)
    assert SafetensorsWeights(tmp_path).shape == shape


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["MixtralForCausalLM"]}, "LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"),
    ({"architectures": None}, "architectures"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq.*F32, F16, BF16.*GGUF"),
    ({"use_sliding_window": True}, "sliding-window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn.*default, linear, llama3"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "factor"),
    ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
    ({"rope_scaling": "steep"}, "rope_scaling"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"num_key_value_heads": 3}, "does not divide"),
    ({"head_dim": 15}, "even"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": -64}, "hidden_size"),
    ({"num_hidden_layers": 3}, "layers.2"),
    ({"num_hidden_layers": 1}, r"layers.1.* should not be in"),
    ({"vocab_size": 301}, "calls for"),
    ({"rope_theta": True}, "rope_theta"),
]


@pytest.mark.parametrize(("config", "named"), REFUSALS, ids=lambda value: str(value)[:40])
def test_refused_config_is_named(tmp_path: Path, config: dict[str, Any], named: str) -> None:
    shape = tiny_shape("llama")
    write_hf_folder(tmp_path, shape, random_tensors(shape), config=config)
    with pytest.raises(ModelFormatError, match=named):
        SafetensorsWeights(tmp_path)


@pytest.mark.parametrize(
    ("config", "named"),
    [({"quantization_config": {"quant_method": "awq"}}, "awq"), ({"architectures": []}, "Qwen3")],
)
def test_config_is_refused_before_its_odd_tensors(tmp_path: Path, config: dict[str, Any], named: str) -> None:
    shape = tiny_shape("llama")
    write_hf_folder(tmp_path, shape, random_tensors(shape), config=config)
    packed = {"model.layers.0.mlp.up_proj.qweight": np.zeros((8, 8), dtype=np.float32)}
    (tmp_path / "model.safetensors").write_bytes(encode_safetensors(packed, "F32"))
    with pytest.raises(ModelFormatError, match=named):
        SafetensorsWeights(tmp_path)


def test_unsupported_dtype_lists_the_supported(tmp_path: Path) -> None:
    shape = tiny_shape("llama")
    tensors = random_tensors(shape)
    write_hf_folder(tmp_path, shape, tensors)
    named = {hf_name(name): values for name, values in tensors.items()}
    (tmp_path / "model.safetensors").write_bytes(encode_safetensors(named, "F64"))
    with pytest.raises(ModelFormatError, match="F64, which is not supported; supported: F32, F16, BF16"):
        SafetensorsWeights(tmp_path)


def test_unknown_tensor_is_refused(tmp_path: Path) -> None:
    shape = tiny_shape("llama")
    write_hf_folder(tmp_path, shape, random_tensors(shape))
    extra = {"model.layers.0.self_attn.o_proj.bias": np.zeros(64, dtype=np.float32)}
    (tmp_path / "more.safetensors").write_bytes(encode_safetensors(extra, "F32"))
    with pytest.raises(ModelFormatError, match=r"o_proj\.bias"):
        SafetensorsWeights(tmp_path)


def test_scales_of_kv_in_8_bits_are_left_out(tmp_path: Path) -> None:
    shape = tiny_shape("llama")
    write_hf_folder(tmp_path, shape, random_tensors(shape))
    names = SafetensorsWeights(tmp_path).names
    one = np.ones(1, dtype=np.float32)
    extra = {f"model.layers.0.self_attn.{part}_proj.{part}_scale": one for part in "kv"}
    (tmp_path / "more.safetensors").write_bytes(encode_safetensors(extra, "F32"))
    assert SafetensorsWeights(tmp_path).names == names


def test_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    shape = tiny_shape("llama")
    write_hf_folder(tmp_path, shape, random_tensors(shape))
    (tmp_path / "copy.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(ModelFormatError, match="too"):
        SafetensorsWeights(tmp_path)


def test_truncated_file_is_named(tmp_path: Path) -> None:
    shape = tiny_shape("llama")
    write_hf_folder(tmp_path, shape, random_tensors(shape))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelFormatError, match=r"model\.safetensors: truncated"):
        SafetensorsWeights(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": {"a": "../../etc/passwd"}}])
def test_broken_index_is_refused(tmp_path: Path, index: dict[str, Any]) -> None:
    shape = tiny_shape("llama")
    write_hf_folder(tmp_path, shape, random_tensors(shape), num_files=2)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFormatError, match=r"index\.json"):
        SafetensorsWeights(tmp_path)


def test_folder_without_weights_is_named(tmp_path: Path) -> None:
    shape = tiny_shape("llama")
    write_hf_folder(tmp_path, shape, random_tensors(shape))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelFormatError, match=r"no \*\.safetensors"):
        SafetensorsWeights(tmp_path)
