"""Copies from a pool on a GPU, beside a forward pass that overwrites it as soon as it may."""

import queue

import pytest
import torch

from cluster.kv_layout import KvLayout
from prefill_workers.export_pieces import Piece
from prefill_workers.layer_copies import LayerCopies
from prefill_workers.piece_copier import PieceCopier, piece_offset
from prefill_workers.pool_export import open_export
from prefill_workers.pool_layout import HeadRange, RankPool, wire_dtype
from prefill_workers.rank_channel import Export, LayersReady, Released
from prefill_workers.staging import StagingArena, open_staging, pin_staging, unpin_staging

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

BLOCK, HEADS, HEAD_DIM, LAYERS, NUM_BLOCKS = 32, 4, 64, 6, 64
NUM_STEPS, TOKENS = 30, 700
LATE_CYCLES = 200_000
"""Of the forward pass: its hooks are called long before its values are there."""


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("has_kernel", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_is_copied_is_what_was_there_before_the_fence(dtype, num_ranks, has_kernel, is_whole) -> None:
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
        copier = PieceCopier(pool, staging, layout, export_kernel=kernel)
        copies.append((pool, LayerCopies(copier, rank, exports.get, told.put)))
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
                    if not is_whole:
                        copier.enqueue(piece, range(layer, layer + 1), forward)
            if is_whole:
                for _, copier in copies:
                    copier.enqueue(piece, range(LAYERS), forward)
    num_told, num_ready = 0, 0
    while num_ready < NUM_STEPS * LAYERS * num_ranks:
        message = told.get(timeout=30)
        assert isinstance(message, LayersReady), message
        num_ready += message.end_layer - message.first_layer
        num_told += 1
    assert num_told == NUM_STEPS * num_ranks * (1 if is_whole else LAYERS)
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


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_what_a_copy_costs_is_measured_and_harms_nothing(num_ranks) -> None:
    """Llama 3.1 8B's heads: some tens of us to start, more than a PCIe bus could carry takes none."""
    layout = KvLayout(
        model_fingerprint="",
        num_layers=LAYERS,
        num_kv_heads=8,
        head_dim=128,
        dtype="float16",
        block_size_tokens=BLOCK,
    )
    arena = StagingArena(4096 * layout.bytes_per_token_layer)
    staging = open_staging(arena.path)
    pin_staging(staging)
    heads = 8 // num_ranks
    tensor = torch.randn(NUM_BLOCKS, LAYERS, 2, heads * BLOCK * 128, device="cuda").half()
    before = tensor.clone()
    pool = RankPool(tensor, heads=HeadRange(0, heads), head_dim=128, tokens_per_block=BLOCK)
    costs = PieceCopier(pool, staging, layout).measure()
    print(f"{num_ranks} ranks: {costs}, layerwise from {costs.layerwise_tokens(32)} tokens on")
    assert torch.equal(tensor, before)
    assert 1 < costs.start_us < 1000
    least_us = layout.bytes_per_token_layer / num_ranks / 200e3
    assert least_us < costs.token_us < 100 * least_us
    unpin_staging(staging)
    arena.close()
