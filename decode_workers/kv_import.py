"""Puts a hand-off's KV into the pool: token positions to slots, through the block table."""

from collections.abc import Callable, Sequence

import numpy as np

from cluster.transfer import HandoffError, KvChunk
from decode_workers.executor import StepExecutor
from decode_workers.step_batch import Int32Array


def slots_of_blocks(block_table: Sequence[int], block_size_tokens: int) -> Int32Array:
    """[len(block_table) * block_size_tokens] the slot of each token position, in order."""
    blocks = np.asarray(block_table, dtype=np.int32)
    offsets = np.arange(block_size_tokens, dtype=np.int32)
    return (blocks[:, None] * np.int32(block_size_tokens) + offsets).reshape(-1)


class PoolSink:
    """`HandoffSink` over blocks that one sequence reserved.

    `write` and `on_commit` run on the hand-off server's event loop, `on_abort` there or on the receiver's
    watchdog thread: a callback only posts to the engine. The blocks must not be reused until one of the
    two was called, or `HandoffReceiver.cancel` returned.
    """

    def __init__(
        self,
        executor: StepExecutor,
        block_table: Sequence[int],
        block_size_tokens: int,
        on_commit: Callable[[int], None],
        on_abort: Callable[[HandoffError], None],
    ) -> None:
        """`block_table` covers the sequence from token 0 to the hand-off's last; copied, so it may grow."""
        self._executor = executor
        self._slots = slots_of_blocks(block_table, block_size_tokens)
        self._on_commit = on_commit
        self._on_abort = on_abort

    def write(self, chunk: KvChunk) -> None:
        """Raises HandoffError where the chunk lies outside the block table."""
        end = chunk.first_token + chunk.num_tokens
        if end > len(self._slots):
            raise HandoffError(
                "size_mismatch", f"tokens up to {end} into blocks for {len(self._slots)} tokens"
            )
        self._executor.write_kv(chunk.layer, self._slots[chunk.first_token : end], chunk.data)

    def commit(self, valid_tokens: int) -> None:
        self._on_commit(valid_tokens)

    def abort(self, error: HandoffError) -> None:
        self._on_abort(error)
