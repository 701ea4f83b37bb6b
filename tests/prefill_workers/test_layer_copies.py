"""Copies on the host: layer by layer, whole, and in parts are the same bytes, and nothing is left behind."""

import itertools
import queue
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.kv_layout import KvLayout
from prefill_workers import piece_copier
from prefill_workers.export_pieces import Piece
from prefill_workers.layer_copies import LayerCopies
from prefill_workers.piece_copier import HostEvent, PieceCopier, piece_offset
from prefill_workers.pool_layout import TORCH_DTYPES, RankPool, rank_shard
from prefill_workers.rank_channel import Export, LayersReady, Released


class Stream:
    """One whose work is done."""

    def record_event(self) -> HostEvent:
        event = HostEvent()
        event.happen()
        return event

    def wait_event(self, event: HostEvent) -> None:
        event.synchronize()


class Case:
    """Random pieces of an export over the pools of some ranks."""

    def __init__(self, dice: random.Random, pool_dtype: str) -> None:
        self.layout = KvLayout(
            model_fingerprint="",
            num_layers=dice.randint(1, 5),
            num_kv_heads=dice.choice([1, 2, 4]),
            head_dim=dice.choice([2, 8]),
            dtype=dice.choice(["float16", "float32"]),
            block_size_tokens=dice.choice([1, 4, 16]),
        )
        layout, size = self.layout, self.layout.block_size_tokens
        first, end = sorted(dice.sample(range(60), 2))
        bounds = sorted({first, end, *(dice.randint(first, end) for _ in range(dice.randint(0, 3)))})
        num_blocks = 70
        blocks = tuple(dice.sample(range(num_blocks), -(-end // size)))
        self.pieces = [
            Piece(number=5, request_id=1, first_token=start, end_token=stop, block_ids=blocks)
            for start, stop in itertools.pairwise(bounds)
        ]
        self.export = Export(number=5, first_token=first, end_token=end, offset=4096, lease_s=60)
        self.num_bytes = (end - first) * layout.bytes_per_token
        num_ranks = dice.choice([n for n in (1, 2, 4) if layout.num_kv_heads % n == 0])
        self.pools = []
        values = torch.Generator().manual_seed(dice.getrandbits(31))
        for rank in range(num_ranks):
            heads = rank_shard(rank, num_ranks, layout.num_kv_heads).heads
            shape = (num_blocks, layout.num_layers, 2, heads.count * size * layout.head_dim)
            tensor = torch.randn(shape, generator=values).to(TORCH_DTYPES[pool_dtype])
            self.pools.append(RankPool(tensor, heads=heads, head_dim=layout.head_dim, tokens_per_block=size))
        self.blocks = blocks

    def copied(self, is_whole: list[bool]) -> tuple[torch.Tensor, list[LayersReady]]:
        """What the staging memory then is, each rank copying one way or the other; and what was told."""
        staging = torch.zeros(4096 + self.num_bytes + 4096, dtype=torch.uint8)
        told: queue.SimpleQueue = queue.SimpleQueue()
        for rank, pool in enumerate(self.pools):
            copier = PieceCopier(pool, staging, self.layout)
            copies = LayerCopies(copier, rank, {5: self.export}.get, told.put)
            stream = Stream()
            for piece in self.pieces:
                copies.fence(stream)
                layers = range(self.layout.num_layers)
                if is_whole[rank]:
                    copies.enqueue(piece, layers, stream)
                else:
                    for layer in layers:
                        copies.enqueue(piece, layers[layer : layer + 1], stream)
            copies.fence(stream)
            copies.close()
            copies.settle(5)
        messages = [told.get_nowait() for _ in range(told.qsize())]
        assert sum(isinstance(message, Released) for message in messages) == len(self.pools)
        return staging, [message for message in messages if isinstance(message, LayersReady)]

    def expected(self) -> torch.Tensor:
        """A layer of a piece at a time."""
        staging = torch.zeros(4096 + self.num_bytes + 4096, dtype=torch.uint8)
        layout = self.layout
        for piece in self.pieces:
            count = piece.end_token - piece.first_token
            for layer in range(layout.num_layers):
                start = 4096 + piece_offset(layout, self.export.first_token, piece.first_token, count, layer)
                wire = staging[start : start + count * layout.bytes_per_token_layer]
                wire = wire.view(TORCH_DTYPES[layout.dtype])
                wire = wire.view(2, count, layout.num_kv_heads, layout.head_dim)
                for pool in self.pools:
                    pool.read(layer, torch.tensor(self.blocks), piece.first_token, pool.own_heads(wire))
        return staging


@pytest.mark.parametrize("pool_dtype", ["float16", "float32", "float8_e4m3fn"])
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**63), most_bytes=st.sampled_from([1, 1000, 1 << 20]))
def test_both_ways_give_the_same_bytes(pool_dtype: str, seed: int, most_bytes: int) -> None:
    dice = random.Random(seed)
    case = Case(dice, pool_dtype)
    expected, num_ranks = case.expected(), len(case.pools)
    mixed = [dice.random() < 0.5 for _ in range(num_ranks)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(piece_copier, "_MOST_GATHERED_BYTES", most_bytes)
        for is_whole in ([False] * num_ranks, [True] * num_ranks, mixed):
            staging, told = case.copied(is_whole)
            assert torch.equal(staging, expected)
            layers = {
                (message.rank, message.first_token, layer)
                for message in told
                for layer in range(message.first_layer, message.end_layer)
            }
            assert len(layers) == num_ranks * len(case.pieces) * case.layout.num_layers
            assert sum(message.end_layer - message.first_layer for message in told) == len(layers)
            if most_bytes == 1 << 20 and all(is_whole):
                assert len(told) == num_ranks * len(case.pieces), "a piece is one copy"
