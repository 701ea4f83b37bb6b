"""The bookkeeping that engines share, under any order of admissions, steps, failures and cancels."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.block_pool import OutOfBlocksError
from cluster.ids import ChainHash, RequestId
from cluster.kv_layout import KvLayout
from prefill_workers.chunked_engine import Chunk, ChunkedPrefillEngine, OnLayer, SlotArray
from prefill_workers.engine import PrefillJob
from tests.prefill_workers.exports import Exported

BLOCK, NUM_BLOCKS, BUDGET = 4, 12, 7
LAYOUT = KvLayout(
    model_fingerprint="sums",
    num_layers=2,
    num_kv_heads=1,
    head_dim=1,
    dtype="float32",
    block_size_tokens=BLOCK,
)


class SumKv:
    """`KvCompute` in which a token's KV is the sum of its prompt so far, read from where it should lie."""

    layout = LAYOUT

    def __init__(self) -> None:
        self.sums = np.full((LAYOUT.num_layers, NUM_BLOCKS * BLOCK), np.nan, dtype=np.float32)
        self.written: list[int] = []
        """Blocks written in the last step."""
        self.is_failing = False

    def compute(self, chunks: Sequence[Chunk], on_layer: OnLayer) -> None:
        self.written = []
        for layer in range(LAYOUT.num_layers):
            for chunk in chunks:
                self._append(layer, chunk)
            if self.is_failing:
                raise RuntimeError("the step fails after a layer")
            on_layer(layer)

    def _append(self, layer: int, chunk: Chunk) -> None:
        for position, token in zip(range(chunk.start, chunk.end), chunk.token_ids, strict=True):
            assert chunk.slots[position] == chunk.block_ids[position // BLOCK] * BLOCK + position % BLOCK
            before = self.sums[layer, chunk.slots[position - 1]] if position else layer * 1000
            self.sums[layer, chunk.slots[position]] = before + token
        self.written += {int(slot) // BLOCK for slot in chunk.slots[chunk.start :]}

    def read_layer(self, layer: int, slots: SlotArray) -> memoryview:
        return np.concatenate([self.sums[layer, slots], -self.sums[layer, slots]]).data


class Bookkeeping(RuleBasedStateMachine):
    """Prompts are drawn so that they share prefixes often, in full blocks and inside one."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = SumKv()
        self.engine = ChunkedPrefillEngine(self.kv, NUM_BLOCKS, BUDGET)
        self.pool = self.engine._pool
        self.jobs: dict[RequestId, tuple[PrefillJob, Exported]] = {}
        """Not finished."""
        self.done: list[RequestId] = []
        """Finished and not released."""
        self.num_admitted = 0
        self.announced: set[ChainHash] = set()

    @rule(
        shared=st.integers(0, 24),
        own=st.lists(st.integers(1, 9), max_size=10),
        first=st.integers(0, 34),
        tenant=st.sampled_from(["", "other"]),
    )
    def admit(self, shared: int, own: list[int], first: int, tenant: str) -> None:
        tokens = (*range(1, shared + 1), *own)
        one = PrefillJob(
            request_id=RequestId(f"job {self.num_admitted}"),
            token_ids=tokens,
            first_token=min(first, len(tokens)),
            tenant=tenant,
        )
        exported = Exported(LAYOUT)
        free = self.engine.free_kv_tokens
        if not self.engine.can_admit(one):
            with pytest.raises(OutOfBlocksError):
                self.engine.admit(one, exported)
            assert self.engine.free_kv_tokens == free
            return
        self.engine.admit(one, exported)
        self.num_admitted += 1
        self.jobs[one.request_id] = (one, exported)

    @rule()
    def step(self) -> None:
        had_work = self.engine.has_work()
        oldest = next(iter(self.jobs.values()), None)
        before = sum(self._remaining(request_id) for request_id in self.jobs)
        self.kv.written = []
        finished = self.engine.step()
        after = sum(self._remaining(request_id) for request_id in self.jobs)
        assert before - after == min(before, BUDGET)
        assert (oldest is not None) == had_work
        for done in finished:
            one, exported = self.jobs.pop(done.request_id)
            self.done.append(done.request_id)
            self._check_export(one, exported)
        self._check_written()
        self._check_announced()

    @precondition(lambda self: self.jobs)
    @rule()
    def fail(self) -> None:
        """As the engine's loop does it: whatever was not finished is let go."""
        self.kv.is_failing = True
        try:
            if sum(self._remaining(request_id) for request_id in self.jobs):
                with pytest.raises(RuntimeError, match="after a layer"):
                    self.engine.step()
                self._check_written()
        finally:
            self.kv.is_failing = False
        for request_id in self.jobs:
            self.engine.release(request_id)
        self.jobs.clear()

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(list(self.jobs)))
        del self.jobs[request_id]
        self.engine.release(request_id)

    @precondition(lambda self: self.done)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(self.done))
        self.done.remove(request_id)
        self.engine.release(request_id)
        self.engine.release(request_id)

    def _remaining(self, request_id: RequestId) -> int:
        return self.engine._running[request_id].num_remaining

    def _check_export(self, one: PrefillJob, exported: Exported) -> None:
        sums = np.cumsum(one.token_ids, dtype=np.float32)[one.first_token :]
        kv = exported.kv(one.first_token, len(one.token_ids))
        for layer in range(LAYOUT.num_layers):
            expected = sums + layer * 1000
            assert np.array_equal(kv[layer, :, :, 0], [expected, -expected])

    def _check_announced(self) -> None:
        changes = self.engine.drain_changes()
        assert not self.announced & set(changes.stored)
        assert set(changes.removed) <= self.announced
        self.announced = self.announced - set(changes.removed) | set(changes.stored)
        assert self.announced == set(self.pool.all_hashes())
        assert self.announced == set(self.engine.all_hashes())

    def _check_written(self) -> None:
        """A block that a step wrote was one job's alone."""
        holders = Counter(block for each in self.engine._running.values() for block in each.block_ids)
        assert all(holders[block] == 1 for block in self.kv.written)

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        self.pool.check()
        held = Counter(block for each in self.engine._running.values() for block in each.block_ids)
        assert self.pool.num_used_blocks == len(held)
        assert [self.pool._references[block] for block in held] == list(held.values())
        assert self.engine.free_kv_tokens == (NUM_BLOCKS - len(held)) * BLOCK
        assert self.engine._running.keys() == {*self.jobs, *self.done}
        assert self.engine.has_work() == bool(self.jobs)

    @invariant()
    def what_is_written_next_is_one_jobs_alone_and_not_in_the_cache(self) -> None:
        held = Counter(block for each in self.engine._running.values() for block in each.block_ids)
        for request_id in self.jobs:
            running = self.engine._running[request_id]
            for block in running.block_ids[running.num_computed // BLOCK :]:
                assert held[block] == 1
                assert block not in self.pool._cached

    def teardown(self) -> None:
        for request_id in (*self.jobs, *self.done):
            self.engine.release(request_id)
        assert self.engine.free_kv_tokens == NUM_BLOCKS * BLOCK


TestBookkeeping = Bookkeeping.TestCase
TestBookkeeping.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
