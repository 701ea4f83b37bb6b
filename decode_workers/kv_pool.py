"""The decode worker's KV: blocks by reservation, and the block tables that a step reads.

Who may touch which slots of a sequence, by token position:

| range                              | owner         | may be                                            |
|------------------------------------|---------------|---------------------------------------------------|
| [0, cached full blocks)            | prefix cache  | read                                              |
| [cached full blocks, committed)    | this sequence | read; published, so read by others too            |
| [committed, capacity)              | this sequence | written: rows of a step, or a hand-off's sink     |
| [committed, capacity) in a run     | the run       | written by steps that the host has not heard of   |

`reserve` takes blocks for all tokens a sequence can ever have: nothing is preempted mid-stream, and
a step never runs out. `release` gives them back; what was published stays as prefix cache.

Between `begin_run` and `end_run` a run of several steps writes to its sequences' slots, also to those of
one that has ended meanwhile. What is released in between is given back by `end_run`, in the same order, and
nothing is reserved or moved.
"""

import threading
from collections.abc import Sequence

import numpy as np
from prometheus_client import Gauge

from cluster.block_changes import BlockChanges
from cluster.block_pool import BlockPool, OutOfBlocksError, PrefixMatch
from cluster.ids import ChainHash
from cluster.messages import Record
from decode_workers.executor import StepExecutor
from decode_workers.step_batch import Int32Array

NO_BLOCK = -1
MAX_SEARCH_SLOTS = 64 * 65
"""64 beams of 65 tokens: what a request may want behind its prompt, beyond what it has positions for."""


class Reservation(Record, frozen=True, kw_only=True):
    """Blocks held for one sequence; given back exactly once."""

    table_index: int
    """Row of `KvPool.block_tables`."""
    block_ids: tuple[int, ...]
    cached_tokens: int
    """KV of tokens [0, cached_tokens) is there already."""
    capacity_tokens: int


class KvPool:
    """Driven by the engine's thread; `drain_changes`, `all_hashes` and the counts from any thread."""

    def __init__(
        self, executor: StepExecutor, max_sequences: int, max_context_tokens: int, used_tokens: Gauge
    ) -> None:
        self._executor = executor
        self.block_size_tokens = executor.layout.block_size_tokens
        self._blocks = BlockPool(executor.num_blocks, self.block_size_tokens)
        self._lock = threading.Lock()
        self._used_tokens = used_tokens
        # A search has more slots than its sequence has positions.
        max_blocks = min(executor.num_blocks, self.num_blocks_for(max_context_tokens + MAX_SEARCH_SLOTS))
        self.block_tables: Int32Array = np.full((max_sequences, max_blocks), NO_BLOCK, dtype=np.int32)
        """[sequences, blocks] by `Reservation.table_index`; entries past the last block are NO_BLOCK."""
        self._free_tables = list(range(max_sequences - 1, -1, -1))
        self._is_in_run = False
        self._released_in_run: list[Reservation] = []

    @property
    def total_tokens(self) -> int:
        return self._blocks.num_blocks * self.block_size_tokens

    @property
    def free_tokens(self) -> int:
        return self._blocks.num_free_blocks * self.block_size_tokens

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size_tokens)

    def reserve(self, token_ids: Sequence[int], salt: ChainHash, num_tokens: int) -> Reservation:
        """Blocks for `num_tokens`, the cached prefix of the known `token_ids` in place.

        At most all but the last known token count as cached: that one must run, to give logits.
        Raises OutOfBlocksError, having changed nothing.
        """
        assert not self._is_in_run, "a cached tail cannot be copied beside a run"
        num_blocks = self.num_blocks_for(num_tokens)
        with self._lock:
            match = self._blocks.match_prefix(token_ids, salt, len(token_ids) - 1)
            match, own_blocks = self._allocate_after(match, num_blocks - len(match.block_ids))
        if match.tail_block is not None:
            self._copy_tail(match.tail_block, own_blocks[0], match.tail_tokens)
        block_ids = (*match.block_ids, *own_blocks)
        table_index = self._free_tables.pop()
        self.block_tables[table_index, : len(block_ids)] = block_ids
        self._tell_used()
        return Reservation(
            table_index=table_index,
            block_ids=block_ids,
            cached_tokens=match.num_tokens + match.tail_tokens,
            capacity_tokens=len(block_ids) * self.block_size_tokens,
        )

    def publish(self, reservation: Reservation, token_ids: Sequence[int], salt: ChainHash) -> None:
        """Offer the KV of these committed tokens to later sequences."""
        with self._lock:
            self._blocks.publish(token_ids, reservation.block_ids, salt)

    def release(self, reservation: Reservation) -> None:
        if self._is_in_run:
            self._released_in_run.append(reservation)
            return
        with self._lock:
            self._blocks.release(reservation.block_ids)
        self.block_tables[reservation.table_index, : len(reservation.block_ids)] = NO_BLOCK
        self._free_tables.append(reservation.table_index)
        self._tell_used()

    def begin_run(self) -> None:
        """The executor writes by itself until `end_run`."""
        assert not self._is_in_run, "two runs at once"
        self._is_in_run = True

    def end_run(self) -> None:
        """The executor writes no more: give back what was released meanwhile."""
        self._is_in_run = False
        released, self._released_in_run = self._released_in_run, []
        for reservation in released:
            self.release(reservation)

    def move(self, reservation: Reservation, source: Sequence[int], destination: Sequence[int]) -> None:
        """Copy KV between token positions of one sequence; all are read before any is written."""
        assert not self._is_in_run, "KV cannot be moved beside a run"
        self._executor.copy_slots(self.slots(reservation, source), self.slots(reservation, destination))

    def slots(self, reservation: Reservation, positions: Sequence[int]) -> Int32Array:
        where = np.asarray(positions, dtype=np.int32)
        table = self.block_tables[reservation.table_index]
        size = self.block_size_tokens
        slots: Int32Array = table[where // size] * np.int32(size) + where % np.int32(size)
        return slots

    def drain_changes(self) -> BlockChanges:
        with self._lock:
            return self._blocks.drain_changes()

    def all_hashes(self) -> list[ChainHash]:
        with self._lock:
            return self._blocks.all_hashes()

    def check(self) -> None:
        """Assert the pool's invariants; for tests."""
        kept = {reservation.table_index for reservation in self._released_in_run}
        assert self._is_in_run or not kept, "blocks kept back for a run that has ended"
        assert not kept & set(self._free_tables), "a table is free in a run"
        with self._lock:
            self._blocks.check()

    def _allocate_after(self, match: PrefixMatch, count: int) -> tuple[PrefixMatch, list[int]]:
        """Own blocks behind a match, or nothing held at all."""
        try:
            return match, self._blocks.allocate(count)
        except OutOfBlocksError:
            if match.tail_block is None:
                self._blocks.release(match.block_ids)
                raise
        # The tail was about to be copied: without it, its own block may be the one that is missing.
        self._blocks.release((match.tail_block,))
        untailed = PrefixMatch(
            block_ids=match.block_ids, num_tokens=match.num_tokens, tail_block=None, tail_tokens=0
        )
        return self._allocate_after(untailed, count)

    def _copy_tail(self, tail_block: int, own_block: int, num_tokens: int) -> None:
        offsets = np.arange(num_tokens, dtype=np.int32)
        size = np.int32(self.block_size_tokens)
        self._executor.copy_slots(tail_block * size + offsets, own_block * size + offsets)
        with self._lock:
            self._blocks.release((tail_block,))

    def _tell_used(self) -> None:
        self._used_tokens.set(self.total_tokens - self.free_tokens)
