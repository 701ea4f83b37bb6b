"""Writes tiny models to disk, as GGUF files and as Hugging Face folders, with the values they should give."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import tokenizers
from gguf.constants import GGMLQuantizationType

from megakernel.model.names import GGUF_GLOBAL, GGUF_LAYER, HF_GLOBAL, HF_LAYER, expected_shapes
from megakernel.model.shape import ModelShape

Tensors = dict[str, npt.NDArray[np.float32]]

VOCAB_SIZE = 300
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def tiny_shape(architecture: str, **changes: Any) -> ModelShape:
    fields: dict[str, Any] = {
        "architecture": architecture,
        "num_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32 if architecture == "qwen3" else 16,
        "vocab_size": VOCAB_SIZE,
        "max_context_tokens": 128,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-6,
        "has_qkv_bias": architecture == "qwen2",
        "has_qk_norm": architecture == "qwen3",
        "has_tied_head": True,
    }
    return ModelShape(**(fields | changes))


def random_tensors(shape: ModelShape, seed: int = 0) -> Tensors:
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(size, dtype=np.float32)
        for name, size in sorted(expected_shapes(shape).items())
    }


def interleaved(values: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """Rows from half-split to interleaved RoPE order: what converters do to a Llama's Q and K."""
    head_dim = len(values) // num_heads
    split = values.reshape(num_heads, 2, head_dim // 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def file_name(name: str, top: Mapping[str, str], layer: Mapping[str, str], prefix: str) -> str:
    """The file's name of one of our tensors."""
    if name.startswith("layers."):
        _, number, part = name.split(".")
        return f"{prefix}{number}.{next(theirs for theirs, ours in layer.items() if ours == part)}"
    return next(theirs for theirs, ours in top.items() if ours == name)


def gguf_name(name: str) -> str:
    return file_name(name, GGUF_GLOBAL, GGUF_LAYER, "blk.")


def hf_name(name: str) -> str:
    return file_name(name, HF_GLOBAL, HF_LAYER, "model.layers.")


def byte_level_vocabulary() -> list[str]:
    """Two specials, the byte alphabet, then fill: enough for a byte-level tokenizer of VOCAB_SIZE."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|im_start|>", "<|im_end|>", *alphabet, "he", "ll", "hell", "hello"]
    return tokens + [f"<fill_{i}>" for i in range(VOCAB_SIZE - len(tokens))]


MERGES = ["h e", "l l", "he ll", "hell o"]


def gguf_metadata(shape: ModelShape) -> dict[str, Any]:
    arch = shape.architecture
    tokens = byte_level_vocabulary()
    kinds = [3, 3] + [1] * (len(tokens) - 2)
    return {
        f"{arch}.block_count": shape.num_layers,
        f"{arch}.context_length": shape.max_context_tokens,
        f"{arch}.embedding_length": shape.hidden_size,
        f"{arch}.feed_forward_length": shape.intermediate_size,
        f"{arch}.attention.head_count": shape.num_heads,
        f"{arch}.attention.head_count_kv": shape.num_kv_heads,
        f"{arch}.attention.key_length": shape.head_dim,
        f"{arch}.attention.value_length": shape.head_dim,
        f"{arch}.rope.dimension_count": shape.head_dim,
        f"{arch}.rope.freq_base": shape.rope_theta,
        f"{arch}.attention.layer_norm_rms_epsilon": shape.rms_norm_eps,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def write_gguf(
    path: Path,
    shape: ModelShape,
    tensors: Mapping[str, npt.NDArray[Any]],
    *,
    storage: GGMLQuantizationType = GGMLQuantizationType.F32,
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, npt.NDArray[Any]] | None = None,
    architecture: str | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """Matrices in `storage` (bytes as they are where given as such), vectors in F32.

    Returns what was stored, by our name, in our row order.
    """
    writer = gguf.GGUFWriter(path, architecture or shape.architecture)
    for key, value in {**gguf_metadata(shape), **(metadata or {})}.items():
        _add(writer, key, value)
    stored: dict[str, npt.NDArray[Any]] = {}
    for name, values in tensors.items():
        part = name.rpartition(".")[2]
        is_done = values.ndim == 1 or values.dtype == np.uint8
        kept = values if is_done else gguf.quantize(values, storage)
        stored[name] = kept
        if shape.architecture == "llama" and part in ("q", "k", "q_bias", "k_bias"):
            kept = interleaved(kept, shape.num_heads if part.startswith("q") else shape.num_kv_heads)
        writer.add_tensor(gguf_name(name), kept, raw_dtype=storage if values.ndim > 1 else None)
    for theirs, values in (extra or {}).items():
        writer.add_tensor(theirs, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """None leaves the key out."""
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif value is not None:
        writer.add_array(key, value)


def hf_config(shape: ModelShape) -> dict[str, Any]:
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    return {
        "architectures": [names[shape.architecture]],
        "model_type": shape.architecture,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_context_tokens,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.rms_norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.has_tied_head,
    }


def encode_safetensors(tensors: Mapping[str, npt.NDArray[Any]], dtype: str) -> bytes:
    """The container by hand; BF16 keeps the upper half of each float32."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[bytes] = []
    offset = 0
    for name, values in tensors.items():
        if dtype == "BF16":
            raw = (np.ascontiguousarray(values).view(np.uint32) >> 16).astype("<u2").tobytes()
        else:
            raw = values.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype]).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [offset, offset + len(raw)],
        }
        parts.append(raw)
        offset += len(raw)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def write_hf_folder(
    folder: Path,
    shape: ModelShape,
    tensors: Tensors,
    *,
    dtype: str = "F32",
    config: Mapping[str, Any] | None = None,
    num_files: int = 1,
) -> None:
    """A whole folder: config, tokenizer, weights; with an index where there are several files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**hf_config(shape), **(config or {})}))
    write_tokenizer(folder)
    named = {hf_name(name): values for name, values in tensors.items()}
    if num_files == 1:
        (folder / "model.safetensors").write_bytes(encode_safetensors(named, dtype))
        return
    weight_map: dict[str, str] = {}
    for i in range(num_files):
        file = f"model-{i + 1:05}-of-{num_files:05}.safetensors"
        part = dict(list(named.items())[i::num_files])
        (folder / file).write_bytes(encode_safetensors(part, dtype))
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_tokenizer(folder: Path) -> None:
    vocabulary = {token: i for i, token in enumerate(byte_level_vocabulary())}
    merges = [(left, right) for left, right in (merge.split(" ") for merge in MERGES)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>"},
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
