"""A decode step in torch and float64: what the kernels' results are held to, over the KV that they read.

`is_rounded` rounds where the kernels do (`megakernel.vm_state.Arithmetic.CUDA`): what is multiplied to
bfloat16, keys and values to float16, what lies between ops to float32. Without it nothing is rounded at all.
"""

from collections.abc import Mapping, Sequence

import msgspec
import torch

from megakernel.model.shape import ModelShape
from megakernel.reference import frequency
from megakernel.step import IntArray, Rows

Tensors = Mapping[str, torch.Tensor]
NO_NUMBER = 1e9
"""The gap of what is no number: JSON has no infinity."""


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """How far results are from what they are held to."""

    largest: float
    """The largest difference, over the largest of the expected values."""
    typical: float
    """The root of the mean square of differences, over that of the expected values."""


def gap(found: torch.Tensor, expected: torch.Tensor) -> Gap:
    """Beyond all bounds where anything found is no number."""
    if not bool(found.isfinite().all()):
        return Gap(largest=NO_NUMBER, typical=NO_NUMBER)
    off = (found.double() - expected).abs()
    return Gap(
        largest=float(off.max() / expected.abs().max()),
        typical=float((off.square().mean() / expected.square().mean()).sqrt()),
    )


class ReferenceStep(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    logits: torch.Tensor
    """[rows, vocab] float64"""
    kv: torch.Tensor
    """[layers, rows, K or V, KV heads, head_dim] float64"""


@torch.inference_mode()
def reference_step(
    shape: ModelShape,
    weights: Tensors,
    rows: Rows,
    key_slots: Sequence[IntArray],
    pool: torch.Tensor,
    *,
    is_rounded: bool,
) -> ReferenceStep:
    """`key_slots`: of each row, what it attends to, itself last. `pool`, [layers, slots, 2, KV heads,
    head_dim], is left as it is. Activations that are multiplied by F16 weights are rounded otherwise: none
    are here."""
    return _Step(shape, weights, rows, key_slots, pool, is_rounded).run()


class StepBuffers(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What kernels left of a step, float64: buffers between ops are those of the last layer."""

    hidden: torch.Tensor
    queries: torch.Tensor
    mlp: torch.Tensor
    logits: torch.Tensor
    kv: torch.Tensor
    """[layers, rows, K or V, KV heads, head_dim]"""


@torch.inference_mode()
def op_gaps(
    shape: ModelShape,
    weights: Tensors,
    rows: Rows,
    key_slots: Sequence[IntArray],
    pool: torch.Tensor,
    found: StepBuffers,
) -> dict[str, Gap]:
    """How far ops are from what they must make of what the kernels themselves handed them, rounded likewise.

    The hidden state between the last layer's ops is had by subtracting what the reference adds to it: an
    error of the output projections then shows in what came before. `pool` is as it was before the step.
    """
    return _Step(shape, weights, rows, key_slots, pool, is_rounded=True).op_gaps(found)


class _Step:
    def __init__(
        self,
        shape: ModelShape,
        weights: Tensors,
        rows: Rows,
        key_slots: Sequence[IntArray],
        pool: torch.Tensor,
        is_rounded: bool,
    ) -> None:
        self.shape, self.weights, self.pool, self.is_rounded = shape, weights, pool, is_rounded
        device = pool.device
        self.tokens = torch.from_numpy(rows.token_ids).to(device).long()
        self.slots = torch.from_numpy(rows.slots).to(device).long()
        self.key_slots = [torch.from_numpy(slots).to(device).long() for slots in key_slots]
        positions = torch.from_numpy(rows.positions).to(device).double()
        pairs = range(shape.head_dim // 2)
        frequencies = torch.tensor([frequency(shape, pair) for pair in pairs], dtype=torch.float64)
        angles = positions[:, None] * frequencies.to(device)
        self.cos, self.sin = angles.cos()[:, None, :], angles.sin()[:, None, :]

    def run(self) -> ReferenceStep:
        x, kept = self.embedded(), []
        for layer in range(self.shape.num_layers):
            at = f"layers.{layer}."
            queries, own = self.inputs(at, x)
            kept.append(own)
            x = self.held(x + self.held(self.product(self.attended(layer, queries, own), at + "o")))
            x = self.held(x + self.held(self.product(self.mixed(at, x), at + "down")))
        return ReferenceStep(logits=self.logits(x), kv=torch.stack(kept))

    def embedded(self) -> torch.Tensor:
        return self.held(self.weights["embed"][self.tokens])

    def op_gaps(self, found: "StepBuffers") -> dict[str, Gap]:
        """By what is compared."""
        layer = self.shape.num_layers - 1
        at = f"layers.{layer}."
        attended = self.attended(layer, found.queries, found.kv[layer])
        after_attention = found.hidden - self.held(self.product(found.mlp, at + "down"))
        before = after_attention - self.held(self.product(attended, at + "o"))
        _, first_kv = self.inputs("layers.0.", self.embedded())
        queries, last_kv = self.inputs(at, before)
        return {
            "first layer's KV": gap(found.kv[0], first_kv),
            "last layer's KV": gap(found.kv[layer], last_kv),
            "queries": gap(found.queries, queries.flatten(1)),
            "MLP": gap(found.mlp, self.mixed(at, after_attention)),
            "head": gap(found.logits, self.logits(found.hidden)),
        }

    def inputs(self, at: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries, [rows, heads, head_dim] and scaled, and what the pool keeps of the rows."""
        shape = self.shape
        normed, scale = self.normed(x, at + "attn_norm")
        q, k, v = (
            self.projected(normed, scale, at, part, heads)
            for part, heads in (("q", shape.num_heads), ("k", shape.num_kv_heads), ("v", shape.num_kv_heads))
        )
        own = self.kept(torch.stack([self.rotated(k), v], dim=1))
        return self.held(self.rotated(q) * shape.head_dim**-0.5), own

    def attended(self, layer: int, queries: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        shape = self.shape
        held = self.pool[layer].double()
        held[self.slots] = own
        found = []
        for row, slots in enumerate(self.key_slots):
            keys, values = held[slots].unbind(1)  # [tokens, KV heads, head_dim]
            by_kv_head = queries[row].view(shape.num_kv_heads, -1, shape.head_dim)
            scores = torch.einsum("hgd,thd->hgt", by_kv_head, keys)
            found.append(torch.einsum("hgt,thd->hgd", scores.softmax(-1), values).reshape(-1))
        return self.held(torch.stack(found))

    def mixed(self, at: str, x: torch.Tensor) -> torch.Tensor:
        normed, scale = self.normed(x, at + "mlp_norm")
        gate = self.held(self.product(normed, at + "gate") * scale)
        up = self.held(self.product(normed, at + "up") * scale)
        return self.held(gate * torch.sigmoid(gate) * up)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        normed, scale = self.normed(x, "final_norm")
        return self.held(self.product(normed, "embed" if self.shape.has_tied_head else "head") * scale)

    def projected(
        self, normed: torch.Tensor, scale: torch.Tensor, at: str, part: str, heads: int
    ) -> torch.Tensor:
        y = self.held(self.product(normed, at + part) * scale)
        if self.shape.has_qkv_bias:
            y = y + self.weights[f"{at}{part}_bias"]
        y = y.view(len(y), heads, self.shape.head_dim)
        if self.shape.has_qk_norm and part != "v":
            rms = (y.square().mean(-1, keepdim=True) + self.shape.rms_norm_eps).sqrt()
            y = y / rms * self.weights[f"{at}{part}_norm"]
        return y

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * self.cos - high * self.sin, high * self.cos + low * self.sin], dim=-1)

    def normed(self, x: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows times the norm's weights, and the scale by which products of them are multiplied."""
        scale = 1 / (x.square().mean(-1, keepdim=True) + self.shape.rms_norm_eps).sqrt()
        return self.held(x * self.weights[name]), self.held(scale)

    def product(self, x: torch.Tensor, name: str) -> torch.Tensor:
        rounded = x.to(torch.bfloat16).double() if self.is_rounded else x
        return rounded @ self.weights[name].T

    def held(self, x: torch.Tensor) -> torch.Tensor:
        """As a buffer between ops has it."""
        return x.float().double() if self.is_rounded else x

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """As the KV pool has it."""
        return x.float().half().double() if self.is_rounded else x
