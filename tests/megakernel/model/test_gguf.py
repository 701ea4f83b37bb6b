"""GGUF weights: values, names, row order, and refusals."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf.constants import GGMLQuantizationType as Q

from megakernel.model.gguf import GgufWeights, half_split_rows
from megakernel.model.gguf_file import GgufFile
from megakernel.model.load import packaged_gguf
from megakernel.model.names import expected_shapes
from megakernel.model.rope import llama3_divisors, rope_frequencies
from megakernel.model.shape import RopeScaling
from megakernel.model.weights import ModelFormatError
from tests.megakernel.model.model_files import Tensors, random_tensors, tiny_shape, write_gguf

ARCHITECTURES = ("llama", "qwen2", "qwen3")
QUANTIZABLE = (Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1)


@pytest.mark.parametrize("storage", QUANTIZABLE, ids=lambda storage: storage.name)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_names_and_formats(tmp_path: Path, architecture: str, storage: Q) -> None:
    shape = tiny_shape(architecture)
    tensors = random_tensors(shape)
    stored = write_gguf(tmp_path / "m.gguf", shape, tensors, storage=storage)
    weights = GgufWeights(tmp_path / "m.gguf")
    assert weights.names == set(expected_shapes(shape))
    for name, values in tensors.items():
        dense = weights.dense(name)
        expected = gguf.dequantize(stored[name], storage) if values.ndim > 1 else values
        assert dense.dtype == np.float32
        assert dense.flags.writeable
        assert dense.shape == values.shape
        np.testing.assert_array_equal(dense, expected, err_msg=name)
        assert weights.formats[name] == (storage.name if values.ndim > 1 else "F32")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("has_tied_head", [True, False])
def test_shape_comes_back(tmp_path: Path, architecture: str, has_tied_head: bool) -> None:
    shape = tiny_shape(architecture, has_tied_head=has_tied_head)
    write_gguf(tmp_path / "m.gguf", shape, random_tensors(shape))
    read = GgufWeights(tmp_path / "m.gguf").shape
    assert read.rms_norm_eps == pytest.approx(shape.rms_norm_eps)
    assert {**_as_dict(read), "rms_norm_eps": 0} == {**_as_dict(shape), "rms_norm_eps": 0}


def _as_dict(shape: Any) -> dict[str, Any]:
    return {field: getattr(shape, field) for field in shape.__struct_fields__}


def _decode_block(raw: npt.NDArray[np.uint8], storage: Q) -> npt.NDArray[np.float32]:
    """One block of 32 by the format's definition, a number at a time."""
    scale = np.float32(raw[:2].view("<f2")[0])
    if storage == Q.Q8_0:
        return np.array([scale * np.float32(q) for q in raw[2:].view(np.int8)], dtype=np.float32)
    minimum = np.float32(raw[2:4].view("<f2")[0]) if storage == Q.Q4_1 else np.float32(0)
    nibbles = raw[4:] if storage == Q.Q4_1 else raw[2:]
    quants = [int(byte & 15) for byte in nibbles] + [int(byte >> 4) for byte in nibbles]
    shift = 0 if storage == Q.Q4_1 else 8
    return np.array([scale * np.float32(q - shift) + minimum for q in quants], dtype=np.float32)


