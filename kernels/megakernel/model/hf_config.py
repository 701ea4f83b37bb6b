"""From a Hugging Face config.json to a ModelShape, refusing what would be computed wrong."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megakernel.model.shape import ModelShape, RopeScaling
from megakernel.model.weights import ModelFormatError, shown

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
_MAX_SIZE = 1 << 24


class _Config:
    """Typed look-ups; every miss is a ModelFormatError that names the key."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    def fail(self, key: str, problem: str) -> ModelFormatError:
        return ModelFormatError(f"{self.path}: `{key}` {problem}")

    def size(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value <= _MAX_SIZE:
            raise self.fail(key, f"is {shown(value)}; it must be an integer from 1 to {_MAX_SIZE}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.fail(key, f"is {shown(value)}; it must be a positive number")
        return float(value)

    def section(self, key: str) -> "_Config | None":
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(key, "must be an object")
        return _Config(self.path, value)


def shape_from_config(
    path: Path, values: Mapping[str, Any], *, has_qkv_bias: bool, has_head: bool
) -> ModelShape:
    """Raises ModelFormatError. What the tensors tell better than the config is passed in."""
    config = _Config(path, values)
    architecture = supported_architecture(path, values)
    hidden_size = config.size("hidden_size")
    num_heads = config.size("num_attention_heads")
    num_kv_heads = config.size("num_key_value_heads", num_heads)
    head_dim = config.size("head_dim", max(hidden_size // num_heads, 1))
    if num_heads % num_kv_heads:
        raise config.fail(
            "num_key_value_heads", f"is {num_kv_heads}, which does not divide {num_heads} heads"
        )
    if head_dim % 2:
        raise config.fail("head_dim", f"is {head_dim}; RoPE needs an even size")
    rope = config.section("rope_parameters")
    theta = (rope or config).positive("rope_theta", config.positive("rope_theta", 10_000.0))
    scaling, divisors = _rope_scaling(rope or config.section("rope_scaling"), head_dim)
    return ModelShape(
        architecture=architecture,
        num_layers=config.size("num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=config.size("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=config.size("vocab_size"),
        max_context_tokens=config.size("max_position_embeddings"),
        rope_theta=theta,
        rope_scaling=scaling,
        rope_divisors=divisors,
        rms_norm_eps=config.positive("rms_norm_eps", 1e-6),
        has_qkv_bias=has_qkv_bias or architecture == "qwen2",
        has_qk_norm=architecture == "qwen3",
        has_tied_head=bool(values.get("tie_word_embeddings", False)) or not has_head,
    )


def supported_architecture(path: Path, values: Mapping[str, Any]) -> str:
    """`llama`, `qwen2` or `qwen3`. Raises ModelFormatError for anything else, and for variants of these."""
    config = _Config(path, values)
    names = config.values.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise config.fail("architectures", f"is {shown(names)}; supported: one of {', '.join(ARCHITECTURES)}")
    _refuse_variants(config)
    return ARCHITECTURES[name]


def _refuse_variants(config: _Config) -> None:
    """Options of these architectures that change the result and are not built here."""
    values = config.values
    if values.get("quantization_config") is not None:
        method = (config.section("quantization_config") or config).values.get("quant_method")
        raise config.fail(
            "quantization_config",
            f"says the weights are quantized ({shown(method)}); supported in safetensors: F32, F16, BF16 "
            "(for a quantized model give a GGUF)",
        )
    if values.get("hidden_act", "silu") != "silu":
        raise config.fail("hidden_act", f"is {shown(values['hidden_act'])}; supported: silu")
    if values.get("use_sliding_window") or "sliding_attention" in (values.get("layer_types") or ()):
        raise config.fail("use_sliding_window", "is on; sliding-window attention is not supported")
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise config.fail("partial_rotary_factor", "must be 1")
    if values.get("mlp_bias"):
        raise config.fail("mlp_bias", "is on; biases are supported in Q, K and V only")


def _rope_scaling(rope: _Config | None, head_dim: int) -> tuple[RopeScaling | None, tuple[float, ...] | None]:
    """Llama 3's rule, or plain divisors for linear scaling."""
    if rope is None:
        return None, None
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind == "default":
        return None, None
    if kind == "linear":
        factor = rope.positive("factor")
        return None, None if factor == 1.0 else (factor,) * (head_dim // 2)
    if kind != "llama3":
        raise rope.fail("rope_scaling", f"has rope type {shown(kind)}; supported: default, linear, llama3")
    scaling = RopeScaling(
        factor=rope.positive("factor"),
        low_freq_factor=rope.positive("low_freq_factor"),
        high_freq_factor=rope.positive("high_freq_factor"),
        original_max_position=rope.size("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise rope.fail("high_freq_factor", "must be greater than low_freq_factor")
    return scaling, None
