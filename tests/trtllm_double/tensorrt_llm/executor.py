"""The loop: fetch, schedule, tell the connector, run layer by layer, ask what is saved."""

import itertools
import os
import pickle
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from cluster.block_hash import chain_salt
from cluster.block_pool import BlockPool, OutOfBlocksError
from megakernel.model.load import open_model
from megakernel.model.row_batch import RowBatch, RowSpan, chain_parents
from megakernel.model.torch_llama import TorchLlama
from megakernel.model.weights import Weights
from tensorrt_llm._torch.pyexecutor.kv_cache_connector import RequestData, SchedulerOutput
from tensorrt_llm._utils import turn_of
from tensorrt_llm.bindings.internal.batch_manager import LlmRequest
from tensorrt_llm.kv_events import KvEvents
from tensorrt_llm.monitor import Monitor, RankStream, watched
from tensorrt_llm.stream import Stream

_DELAY = "TRTLLM_DOUBLE_DELAY_S"
"""How slow the stream is, where the double runs in a process that is not the test's."""
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}


class ModelSource:
    """Models of tests, by the name that `LLM(model=...)` is given; how slow the stream is."""

    known: ClassVar[dict[str, Weights]] = {}
    longest_delay_s: ClassVar[float] = float(os.environ.get(_DELAY, 0.0))
    names_salts: ClassVar[bool] = False
    """In events, as later versions do."""
    started: ClassVar["list[Executor]"] = []

    @classmethod
    def find(cls, name: str) -> Weights:
        return cls.known[name] if name in cls.known else open_model(name).weights


@dataclass(eq=False)
class Request:
    client_id: int
    tokens: list[int]
    sampling_config: Any
    cache_salt: str | None
    answers: Any
    request_id: int = 0
    block_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    is_cancelled: bool = False

    @property
    def bound(self) -> LlmRequest:
        """What of it a connector may read."""
        return LlmRequest(self.request_id, self.sampling_config)


