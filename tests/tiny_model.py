"""Tiny random models in memory, for tests that need real arithmetic but no file."""

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from megakernel.model.shape import ModelShape, RopeScaling

Architecture = Literal["llama", "qwen2", "qwen3"]

LLAMA3_SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)


class TinyWeights:
    """`Weights` over arrays drawn from a seed; equal arguments give equal bits."""

    def __init__(self, shape: ModelShape, tensors: dict[str, npt.NDArray[np.float32]]) -> None:
        self._shape = shape
        self._tensors = tensors

    @property
    def shape(self) -> ModelShape:
        return self._shape

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    @property
    def formats(self) -> Mapping[str, str]:
        return dict.fromkeys(self._tensors, "F32")

    def dense(self, name: str) -> npt.NDArray[np.float32]:
        return self._tensors[name].copy()


def tiny_weights(
    seed: int = 0,
    architecture: Architecture = "llama",
    *,
    num_layers: int = 2,
    hidden_size: int = 48,
    intermediate_size: int = 96,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    vocab_size: int = 160,
    max_context_tokens: int = 512,
    rope_scaling: RopeScaling | None = None,
    has_tied_head: bool = True,
) -> TinyWeights:
    """`qwen2` has QKV biases, `qwen3` has QK norms."""
    shape = ModelShape(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_context_tokens=max_context_tokens,
        rope_theta=10_000.0,
        rope_scaling=rope_scaling,
        rms_norm_eps=1e-5,
        has_qkv_bias=architecture == "qwen2",
        has_qk_norm=architecture == "qwen3",
        has_tied_head=has_tied_head,
    )
    return TinyWeights(shape, _tensors(shape, np.random.default_rng(seed)))


def _tensors(shape: ModelShape, rng: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
    def matrix(rows: int, columns: int, scale: float = 2.0) -> npt.NDArray[np.float32]:
        return (rng.standard_normal((rows, columns)) * scale / math.sqrt(columns)).astype(np.float32)

    def vector(size: int, mean: float) -> npt.NDArray[np.float32]:
        values: npt.NDArray[np.float64] = rng.normal(mean, 0.3, (size,))
        return values.astype(np.float32)

    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    tensors = {
        "embed": matrix(shape.vocab_size, shape.hidden_size),
        "final_norm": vector(shape.hidden_size, 1.0),
    }
    if not shape.has_tied_head:
        tensors["head"] = matrix(shape.vocab_size, shape.hidden_size)
    for layer in range(shape.num_layers):
        at = f"layers.{layer}."
        tensors[at + "attn_norm"] = vector(shape.hidden_size, 1.0)
        tensors[at + "mlp_norm"] = vector(shape.hidden_size, 1.0)
        tensors[at + "o"] = matrix(shape.hidden_size, queries)
        tensors[at + "gate"] = matrix(shape.intermediate_size, shape.hidden_size)
        tensors[at + "up"] = matrix(shape.intermediate_size, shape.hidden_size)
        tensors[at + "down"] = matrix(shape.hidden_size, shape.intermediate_size)
        for name, size in (("q", queries), ("k", keys), ("v", keys)):
            tensors[at + name] = matrix(size, shape.hidden_size)
            if shape.has_qkv_bias:
                tensors[at + name + "_bias"] = vector(size, 0.0)
            if shape.has_qk_norm and name != "v":
                tensors[at + name + "_norm"] = vector(shape.head_dim, 1.0)
    return tensors
