"""What the kernels are measured against on a GPU: a plain decoder in PyTorch, of the same shape.

Projections of one input are one matrix, attention is `scaled_dot_product_attention` over a static KV cache
that is just as long as the context, and a step ends with its best tokens, as ours does. Weights are random.

- `eager`: as PyTorch runs it, op by op.
- `compiled`: each layer through torch.compile, the whole step in a CUDA graph. Layers share one compilation,
  which takes seconds; compiling the whole step, as `reduce_overhead` does, takes minutes for all cells.
- `reduce_overhead`: torch.compile(mode="reduce-overhead") of the whole step, which makes a CUDA graph too.
- `int4`: as `compiled`, with int4 weights in groups of 128 (torch._weight_int4pack_mm), where this torch has
  that.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it

from megakernel.model.rope import rope_frequencies
from megakernel.model.shape import ModelShape

Kind = Literal["eager", "compiled", "reduce_overhead", "int4"]
INT4_GROUP = 128
_INNER_K_TILES = 8
_WARM_UPS = 3

Tensor = torch.Tensor
Matrix = tuple[Tensor, ...]
"""(dense,), or (packed int4, scales and zeros)."""
LayerWeights = tuple[Tensor, Matrix, Tensor, Tensor, Tensor, Matrix, Tensor, Matrix, Matrix]
"""Norm, QKV, its bias, Q norm, K norm, O, norm, gate and up, down; empty where the model has none."""


class Heads(NamedTuple):
    """A tuple, which torch.compile sees through."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    has_qkv_bias: bool
    has_qk_norm: bool


