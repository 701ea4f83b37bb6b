"""`LLM` and what it is made with. Unknown arguments are refused, as there."""

import importlib
import itertools
import queue
from dataclasses import dataclass
from typing import Any

from tensorrt_llm.executor import Executor, ModelSource, Request


class RequestError(RuntimeError):
    """A request failed."""


@dataclass(frozen=True)
class KvCacheConfig:
    enable_block_reuse: bool = True
    enable_partial_reuse: bool = True
    max_tokens: int | None = None
    free_gpu_memory_fraction: float | None = None
    event_buffer_max_size: int = 0
    tokens_per_block: int = 32
    dtype: str = "auto"


@dataclass(frozen=True)
class KvCacheConnectorConfig:
    connector_module: str
    connector_scheduler_class: str
    connector_worker_class: str


@dataclass(frozen=True)
class SamplingParams:
    max_tokens: int = 32
    seed: int | None = None
    temperature: float | None = None
    end_id: int | None = None
    pad_id: int | None = None
    detokenize: bool = True

    @property
    def random_seed(self) -> list[int] | None:
        return None if self.seed is None else [self.seed]


class RequestOutput:
    def __init__(self, executor: Executor, request: Request) -> None:
        self._executor, self._request = executor, request
        self._is_done = False
        self.request_id = request.client_id

    @property
    def finished(self) -> bool:
        return self._is_done

    def result(self, timeout: float | None = None) -> "RequestOutput":
        if not self._is_done:
            error = self._request.answers.get(timeout=timeout)
            self._is_done = True
            if error is not None:
                raise RequestError(error)
        return self

    def abort(self) -> None:
        self._executor.cancel(self._request)


class LLM:
    def __init__(
        self,
        model: str,
        *,
        backend: str = "pytorch",
        skip_tokenizer_init: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        kv_cache_config: KvCacheConfig | None = None,
        kv_connector_config: KvCacheConnectorConfig | None = None,
        enable_chunked_prefill: bool = False,
        disable_overlap_scheduler: bool = False,
        cuda_graph_config: Any = None,
        max_num_tokens: int = 8192,
        max_seq_len: int | None = None,
        max_batch_size: int = 64,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(f"unknown arguments: {sorted(unknown)}")
        assert backend == "pytorch"
        assert kv_cache_config is not None
        connector = None
        if kv_connector_config is not None:
            assert disable_overlap_scheduler, "the double has no overlap scheduler"
            module = importlib.import_module(kv_connector_config.connector_module)
            connector = (
                getattr(module, kv_connector_config.connector_scheduler_class),
                getattr(module, kv_connector_config.connector_worker_class),
            )
        self._ids = itertools.count(1)
        self._executor = Executor(
            ModelSource.find(model),
            connector,
            num_ranks=tensor_parallel_size,
            kv=kv_cache_config,
            max_num_tokens=max_num_tokens,
            is_chunked=enable_chunked_prefill,
        )

    def generate_async(
        self,
        inputs: list[int],
        sampling_params: SamplingParams | None = None,
        *,
        streaming: bool = False,
        cache_salt: str | None = None,
    ) -> RequestOutput:
        assert not streaming
        if not inputs:
            raise ValueError("a prompt needs at least one token")
        request = Request(
            client_id=next(self._ids),
            tokens=list(inputs),
            sampling_config=sampling_params or SamplingParams(),
            cache_salt=cache_salt,
            answers=queue.Queue(),
        )
        output = RequestOutput(self._executor, request)
        self._executor.submit(request)
        return output

    def shutdown(self) -> None:
        self._executor.shutdown()
