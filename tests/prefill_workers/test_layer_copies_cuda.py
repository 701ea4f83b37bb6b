"""Copies from a pool on a GPU, beside a forward pass that overwrites it as soon as it may."""

import queue

import pytest
import torch

from cluster.kv_layout import KvLayout
from prefill_workers.export_pieces import Piece
from prefill_workers.layer_copies import LayerCopies, piece_offset
from prefill_workers.pool_export import open_export
from prefill_workers.pool_layout import HeadRange, RankPool, wire_dtype
from prefill_workers.rank_channel import Export, LayerReady, Released
from prefill_workers.staging import StagingArena, open_staging, pin_staging, unpin_staging

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

BLOCK, HEADS, HEAD_DIM, LAYERS, NUM_BLOCKS = 32, 4, 64, 6, 64
NUM_STEPS, TOKENS = 30, 700
LATE_CYCLES = 200_000
"""Of the forward pass: its hooks are called long before its values are there."""


@pytest.mark.parametrize("has_kernel", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_is_copied_is_what_was_there_before_the_fence(dtype, num_ranks, has_kernel) -> None:
    layout = KvLayout(
        model_fingerprint="",
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        block_size_tokens=BLOCK,
    )
    arena = StagingArena(NUM_STEPS * TOKENS * layout.bytes_per_token)
    staging = open_staging(arena.path)
    pin_staging(staging)
    heads = HEADS // num_ranks
    shape = (NUM_BLOCKS, LAYERS, 2, heads * BLOCK * HEAD_DIM)
    tensors = [torch.zeros(shape, dtype=wire_dtype(dtype), device="cuda") for _ in range(num_ranks)]
    told: queue.SimpleQueue = queue.SimpleQueue()
    exports: dict[int, Export] = {}
    copies = []
    for rank, tensor in enumerate(tensors):
        own = HeadRange(rank * heads, (rank + 1) * heads)
        pool = RankPool(tensor, heads=own, head_dim=HEAD_DIM, tokens_per_block=BLOCK)
        kernel = open_export(pool, dtype) if has_kernel else None
        copier = LayerCopies(pool, staging, layout, rank, exports.get, told.put, export_kernel=kernel)
        copies.append((pool, copier))
    forward = torch.cuda.Stream()
    expected = []
    for number in range(NUM_STEPS):
        block_ids = torch.randperm(NUM_BLOCKS)[: -(-TOKENS // BLOCK)]
        exports[number] = Export(
            number=number,
            first_token=0,
            end_token=TOKENS,
            offset=number * TOKENS * layout.bytes_per_token,
            lease_s=60,
        )
        piece = Piece(
            number=number,
            request_id=number,
            first_token=0,
            end_token=TOKENS,
            block_ids=tuple(block_ids.tolist()),
        )
        wire = torch.randn(LAYERS, 2, TOKENS, HEADS, HEAD_DIM).to(wire_dtype(dtype))
        expected.append(wire)
        on_gpu, ids = wire.cuda(), block_ids.cuda()
        torch.cuda.synchronize() if number == 0 else forward.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(forward), torch.inference_mode():
            for _, copier in copies:
                copier.fence(forward)
            for tensor in tensors:
                tensor.fill_(torch.nan)
            for layer in range(LAYERS):
                torch.cuda._sleep(LATE_CYCLES)
                for pool, copier in copies:
                    pool.write(layer, ids, 0, pool.own_heads(on_gpu[layer]))
                    copier.enqueue(piece, layer, forward)
    num_ready = 0
    while num_ready < NUM_STEPS * LAYERS * num_ranks:
        message = told.get(timeout=30)
        assert isinstance(message, LayerReady), message
        num_ready += 1
    for number, wire in enumerate(expected):
        for layer in range(LAYERS):
            start = exports[number].offset + piece_offset(layout, 0, 0, TOKENS, layer)
            there = staging[start : start + TOKENS * layout.bytes_per_token_layer].view(wire.dtype)
            assert torch.equal(there.view(wire[layer].shape), wire[layer])
    for _, copier in copies:
        for number in range(NUM_STEPS):
            copier.settle(number)
        copier.close()
    assert all(isinstance(told.get(timeout=1), Released) for _ in range(NUM_STEPS * num_ranks))
    unpin_staging(staging)
    arena.close()