class PeerWeights:
    """Random, in bfloat16 or int4, on `device`."""

    def __init__(self, shape: ModelShape, device: str = "cuda", *, is_int4: bool = False) -> None:
        self.shape = shape
        self._draw = torch.Generator(device).manual_seed(0)
        self._device, self._is_int4 = device, is_int4
        q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        hidden, inner = shape.hidden_size, shape.intermediate_size
        self.embed = self._dense(shape.vocab_size, hidden)
        self.layers: list[LayerWeights] = [
            (
                self._ones(hidden),
                self._matrix(q + 2 * kv, hidden),
                self._ones(q + 2 * kv if shape.has_qkv_bias else 0),
                self._ones(shape.head_dim if shape.has_qk_norm else 0),
                self._ones(shape.head_dim if shape.has_qk_norm else 0),
                self._matrix(hidden, q),
                self._ones(hidden),
                self._matrix(2 * inner, hidden),
                self._matrix(hidden, inner),
            )
            for _ in range(shape.num_layers)
        ]
        self.norm = self._ones(hidden)
        is_tied = shape.has_tied_head and not is_int4
        self.head: Matrix = (self.embed,) if is_tied else self._matrix(shape.vocab_size, hidden)

    def _dense(self, rows: int, columns: int) -> Tensor:
        values = torch.empty((rows, columns), dtype=torch.bfloat16, device=self._device)
        return values.normal_(0.0, columns**-0.5, generator=self._draw)

    def _ones(self, size: int) -> Tensor:
        return torch.ones(size, dtype=torch.bfloat16, device=self._device)

    def _matrix(self, rows: int, columns: int) -> Matrix:
        if not self._is_int4:
            return (self._dense(rows, columns),)
        numbers = torch.empty((rows, columns // 2), dtype=torch.uint8, device=self._device)
        numbers.random_(0, 256, generator=self._draw)
        packed = torch._convert_weight_to_int4pack(numbers, _INNER_K_TILES)
        scales = torch.zeros((columns // INT4_GROUP, rows, 2), dtype=torch.bfloat16, device=self._device)
        scales[:, :, 0] = 1.7 / 8 * columns**-0.5
        return packed, scales


def multiply(x: Tensor, matrix: Matrix) -> Tensor:
    if len(matrix) == 1:
        return F.linear(x, matrix[0])
    return torch._weight_int4pack_mm(x, matrix[0], INT4_GROUP, matrix[1])


def decode_layer(
    x: Tensor,
    weights: LayerWeights,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: Heads,
) -> Tensor:
    """`x` [batch, hidden]; `keys` and `values` [batch, KV heads, tokens, head_dim] get the step's own at
    `slot`, the last, and all of them are attended to."""
    norm, qkv, bias, q_norm, k_norm, output, mlp_norm, gate_up, down = weights
    batch, dim = x.shape[0], heads.head_dim
    projected = multiply(F.rms_norm(x, (x.shape[-1],), norm, heads.eps), qkv)
    if heads.has_qkv_bias:
        projected = projected + bias
    sizes = [heads.num_heads * dim, heads.num_kv_heads * dim, heads.num_kv_heads * dim]
    q, k, v = (part.view(batch, -1, dim) for part in projected.split(sizes, dim=-1))
    if heads.has_qk_norm:
        q, k = F.rms_norm(q, (dim,), q_norm, heads.eps), F.rms_norm(k, (dim,), k_norm, heads.eps)
    q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
    keys.index_copy_(2, slot, k.unsqueeze(2))
    values.index_copy_(2, slot, v.unsqueeze(2))
    attended = F.scaled_dot_product_attention(
        q.unsqueeze(2), keys, values, enable_gqa=heads.num_heads != heads.num_kv_heads
    )
    x = x + multiply(attended.reshape(batch, -1), output)
    gate, up = multiply(F.rms_norm(x, (x.shape[-1],), mlp_norm, heads.eps), gate_up).chunk(2, dim=-1)
    return x + multiply(F.silu(gate) * up, down)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[batch, heads, head_dim]: dimension i turns with i + head_dim / 2."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


class Peer:
    """One engine at one batch and context: `step` runs a decode step of it, asynchronously."""

    def __init__(self, kind: Kind, weights: PeerWeights, batch: int, context: int) -> None:
        """Compiles where `kind` says so; raises what torch raises where it cannot."""
        self.kind = kind
        self.weights = weights
        shape, device = weights.shape, weights.embed.device
        self.heads = Heads(
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            eps=shape.rms_norm_eps,
            has_qkv_bias=shape.has_qkv_bias,
            has_qk_norm=shape.has_qk_norm,
        )
        size = (batch, shape.num_kv_heads, context + 1, shape.head_dim)
        draw = torch.Generator(device).manual_seed(1)
        self.cache = [
            tuple(
                torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0.0, 0.5, generator=draw)
                for _ in range(2)
            )
            for _ in range(shape.num_layers)
        ]
        self.tokens = torch.randint(0, shape.vocab_size, (batch,), generator=draw, device=device)
        self.slot = torch.tensor([context], device=device)
        angles = torch.from_numpy(context * rope_frequencies(shape))
        self.cos, self.sin = (turned.to(torch.bfloat16).to(device) for turned in (angles.cos(), angles.sin()))
        self.layer: Callable[..., Tensor] = decode_layer
        self.best = torch.zeros((batch,), dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._whole: Callable[[], Tensor] = self._forward
        if kind in ("compiled", "int4"):
            self.layer = torch.compile(decode_layer, dynamic=False, fullgraph=True)
        if kind == "reduce_overhead":
            self._mark_static()
            self._whole = torch.compile(self._forward, mode="reduce-overhead", dynamic=False, fullgraph=True)
        with torch.inference_mode():
            self._warm_up()

    @torch.inference_mode()
    def step(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self.best = self._whole()

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """[batch, vocab] of one more step, run op by op or compiled as the peer is."""
        return self._logits()

    def _forward(self) -> Tensor:
        return self._logits().argmax(dim=-1)

    def _logits(self) -> Tensor:
        x = F.embedding(self.tokens, self.weights.embed)
        for weights, (keys, values) in zip(self.weights.layers, self.cache, strict=True):
            x = self.layer(x, weights, keys, values, self.slot, self.cos, self.sin, self.heads)
        x = F.rms_norm(x, (x.shape[-1],), self.weights.norm, self.heads.eps)
        return multiply(x, self.weights.head)

    def _mark_static(self) -> None:
        """Without it torch leaves CUDA graphs out: the cache is changed in place."""
        from torch._dynamo import mark_static_address

        for pair in self.cache:
            for tensor in pair:
                mark_static_address(tensor)

    def _warm_up(self) -> None:
        for _ in range(_WARM_UPS):
            self.best = self._whole()
        if self.weights.embed.device.type != "cuda":
            return
        torch.cuda.synchronize()
        if self.kind in ("compiled", "int4"):
            self._graph = self._captured()

    def _captured(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._forward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.best = self._forward()
        torch.cuda.synchronize()
        return graph


def allow_recompiling() -> None:
    """A layer is compiled anew for every batch and context; torch stops at 8 otherwise."""
    import torch._dynamo as dynamo

    for name in (
        "recompile_limit",
        "cache_size_limit",
        "accumulated_recompile_limit",
        "accumulated_cache_size_limit",
    ):
        if hasattr(dynamo.config, name):
            setattr(dynamo.config, name, 512)
