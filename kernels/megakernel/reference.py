"""The slow oracle: a dense float32 forward pass with nothing clever in it.

Shares no code with `torch_llama`, so that the two check each other; every faster executor is held to it.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from megakernel.model.shape import ModelShape
from megakernel.model.weights import Weights

KvList = list[tuple[torch.Tensor, torch.Tensor]]
"""Per layer K and V so far, each [tokens, kv_heads, head_dim]."""


@torch.inference_mode()
def reference_logits(weights: Weights, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """[tokens, vocab]: row t says what follows token_ids[: t + 1]."""
    return _Reference(weights).logits(token_ids, []).numpy()


@torch.inference_mode()
def reference_generate(weights: Weights, token_ids: Sequence[int], num_tokens: int) -> list[int]:
    """Greedy continuation, end tokens included like any other."""
    model, kv = _Reference(weights), KvList()
    generated: list[int] = []
    pending = list(token_ids)
    while len(generated) < num_tokens:
        generated.append(int(model.logits(pending, kv)[-1].argmax()))
        pending = generated[-1:]
    return generated


class _Reference:
    def __init__(self, weights: Weights) -> None:
        self.shape = weights.shape
        self.tensors = {name: torch.from_numpy(weights.dense(name)) for name in weights.names}

    def logits(self, token_ids: Sequence[int], kv: KvList) -> torch.Tensor:
        """Appends the tokens' KV to `kv`, which starts as an empty list."""
        first = len(kv[0][0]) if kv else 0
        positions = torch.arange(first, first + len(token_ids))
        x = self.tensors["embed"][torch.tensor(list(token_ids))]
        for layer in range(self.shape.num_layers):
            x = x + self.attention(layer, self.norm(x, f"layers.{layer}.attn_norm"), positions, kv)
            x = x + self.mlp(layer, self.norm(x, f"layers.{layer}.mlp_norm"))
        head = self.tensors["embed" if self.shape.has_tied_head else "head"]
        return self.norm(x, "final_norm") @ head.T

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        mean_square = x.square().mean(-1, keepdim=True)
        return x * torch.rsqrt(mean_square + self.shape.rms_norm_eps) * self.tensors[name]

    def project(self, layer: int, name: str, x: torch.Tensor, num_heads: int) -> torch.Tensor:
        y = x @ self.tensors[f"layers.{layer}.{name}"].T
        if self.shape.has_qkv_bias:
            y = y + self.tensors[f"layers.{layer}.{name}_bias"]
        return y.view(len(x), num_heads, self.shape.head_dim)

    def attention(self, layer: int, x: torch.Tensor, positions: torch.Tensor, kv: KvList) -> torch.Tensor:
        shape = self.shape
        q = self.project(layer, "q", x, shape.num_heads)
        k = self.project(layer, "k", x, shape.num_kv_heads)
        v = self.project(layer, "v", x, shape.num_kv_heads)
        if shape.has_qk_norm:
            q, k = self.norm(q, f"layers.{layer}.q_norm"), self.norm(k, f"layers.{layer}.k_norm")
        q, k = rotate(q, positions, shape), rotate(k, positions, shape)
        if layer < len(kv):
            k, v = torch.cat([kv[layer][0], k]), torch.cat([kv[layer][1], v])
            kv[layer] = (k, v)
        else:
            kv.append((k, v))
        per_kv_head = shape.num_heads // shape.num_kv_heads
        k, v = k.repeat_interleave(per_kv_head, 1), v.repeat_interleave(per_kv_head, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(shape.head_dim)
        is_future = torch.arange(len(k))[None, :] > positions[:, None]
        probabilities = scores.masked_fill(is_future, -torch.inf).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", probabilities, v)
        return attended.reshape(len(x), -1) @ self.tensors[f"layers.{layer}.o"].T

    def mlp(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        gate = x @ self.tensors[f"layers.{layer}.gate"].T
        up = x @ self.tensors[f"layers.{layer}.up"].T
        return (torch.nn.functional.silu(gate) * up) @ self.tensors[f"layers.{layer}.down"].T


def rotate(x: torch.Tensor, positions: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """RoPE on [tokens, heads, head_dim], halves paired: dimension i turns with i + head_dim / 2."""
    half = shape.head_dim // 2
    frequencies = torch.tensor([frequency(shape, i) for i in range(half)], dtype=torch.float64)
    angles = positions[:, None].double() * frequencies
    cos, sin = angles.cos().float()[:, None, :], angles.sin().float()[:, None, :]
    low, high = x[..., :half], x[..., half:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def frequency(shape: ModelShape, pair: int) -> float:
    """Radians a position of one pair of dimensions, scaled as the model was trained."""
    base = math.pow(shape.rope_theta, -2 * pair / shape.head_dim)
    scaling = shape.rope_scaling
    if scaling is None:
        return base / shape.rope_divisors[pair] if shape.rope_divisors is not None else base
    wavelength = 2 * math.pi / base
    if wavelength > scaling.original_max_position / scaling.low_freq_factor:
        return base / scaling.factor
    if wavelength < scaling.original_max_position / scaling.high_freq_factor:
        return base
    smooth = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * base / scaling.factor + smooth * base