@pytest.mark.parametrize("storage", [Q.Q8_0, Q.Q4_0, Q.Q4_1], ids=lambda storage: storage.name)
def test_dense_is_what_the_format_defines(tmp_path: Path, storage: Q) -> None:
    shape = tiny_shape("llama")
    write_gguf(tmp_path / "m.gguf", shape, random_tensors(shape), storage=storage)
    weights = GgufWeights(tmp_path / "m.gguf")
    for name in ("layers.1.q", "layers.0.down", "embed"):
        raw = weights.raw(name)
        assert raw.format == storage.name
        blocks = raw.data.reshape(-1, raw.data.shape[1] * 32 // raw.shape[1])
        by_hand = np.concatenate([_decode_block(block, storage) for block in blocks[:12]])
        np.testing.assert_array_equal(weights.dense(name).ravel()[: by_hand.size], by_hand)


@pytest.mark.parametrize("storage", [Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.Q2_K, Q.Q3_K, Q.IQ4_NL], ids=lambda s: s.name)
def test_k_quants_are_dequantized_row_by_row(tmp_path: Path, storage: Q) -> None:
    shape = tiny_shape("llama", hidden_size=256, intermediate_size=256, head_dim=64, num_layers=1)
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[storage]
    rng = np.random.default_rng(1)
    # Bytes below 0x3C make every half-precision scale finite and small.
    raw = {
        name: rng.integers(0, 0x3C, (size[0], size[1] // block_elements * block_bytes), dtype=np.uint8)
        for name, size in expected_shapes(shape).items()
        if len(size) > 1
    }
    write_gguf(tmp_path / "m.gguf", shape, {**random_tensors(shape), **raw}, storage=storage)
    weights = GgufWeights(tmp_path / "m.gguf")
    for name, data in raw.items():
        np.testing.assert_array_equal(weights.dense(name), gguf.dequantize(data, storage))


def test_row_order_makes_both_rotations_the_same() -> None:
    """Interleaved RoPE on the file's rows is half-split RoPE on ours."""
    num_heads, head_dim = 3, 8
    rng = np.random.default_rng(2)
    theirs = rng.standard_normal(num_heads * head_dim)
    order = half_split_rows(num_heads, head_dim)
    angles = rng.standard_normal(head_dim // 2)
    cos, sin = np.cos(angles), np.sin(angles)
    pairs = theirs.reshape(num_heads, head_dim // 2, 2)
    turned = np.stack(
        [pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 0] * sin + pairs[..., 1] * cos], axis=-1
    ).reshape(-1)
    ours = theirs[order].reshape(num_heads, 2, head_dim // 2)
    first, second = ours[:, 0], ours[:, 1]
    halves = np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=1)
    np.testing.assert_allclose(turned[order], halves.reshape(-1))


def test_biases_of_a_llama_are_reordered_too(tmp_path: Path) -> None:
    shape = tiny_shape("llama", has_qkv_bias=True)
    tensors = random_tensors(shape)
    write_gguf(tmp_path / "m.gguf", shape, tensors)
    weights = GgufWeights(tmp_path / "m.gguf")
    assert weights.shape.has_qkv_bias
    for name in ("layers.0.q_bias", "layers.1.k_bias", "layers.0.v_bias"):
        np.testing.assert_array_equal(weights.dense(name), tensors[name])


def test_rope_factors_of_llama_3_become_its_rule(tmp_path: Path) -> None:
    scaling = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
    shape = tiny_shape("llama", rope_theta=500_000.0)
    divisors = llama3_divisors(scaling, rope_frequencies(shape)).astype(np.float32)
    write_gguf(tmp_path / "m.gguf", shape, random_tensors(shape), extra={"rope_freqs.weight": divisors})
    read = GgufWeights(tmp_path / "m.gguf").shape
    assert read.rope_scaling == scaling
    assert read.rope_divisors is None


def test_other_rope_factors_are_kept_as_they_are(tmp_path: Path) -> None:
    shape = tiny_shape("llama")
    divisors = np.linspace(1, 3, shape.head_dim // 2, dtype=np.float32)
    write_gguf(tmp_path / "m.gguf", shape, random_tensors(shape), extra={"rope_freqs.weight": divisors})
    read = GgufWeights(tmp_path / "m.gguf").shape
    assert read.rope_scaling is None
    assert read.rope_divisors is not None
    np.testing.assert_allclose(rope_frequencies(read) * divisors, rope_frequencies(shape), rtol=1e-6)


def test_linear_scaling_divides_all_frequencies(tmp_path: Path) -> None:
    shape = tiny_shape("qwen2")
    metadata = {"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 2.0}
    write_gguf(tmp_path / "m.gguf", shape, random_tensors(shape), metadata=metadata)
    assert GgufWeights(tmp_path / "m.gguf").shape.rope_divisors == (2.0,) * (shape.head_dim // 2)


def test_packaged_model_is_read() -> None:
    weights = GgufWeights(packaged_gguf())
    assert (weights.shape.num_layers, weights.shape.hidden_size, weights.shape.vocab_size) == (30, 576, 49152)
    assert weights.formats["embed"] == "Q8_0"
    assert weights.raw("layers.0.q").data.shape == (576, 360)


METADATA_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"llama.attention.head_count_kv": 3}, "head_count_kv"),
    ({"llama.block_count": 0}, "block_count"),
    ({"llama.block_count": 4_000_000_000}, "block_count"),
    ({"llama.block_count": 3}, "layers.2"),
    ({"llama.block_count": 1}, "layers.1"),
    ({"llama.embedding_length": None}, "embedding_length"),
    ({"llama.embedding_length": "wide"}, "embedding_length"),
    ({"llama.feed_forward_length": 97}, "calls for"),
    ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "yarn"),
    ({"llama.rope.freq_base": -1.0}, "freq_base"),
    ({"llama.rope.freq_base": float("nan")}, "freq_base"),
    ({"llama.rope.dimension_count": 8}, "RoPE over 8"),
    ({"llama.expert_count": 8}, "mixture-of-experts"),
    ({"llama.attention.sliding_window": 64}, "sliding"),
    ({"llama.attention.head_count": [4, 2]}, "layer to layer"),
    ({"split.count": 3}, "split"),
    ({"general.alignment": 24}, "alignment"),
]


@pytest.mark.parametrize(("metadata", "named"), METADATA_REFUSALS, ids=lambda value: str(value)[:40])
def test_refused_metadata_is_named(tmp_path: Path, metadata: dict[str, Any], named: str) -> None:
    shape = tiny_shape("llama")
    write_gguf(tmp_path / "m.gguf", shape, random_tensors(shape), metadata=metadata)
    with pytest.raises(ModelFormatError, match=named) as caught:
        GgufWeights(tmp_path / "m.gguf")
    assert "m.gguf" in str(caught.value)


def _without(tensors: Tensors, name: str) -> Tensors:
    return {other: values for other, values in tensors.items() if other != name}


@pytest.mark.parametrize("missing", ["layers.1.gate", "final_norm", "embed", "layers.0.k_norm"])
def test_missing_tensor_is_named(tmp_path: Path, missing: str) -> None:
    shape = tiny_shape("qwen3")
    write_gguf(tmp_path / "m.gguf", shape, _without(random_tensors(shape), missing))
    with pytest.raises(ModelFormatError, match="missing"):
        GgufWeights(tmp_path / "m.gguf")


def test_unknown_tensor_is_refused_rather_than_ignored(tmp_path: Path) -> None:
    shape = tiny_shape("qwen2")
    extra = {"blk.0.attn_output.bias": np.zeros(64, dtype=np.float32)}
    write_gguf(tmp_path / "m.gguf", shape, random_tensors(shape), extra=extra)
    with pytest.raises(ModelFormatError, match=r"attn_output\.bias.*supported: dense llama, qwen2, qwen3"):
        GgufWeights(tmp_path / "m.gguf")


def test_unsupported_architecture_lists_the_supported(tmp_path: Path) -> None:
    shape = tiny_shape("llama")
    write_gguf(tmp_path / "m.gguf", shape, random_tensors(shape), architecture="gemma2")
    with pytest.raises(ModelFormatError, match="gemma2' is not supported; supported: llama, qwen2, qwen3"):
        GgufWeights(tmp_path / "m.gguf")


def test_unsupported_quantization_lists_the_supported(tmp_path: Path) -> None:
    shape = tiny_shape("llama")
    tensors = random_tensors(shape)
    extra = {"blk.0.ffn_up.weight": np.zeros((96, 64), dtype=np.float64)}
    write_gguf(tmp_path / "m.gguf", shape, _without(tensors, "layers.0.up"), extra=extra)
    with pytest.raises(
        ModelFormatError, match=r"F64, which is not supported; supported: F32, F16, BF16, Q8_0"
    ):
        GgufWeights(tmp_path / "m.gguf")


def test_raw_is_a_view_of_the_mapped_file_where_no_row_moves() -> None:
    weights = GgufWeights(packaged_gguf())
    file = GgufFile(packaged_gguf())
    down = weights.raw("layers.3.down").data
    assert not down.flags.owndata
    np.testing.assert_array_equal(down, file.rows(file.tensors["blk.3.ffn_down.weight"]))
