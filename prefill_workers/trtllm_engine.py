"""Starts TensorRT-LLM as a prefill engine: its arguments, its requests, its errors.

Beside the connector this is the only module that imports `tensorrt_llm`, and neither is imported where
another engine is chosen. What of its interface is used, and of which versions it was read, is in
trtllm_signatures.toml; docs/tensorrt-llm.md has the rest.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from tensorrt_llm import LLM, SamplingParams
from tensorrt_llm._utils import mpi_disabled
from tensorrt_llm.llmapi import KvCacheConfig, KvCacheConnectorConfig

from cluster.kv_layout import KvLayout
from prefill_workers.event_poller import EventPoller
from prefill_workers.export_engine import ExportEngine, Submission
from prefill_workers.kv_scales import check_kv_scales
from prefill_workers.rank_channel import ChannelError, ExportSettings

_T = TypeVar("_T")

BLOCK_TOKENS = 32
"""Of its pool."""
_MAX_EVENTS = 16_384
"""Kept until they are fetched: of a second or more. Then the oldest are lost, and what is held with them."""
_CONNECTOR = KvCacheConnectorConfig(
    connector_module="prefill_workers.trtllm_connector",
    connector_scheduler_class="ExportScheduler",
    connector_worker_class="ExportWorker",
)


class TensorRtLlmSettings(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    """A Hugging Face folder, or a hub id."""
    dtype: str = "auto"
    kv_dtype: str = "auto"
    """Of the pool: `auto` is the model's, or `fp8`."""
    tensor_parallel_size: int = 1
    max_tokens_per_step: int
    max_context_tokens: int
    max_running: int
    staging_bytes: int
    lease_s: float
    start_timeout_s: float
    index_block_tokens: int
    """Of the placement index's blocks: the decode workers'."""


def start_engine(settings: TensorRtLlmSettings, layout: KvLayout, num_blocks: int) -> ExportEngine:
    """`layout.block_size_tokens` is the pool's.

    Raises ChannelError, KvScaleError, ModelFormatError, or what TensorRT-LLM raises.
    """
    if mpi_disabled():
        raise ChannelError(
            "with TLLM_DISABLE_MPI=1 TensorRT-LLM starts its ranks without MPI, and then none but rank 0 "
            "hears what its connector plans: unset it"
        )

    if (folder := Path(settings.model)).is_dir():
        check_kv_scales(folder, settings.kv_dtype)

    def start(export: ExportSettings) -> _Submitter:
        return _Submitter(
            LLM(
                model=settings.model,
                backend="pytorch",
                skip_tokenizer_init=True,
                dtype=settings.dtype,
                tensor_parallel_size=settings.tensor_parallel_size,
                max_num_tokens=settings.max_tokens_per_step,
                # One token is sampled behind the prompt.
                max_seq_len=settings.max_context_tokens + 1,
                max_batch_size=settings.max_running,
                enable_chunked_prefill=True,
                # Connectors see a step's blocks before it runs: no step may be prepared ahead, or replayed.
                disable_overlap_scheduler=True,
                cuda_graph_config=None,
                kv_cache_config=KvCacheConfig(
                    enable_block_reuse=True,
                    # A block that is read in part may be written by its new owner while it is exported.
                    enable_partial_reuse=False,
                    max_tokens=num_blocks * layout.block_size_tokens,
                    tokens_per_block=layout.block_size_tokens,
                    dtype=settings.kv_dtype,
                    event_buffer_max_size=_MAX_EVENTS,
                ),
                kv_connector_config=_CONNECTOR,
                env_overrides=export.to_variables(),
            )
        )

    return ExportEngine(
        layout,
        start,
        num_ranks=settings.tensor_parallel_size,
        num_blocks=num_blocks,
        staging_bytes=settings.staging_bytes,
        lease_s=settings.lease_s,
        start_timeout_s=settings.start_timeout_s,
        index_block_tokens=settings.index_block_tokens,
    )


class _Submitter:
    """Requests are made and awaited in an event loop: `result(timeout)` of an output waits without one."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._loop = _LoopThread()
        self._events = EventPoller(self._fetch_events, _MAX_EVENTS)

    def submit(self, token_ids: Sequence[int], number: int, salt: str) -> Submission:
        # No token ends it, and without temperature it is greedy.
        sampling = SamplingParams(max_tokens=1, seed=number, end_id=-1, pad_id=-1, detokenize=False)

        async def begin() -> Any:
            return self._llm.generate_async(
                list(token_ids), sampling_params=sampling, streaming=False, cache_salt=salt or None
            )

        return _Submission(self._loop, self._loop.start(begin()).result())

    def _fetch_events(self, wait_s: float) -> list[object]:
        events: list[object] = self._llm.get_kv_cache_events(timeout=wait_s)
        return events

    def poll_events(self) -> list[object]:
        return self._events.take()

    def shutdown(self) -> None:
        self._events.close()
        self._llm.shutdown()
        self._loop.close()


class _Submission:
    """Its token is thrown away: the decode worker samples its own."""

    def __init__(self, loop: "_LoopThread", output: Any) -> None:
        self._loop = loop
        self._output = output
        self._ended = loop.start(output.aresult())

    def poll(self) -> bool:
        if not self._ended.done():
            return False
        self._ended.result()
        return True

    def abort(self) -> None:
        self._loop.call(self._output.abort)
        # A request that had not begun ends without an answer.
        self._ended.cancel()


class _LoopThread:
    """An event loop that other threads hand work to."""

    def __init__(self) -> None:
        self._is_ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="trtllm", daemon=True)
        self._thread.start()
        self._is_ready.wait()

    def start(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, work: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(work)

    def close(self) -> None:
        """What has not ended is cancelled."""
        self._loop.call_soon_threadsafe(self._is_closed.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._is_closed = asyncio.Event()
        self._is_ready.set()
        await self._is_closed.wait()
