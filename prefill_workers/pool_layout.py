"""KV from TensorRT-LLM's pool to the wire, and back: which heads a rank has, where a token's values are.

A rank's pool is `[blocks, layers, 2, heads * tokens * head_dim]`: inside one block's K or V of one layer, a
head's tokens are contiguous (HND). On the wire a layer of a run of tokens is `[2, tokens, all heads,
head_dim]` (`KvLayout`), so ranks write side by side: each its own heads, of all tokens.
"""

from typing import Literal

import msgspec
import torch

from cluster.kv_layout import KvDtype, KvLayout

PoolDtype = Literal["float16", "bfloat16", "float32", "float8_e4m3fn"]

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


class PoolLayoutError(ValueError):
    """A pool that is not laid out as it was said to be. Handled where the connector registers it."""


Places = tuple[torch.Tensor, torch.Tensor]
"""[tokens] each: block, and place in it."""


class HeadRange(msgspec.Struct, frozen=True):
    """KV heads [start, end) of the model."""

    start: int
    end: int

    @property
    def count(self) -> int:
        return self.end - self.start


class RankShard(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank of a tensor-parallel group holds, and exports."""

    heads: HeadRange
    is_exported: bool
    """False: another rank exports the same heads."""


def rank_shard(rank: int, num_ranks: int, num_kv_heads: int) -> RankShard:
    """Heads are dealt out evenly; with more ranks than heads, neighbours hold copies of one.

    Raises PoolLayoutError where neither divides the other: TensorRT-LLM serves no such model.
    """
    if num_ranks < 1 or not 0 <= rank < num_ranks:
        raise PoolLayoutError(f"rank {rank} of {num_ranks}: ranks count from 0")
    if num_kv_heads % num_ranks == 0:
        count = num_kv_heads // num_ranks
        return RankShard(heads=HeadRange(rank * count, (rank + 1) * count), is_exported=True)
    if num_ranks % num_kv_heads == 0:
        copies = num_ranks // num_kv_heads
        head = rank // copies
        return RankShard(heads=HeadRange(head, head + 1), is_exported=rank % copies == 0)
    raise PoolLayoutError(
        f"{num_kv_heads} KV heads over {num_ranks} ranks: one must be a multiple of the other"
    )


class KvScales(msgspec.Struct, frozen=True):
    """What an 8-bit value times gives K, or V. TensorRT-LLM's are 1: `kv_scales.py`."""

    key: float = 1.0
    value: float = 1.0


class RankPool:
    """One rank's pool, read and written by runs of a sequence's tokens."""

    def __init__(
        self,
        pool: torch.Tensor,
        *,
        heads: HeadRange,
        head_dim: int,
        tokens_per_block: int,
        scales: KvScales | None = None,
    ) -> None:
        """`pool`: `[blocks, layers, 2, heads * tokens_per_block * head_dim]`, of a PoolDtype.

        `scales` are of an 8-bit pool, 1 without. Raises PoolLayoutError.
        """
        expected = heads.count * tokens_per_block * head_dim
        if pool.dim() != 4 or pool.shape[2] != 2 or pool.shape[3] != expected:
            raise PoolLayoutError(
                f"the KV pool has shape {list(pool.shape)}, expected [blocks, layers, 2, {expected}]: "
                f"{heads.count} heads x {tokens_per_block} tokens x {head_dim}"
            )
        if pool.dtype not in TORCH_DTYPES.values():
            raise PoolLayoutError(f"the KV pool is {pool.dtype}, known are {', '.join(TORCH_DTYPES)}")
        if scales is not None and pool.dtype != torch.float8_e4m3fn:
            raise PoolLayoutError(f"scales are for a pool of float8_e4m3fn, not {pool.dtype}")
        self.heads = heads
        self.tokens_per_block = tokens_per_block
        self._scales = scales or KvScales()
        self._is_8_bit = pool.dtype == torch.float8_e4m3fn
        blocks = pool.view(*pool.shape[:3], heads.count, tokens_per_block, head_dim)
        # [layers, 2, blocks, tokens, heads, head_dim]: a token's place is the two indices in the middle.
        self._by_token = blocks.permute(1, 2, 0, 4, 3, 5)

    @property
    def device(self) -> torch.device:
        return self._by_token.device

    @property
    def num_layers(self) -> int:
        return int(self._by_token.shape[0])

    @property
    def num_blocks(self) -> int:
        return int(self._by_token.shape[2])

    @property
    def dtype(self) -> torch.dtype:
        return self._by_token.dtype

    @property
    def scales(self) -> tuple[float, float]:
        """Factors of K and of V."""
        return self._scales.key, self._scales.value

    def layer(self, layer: int) -> torch.Tensor:
        """`[2, blocks, tokens_per_block, heads, head_dim]`, a view."""
        return self._by_token[layer]

    def own_heads(self, wire: torch.Tensor) -> torch.Tensor:
        """This rank's part of layers on the wire, `[..., 2, tokens, heads of the model, head_dim]`."""
        return wire[..., self.heads.start : self.heads.end, :]

    def read(self, layer: int, block_ids: torch.Tensor, first_token: int, own: torch.Tensor) -> None:
        """KV of tokens [first_token, first_token + tokens) of the sequence whose blocks are `block_ids`.

        Into `own`: `[2, tokens, heads, head_dim]`, which may be part of a layer on the wire: from a pool of
        the same type it is one copy, a gather whose destination is strided. On the current stream.
        """
        places = self.places(block_ids, first_token, own.shape[1])
        self.read_at(range(layer, layer + 1), places, own.unsqueeze(0))

    def read_at(self, layers: range, places: Places, own: torch.Tensor) -> None:
        """The same of several layers, and tokens whose places are known: they are those of every layer.

        Into `[layers, 2, tokens, heads, head_dim]`, in one gather.
        """
        source = self._by_token[layers.start : layers.stop]
        if source.dtype == own.dtype:
            torch.ops.aten.index.Tensor_out(source, [None, None, *places], out=own)
            return
        values = source[:, :, places[0], places[1]]
        if not self._is_8_bit:
            own.copy_(values)
            return
        for part, scale in enumerate(self.scales):
            own[:, part].copy_(values[:, part].float() * scale)

    def write(self, layer: int, block_ids: torch.Tensor, first_token: int, own: torch.Tensor) -> None:
        """The same the other way."""
        block, offset = self.places(block_ids, first_token, own.shape[1])
        for part in range(2):
            values = own[part]
            if self._is_8_bit:
                values = values.float() / self.scales[part]
            self._by_token[layer, part].index_put_((block, offset), values.to(self._by_token.dtype))

    def places(self, block_ids: torch.Tensor, first_token: int, num_tokens: int) -> Places:
        """Of tokens [first_token, first_token + num_tokens) in `block_ids`. Raises PoolLayoutError."""
        self.check_run(len(block_ids), first_token, num_tokens)
        tokens = torch.arange(first_token, first_token + num_tokens, device=block_ids.device)
        return block_ids[tokens // self.tokens_per_block], tokens % self.tokens_per_block

    def check_run(self, num_blocks: int, first_token: int, num_tokens: int) -> None:
        """Of a sequence with so many blocks. Raises PoolLayoutError."""
        if first_token < 0 or first_token + num_tokens > num_blocks * self.tokens_per_block:
            raise PoolLayoutError(
                f"tokens [{first_token}, {first_token + num_tokens}) are outside {num_blocks} blocks of "
                f"{self.tokens_per_block}"
            )


def new_wire(layout: KvLayout, num_tokens: int, memory: memoryview | None = None) -> torch.Tensor:
    """`[2, tokens, heads, head_dim]` in memory of its own, or in `memory`, as long as that is."""
    shape = (2, num_tokens, layout.num_kv_heads, layout.head_dim)
    dtype = wire_dtype(layout.dtype)
    if memory is None:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def wire_dtype(dtype: KvDtype) -> torch.dtype:
    return TORCH_DTYPES[dtype]
