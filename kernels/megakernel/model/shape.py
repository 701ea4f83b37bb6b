"""The shape of a Llama-family decoder: all that the compiler and the executors need to know of it."""

import msgspec


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """Llama 3's frequency scaling ("llama3" rope type). Other kinds are refused at load."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    architecture: str
    """`llama` (Llama, SmolLM2), `qwen2` (Qwen2, Qwen2.5: QKV bias), `qwen3` (QK norm)."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context_tokens: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    rms_norm_eps: float
    has_qkv_bias: bool
    has_qk_norm: bool
    has_tied_head: bool
    rope_divisors: tuple[float, ...] | None = None
    """[head_dim / 2] divisors of RoPE's frequencies, where a file gives them and they are not Llama 3's.

    Never set together with `rope_scaling`; `rope.rope_frequencies` honours both.
    """
