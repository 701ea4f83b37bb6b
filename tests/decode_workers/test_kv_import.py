import numpy as np
import pytest

from cluster.kv_layout import KvLayout
from cluster.transfer import HandoffError, KvChunk
from decode_workers.kv_import import PoolSink, slots_of_blocks
from decode_workers.noop_executor import NoopExecutor
from decode_workers.step_batch import Int32Array

LAYOUT = KvLayout(
    model_fingerprint="test", num_layers=2, num_kv_heads=1, head_dim=2, dtype="float32", block_size_tokens=4
)


class SlotMemory(NoopExecutor):
    """Keeps what is written, by layer and slot."""

    def __init__(self) -> None:
        super().__init__(LAYOUT, num_blocks=8, vocab_size=4, token_id=1)
        self.keys = np.zeros((LAYOUT.num_layers, 8 * 4, 2), dtype=np.float32)

    def write_kv(self, layer: int, slots: Int32Array, data: memoryview) -> None:
        kv = np.frombuffer(data, dtype=np.float32).reshape(2, len(slots), 2)
        self.keys[layer, slots] = kv[0]


def sink_of(memory: SlotMemory, table: list[int], heard: list[object]) -> PoolSink:
    return PoolSink(memory, table, LAYOUT.block_size_tokens, heard.append, heard.append)


def chunk(layer: int, first: int, count: int) -> KvChunk:
    k = np.repeat(np.arange(first, first + count, dtype=np.float32) + 100 * layer, 2)
    return KvChunk(layer, first, count, memoryview(np.concatenate([k, -k])).cast("B"))


def test_slots_follow_the_block_table() -> None:
    assert slots_of_blocks([5, 0], 4).tolist() == [20, 21, 22, 23, 0, 1, 2, 3]


def test_tokens_land_in_the_slots_of_their_positions_and_nowhere_else() -> None:
    memory, heard = SlotMemory(), list[object]()
    sink = sink_of(memory, [6, 2, 3], heard)
    for layer in range(2):
        sink.write(chunk(layer, 3, 6))
    expected = np.zeros_like(memory.keys)
    for layer in range(2):
        for position, slot in {3: 27, 4: 8, 5: 9, 6: 10, 7: 11, 8: 12}.items():
            expected[layer, slot] = position + 100 * layer
    np.testing.assert_array_equal(memory.keys, expected)
    sink.commit(6)
    assert heard == [6]


def test_the_block_table_is_copied() -> None:
    memory, table = SlotMemory(), [6]
    sink = sink_of(memory, table, [])
    table[0] = 1
    sink.write(chunk(0, 1, 1))
    assert memory.keys[0, 25, 0] == 1


def test_tokens_past_the_table_are_refused_and_write_nothing() -> None:
    memory, heard = SlotMemory(), list[object]()
    sink = sink_of(memory, [6], heard)
    with pytest.raises(HandoffError, match="blocks for 4 tokens"):
        sink.write(chunk(0, 3, 2))
    assert not memory.keys.any()
    error = HandoffError("timeout", "said the test")
    sink.abort(error)
    assert heard == [error]
