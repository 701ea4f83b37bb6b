"""Starts TensorRT-LLM as a prefill engine: its arguments, its requests, its errors.

Beside the connector this is the only module that imports `tensorrt_llm`, and neither is imported where
another engine is chosen. What the interface is, and of which versions it was read: docs/tensorrt-llm.md.
"""

import queue
from collections.abc import Sequence
from typing import Any

import msgspec
from tensorrt_llm import LLM, SamplingParams
from tensorrt_llm.llmapi import KvCacheConfig, KvCacheConnectorConfig

from cluster.kv_layout import KvLayout
from prefill_workers.export_engine import ExportEngine, Submission

BLOCK_TOKENS = 32
"""Of its pool."""
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


def start_engine(settings: TensorRtLlmSettings, layout: KvLayout, num_blocks: int) -> ExportEngine:
    """`layout.block_size_tokens` is the pool's. Raises ChannelError, or what TensorRT-LLM raises."""

    def start() -> _Submitter:
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
                ),
                kv_connector_config=_CONNECTOR,
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
    )


class _Submitter:
    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def submit(self, token_ids: Sequence[int], number: int, salt: str) -> Submission:
        sampling = SamplingParams(
            max_tokens=1, seed=number, temperature=0.0, end_id=-1, pad_id=-1, detokenize=False
        )
        output = self._llm.generate_async(list(token_ids), sampling, streaming=False, cache_salt=salt or None)
        return _Submission(output)

    def shutdown(self) -> None:
        self._llm.shutdown()


class _Submission:
    """Its token is thrown away: the decode worker samples its own."""

    def __init__(self, output: Any) -> None:
        self._output = output

    def poll(self) -> bool:
        try:
            self._output.result(timeout=0)
        except (queue.Empty, TimeoutError):
            return False
        return True

    def abort(self) -> None:
        self._output.abort()