class Executor:
    def __init__(
        self,
        weights: Weights,
        connector: tuple[Callable[[Any], Any], Callable[[Any], Any]] | None,
        args: Any,
    ) -> None:
        shape, kv, num_ranks = weights.shape, args.kv_cache_config, args.tensor_parallel_size
        self._shape, self._kv_config = shape, kv
        self._num_ranks, self._max_num_tokens = num_ranks, args.max_num_tokens
        self._is_chunked = args.enable_chunked_prefill
        self._size = kv.tokens_per_block
        self.num_blocks = kv.max_tokens // self._size
        self.blocks = BlockPool(self.num_blocks, self._size)
        self.events = KvEvents(self.blocks, kv.event_buffer_max_size, names_salts=ModelSource.names_salts)
        dtype = "float32" if kv.dtype == "auto" else kv.dtype
        computed = "float32" if dtype == "fp8" else dtype
        self._computed_dtype = _DTYPES[computed]
        self._model = TorchLlama(weights, "cpu", has_head=False, kv_dtype=computed)
        self._kv = self._model.new_kv(self.num_blocks * self._size)
        heads = max(1, shape.num_kv_heads // num_ranks)
        pool_shape = (self.num_blocks, shape.num_layers, 2, heads * self._size * shape.head_dim)
        self.pools = [torch.full(pool_shape, torch.nan).to(_DTYPES[dtype]) for _ in range(num_ranks)]
        self.stream = Stream(ModelSource.longest_delay_s)
        self.monitor = Monitor(self.num_blocks, num_ranks)
        self._rank_streams = [RankStream(self.stream, self.monitor, rank) for rank in range(num_ranks)]
        self._ids = itertools.count(2048)
        self._arrived: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._known: dict[int, int] = {}
        """Of requests that the connector has heard of, how many of its blocks."""
        self._fresh: list[int] = []
        """Blocks that the next step's forward pass overwrites."""
        self._scheduler, self._workers = None, []
        if connector is not None:
            with turn_of(0, num_ranks):
                self._scheduler = connector[0](args)
            for rank, pool in enumerate(self.pools):
                with turn_of(rank, num_ranks):
                    self._workers.append(connector[1](args))
                    self._workers[rank].register_kv_caches(watched(pool, self.monitor, rank))
        ModelSource.started.append(self)
        self.error: BaseException | None = None
        self.before_layer: Callable[[int], None] = lambda _: None
        """Tests hold the forward pass here."""
        self.monitor.begin()
        self._thread = threading.Thread(target=self._run, name="double-executor", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        if self.error is not None:
            request.answers.put(f"the executor died: {self.error!r}")
            return
        self._arrived.put(request)

    def cancel(self, request: Request) -> None:
        request.is_cancelled = True

    def shutdown(self) -> None:
        self._arrived.put(None)
        self._thread.join()
        self.stream.close()
        # As when its processes end: nothing keeps what the connector had mapped.
        self._scheduler, self._workers = None, []
        ModelSource.started.remove(self)

    def is_idle_within(self, timeout_s: float) -> bool:
        end_s = time.monotonic() + timeout_s
        while (self._running or self._waiting) and time.monotonic() < end_s:
            time.sleep(0.01)
        return not self._running and not self._waiting

    def _run(self) -> None:
        try:
            while self._fetch():
                self._iterate()
        except BaseException as error:
            self.error = error
            for request in (*self._running, *self._waiting):
                request.answers.put(f"the executor died: {error!r}")
            raise

    def _fetch(self) -> bool:
        is_busy = self._running or self._waiting
        try:
            while True:
                arrived = self._arrived.get(timeout=0.001 if is_busy else None)
                if arrived is None:
                    return False
                arrived.request_id = next(self._ids)
                self._waiting.append(arrived)
                is_busy = True
        except queue.Empty:
            return True

    def _iterate(self) -> None:
        self.monitor.check()
        self._drop_cancelled()
        chunks = self._schedule()
        self._tell_connector(chunks)
        if chunks:
            self._forward(chunks)
        for request, _, end in chunks:
            request.num_computed = end
            if end == len(request.tokens):
                self._finish(request)
        for rank, worker in enumerate(self._workers):
            with turn_of(rank, self._num_ranks):
                assert worker.get_finished([], []) == ([], []), "nobody asked"
        if not self._running and not self._waiting:
            self.monitor.is_idle(self.blocks, len(self._known))
            self.monitor.check()

    def _drop_cancelled(self) -> None:
        for request in [one for one in self._waiting if one.is_cancelled]:
            self._waiting.remove(request)  # and no answer
        for request in [one for one in self._running if one.is_cancelled]:
            # Versions differ in whether the connector hears of it.
            self._finish(request, is_told=request.request_id % 2 == 0)

    def _schedule(self) -> list[tuple[Request, int, int]]:
        """(request, first token, end) within the budget: whole prompts, or chunks where that is on."""
        budget, chunks = self._max_num_tokens, []
        self._admit()
        for request in self._running:
            rest = len(request.tokens) - request.num_computed
            count = min(rest, budget) if self._is_chunked else (rest if rest <= budget else 0)
            if self._is_chunked and count < rest:
                count -= (request.num_computed + count) % self._size  # chunks end with a block
            if count > 0:
                chunks.append((request, request.num_computed, request.num_computed + count))
                budget -= count
        return chunks

    def _admit(self) -> None:
        while self._waiting:
            request = self._waiting[0]
            # The last token is computed in any case: its logits are wanted.
            match = self.blocks.match_prefix(
                request.tokens, chain_salt("double", request.cache_salt or ""), len(request.tokens) - 1
            )
            if match.tail_block is not None:
                self.blocks.release([match.tail_block])
            needed = -(-(len(request.tokens) + 1) // self._size) - len(match.block_ids)
            try:
                fresh = self.blocks.allocate(needed)
            except OutOfBlocksError:
                self.blocks.release(match.block_ids)
                return
            self.events.evicted()
            self._fresh += fresh
            self._waiting.pop(0)
            request.block_ids = [*match.block_ids, *fresh]
            request.num_computed = request.num_cached = match.num_tokens
            self._running.append(request)
            if self._scheduler is not None:
                matched = self._scheduler.get_num_new_matched_tokens(request.bound, request.num_computed)
                if matched == (0, True):
                    raise RuntimeError("load_kv_async must be False when num_tokens is 0!")
                assert matched == (0, False), "the double loads nothing"
                self._scheduler.update_state_after_alloc(request.bound, request.block_ids)

    def _tell_connector(self, chunks: list[tuple[Request, int, int]]) -> None:
        if self._scheduler is None:
            return
        output = SchedulerOutput()
        for request, first, end in chunks:
            known = self._known.get(request.request_id)
            data = RequestData(
                request_id=request.request_id,
                new_tokens=request.tokens if known is None else [],
                new_block_ids=request.block_ids[known or 0 :],
                computed_position=first,
                num_scheduled_tokens=end - first,
            )
            (output.new_requests if known is None else output.cached_requests).append(data)
            self._known[request.request_id] = len(request.block_ids)
        metadata = self._scheduler.build_connector_meta(output)
        for rank, worker in enumerate(self._workers):
            with turn_of(rank, self._num_ranks):
                worker.bind_connector_meta(pickle.loads(pickle.dumps(metadata)))
                worker.start_load_kv(self._rank_streams[rank])
            self.monitor.step_begins(rank)

    def _forward(self, chunks: list[tuple[Request, int, int]]) -> None:
        fresh, self._fresh = self._fresh, []
        self.stream.enqueue(lambda: self.monitor.overwrites(fresh))
        for pool in self.pools:
            self.stream.enqueue(lambda p=pool: p.__setitem__(fresh, torch.nan))

        def after_layer(layer: int) -> None:
            self.before_layer(layer)
            for request, first, end in chunks:
                data = bytes(self._kv.read_wire(layer, self._slots(request, first, end)))
                self.stream.enqueue(lambda r=request, f=first, d=data: self._write(layer, r, f, d))
            for rank, worker in enumerate(self._workers):
                with turn_of(rank, self._num_ranks):
                    worker.save_kv_layer(layer, self._rank_streams[rank])
            for rank, worker in enumerate(self._workers):
                if layer + 1 < self._shape.num_layers:
                    with turn_of(rank, self._num_ranks):
                        worker.wait_for_layer_load(layer + 1, self._rank_streams[rank])

        self._model.forward(
            self._kv, self._rows(chunks), np.empty(0, dtype=np.int64), on_kv_written=after_layer
        )
        for rank, worker in enumerate(self._workers):
            with turn_of(rank, self._num_ranks):
                worker.wait_for_save(self._rank_streams[rank])
        self.stream.synchronize()  # a token is sampled from what comes out

    def _write(self, layer: int, request: Request, first: int, data: bytes) -> None:
        """Heads x tokens x values within a block: one token of one head at a time. 8 bits have no scale."""
        shape, size = self._shape, self._size
        wire = torch.frombuffer(bytearray(data), dtype=self._computed_dtype).to(self.pools[0].dtype)
        wire = wire.view(2, -1, shape.num_kv_heads, shape.head_dim)
        for rank, pool in enumerate(self.pools):
            heads = pool.shape[3] // (size * shape.head_dim)
            first_head = rank * shape.num_kv_heads // self._num_ranks
            view = pool.view(*pool.shape[:3], heads, size, shape.head_dim)
            own = wire[:, :, first_head : first_head + heads]
            for at in range(own.shape[1]):
                block, place = divmod(first + at, size)
                view[request.block_ids[block], layer, :, :, place] = own[:, at]

    def _rows(self, chunks: list[tuple[Request, int, int]]) -> RowBatch:
        spans, parents, slots, num_rows = [], [], [], 0
        for request, first, end in chunks:
            spans.append(RowSpan(num_rows, num_rows + end - first, self._slots(request, 0, first)))
            parents.append(chain_parents(num_rows, end - first))
            slots.append(self._slots(request, first, end))
            num_rows += end - first
        return RowBatch(
            token_ids=np.concatenate([np.array(r.tokens[f:e], dtype=np.int64) for r, f, e in chunks]),
            positions=np.concatenate([np.arange(f, e, dtype=np.int64) for _, f, e in chunks]),
            slots=np.concatenate(slots),
            parents=np.concatenate(parents),
            spans=tuple(spans),
        )

    def _slots(self, request: Request, first: int, end: int) -> Any:
        tokens = np.arange(first, end, dtype=np.int64)
        blocks = np.array(request.block_ids, dtype=np.int64)
        return blocks[tokens // self._size] * self._size + tokens % self._size

    def _finish(self, request: Request, *, is_told: bool = True) -> None:
        self._running.remove(request)
        self._known.pop(request.request_id, None)
        if self._scheduler is not None and is_told:
            is_kept = self._scheduler.request_finished(request.bound, request.block_ids)
            assert not is_kept, "the double keeps no blocks for a connector: not every version does so safely"
        self._free(request)
        request.answers.put(None)

    def _free(self, request: Request) -> None:
        if self._kv_config.enable_block_reuse and request.num_computed == len(request.tokens):
            salt = chain_salt("double", request.cache_salt or "")
            self.blocks.publish(request.tokens, request.block_ids, salt)
            self.events.published(request.tokens, salt, request.cache_salt)
        self.blocks.release(request.block_ids)
