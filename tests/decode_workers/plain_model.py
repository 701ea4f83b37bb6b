"""A Llama in float64, written plainly in PyTorch: what targeting's scores and choices are held to."""

import math
from collections.abc import Sequence

import torch

from megakernel.model.weights import Weights


class PlainLlama:
    """Every question runs whole texts from their first token: nothing is kept of one for the next."""

    def __init__(self, weights: Weights) -> None:
        self.shape = weights.shape
        self.tensors = {name: torch.from_numpy(weights.dense(name)).double() for name in weights.names}

    @torch.inference_mode()
    def logits(self, texts: Sequence[Sequence[int]], last_only: bool = False) -> torch.Tensor:
        """[texts, tokens, vocab] of texts of any lengths: what stands behind the shorter says nothing.

        `last_only`: [texts, vocab] after each text's last token.
        """
        shape, tensors = self.shape, self.tensors
        longest = max(len(text) for text in texts)
        ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
        x = tensors["embed"][ids]
        is_future = torch.ones(longest, longest, dtype=torch.bool).triu(1)
        for layer in range(shape.num_layers):
            at = f"layers.{layer}."
            normed = self._norm(x, at + "attn_norm")
            q = self._rotated(self._heads(normed, at + "q", shape.num_heads))
            k = self._rotated(self._heads(normed, at + "k", shape.num_kv_heads))
            v = self._heads(normed, at + "v", shape.num_kv_heads)
            k, v = (part.repeat_interleave(shape.num_heads // shape.num_kv_heads, 1) for part in (k, v))
            scores = (q @ k.transpose(2, 3) / math.sqrt(shape.head_dim)).masked_fill(is_future, -torch.inf)
            attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + attended @ tensors[at + "o"].T
            normed = self._norm(x, at + "mlp_norm")
            gate, up = normed @ tensors[at + "gate"].T, normed @ tensors[at + "up"].T
            x = x + (torch.nn.functional.silu(gate) * up) @ tensors[at + "down"].T
        if last_only:
            x = x[torch.arange(len(texts)), torch.tensor([len(text) - 1 for text in texts])]
        return self._norm(x, "final_norm") @ tensors["embed" if shape.has_tied_head else "head"].T

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.shape.rms_norm_eps).sqrt() * self.tensors[name]

    def _heads(self, x: torch.Tensor, name: str, num_heads: int) -> torch.Tensor:
        return (x @ self.tensors[name].T).unflatten(-1, (num_heads, self.shape.head_dim)).transpose(1, 2)

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        half = self.shape.head_dim // 2
        turns = self.shape.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(x.shape[2], dtype=torch.float64)[:, None] * turns
        low, high = x[..., :half], x[..., half:]
        return torch.cat(
            [low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()], -1
        )
