"""The kernel from pool to wire on a GPU, against RankPool.read on the host."""

import pytest
import torch

from prefill_workers.pool_export import PAIRS, Pair, kernel_name, open_export
from prefill_workers.pool_layout import RankPool, rank_shard
from tests.prefill_workers.test_pool_export import FP8, Case, assert_same

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)


@pytest.mark.parametrize("pair", PAIRS, ids=kernel_name)
def test_the_kernel_writes_what_a_read_does(pair: Pair) -> None:
    """Rank by rank into pinned memory, of which nothing else changes; small shapes and a model's."""
    for seed in range(30):
        case = Case(seed, pair)
        if seed % 3 == 0:
            case.num_heads, case.num_ranks, case.head_dim, case.tokens_per_block = 8, 2, 128, 32
            case.num_blocks, case.block_ids = 40, case.dice.sample(range(40), 33)
            case.first, case.num_tokens = 17, 1003
        memory, _ = case.wire()
        pinned, expected = memory.pin_memory(), memory.clone()
        shape = (2, case.num_tokens, case.num_heads, case.head_dim)
        end = case.offset + 2 * case.num_tokens * case.num_heads * case.head_dim
        wire, expected_wire = (held[case.offset : end].view(shape) for held in (pinned, expected))
        ids = torch.tensor(case.block_ids)
        ids_on_device, stream = ids.cuda(), torch.cuda.Stream()
        layer = case.dice.randrange(case.num_layers)
        for rank in range(case.num_ranks):
            shard = rank_shard(rank, case.num_ranks, case.num_heads)
            if not shard.is_exported:
                continue
            whole, pool = case.pool(shard.heads, is_part=False)
            on_device = RankPool(
                whole.cuda(),
                heads=shard.heads,
                head_dim=case.head_dim,
                tokens_per_block=case.tokens_per_block,
                scales=case.scales if whole.dtype == FP8 else None,
            )
            pool.read(layer, ids, case.first, pool.own_heads(expected_wire))
            torch.cuda.synchronize()
            kernel = open_export(on_device, pair[1])
            own = on_device.own_heads(wire)
            kernel.start(stream.cuda_stream, layer, ids, ids_on_device, case.first, own)
            stream.synchronize()
            assert_same(pinned, expected)
