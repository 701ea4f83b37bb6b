"""`LLM` and what it is made with. Unknown arguments are refused, as there."""

import asyncio
import dataclasses
import importlib
import itertools
import queue
from dataclasses import dataclass
from typing import Any

from tensorrt_llm.bindings import SamplingConfig
from tensorrt_llm.executor import Executor, ModelSource, Request


class RequestError(RuntimeError):
    """A request failed."""


@dataclass(frozen=True, kw_only=True)
class KvCacheConfig:
    enable_block_reuse: bool = True
    enable_partial_reuse: bool = True
    max_tokens: int | None = None
    free_gpu_memory_fraction: float | None = None
    event_buffer_max_size: int = 0
    tokens_per_block: int = 32
    dtype: str = "auto"


@dataclass(frozen=True, kw_only=True)
class KvCacheConnectorConfig:
    connector_module: str
    connector_scheduler_class: str
    connector_worker_class: str


@dataclass(kw_only=True)
class SamplingParams:
    max_tokens: int = 32
    seed: int | None = None
    temperature: float | None = None
    end_id: int | None = None
    pad_id: int | None = None
    detokenize: bool = True


@dataclass(frozen=True, kw_only=True)
class TorchLlmArgs:
    model: str
    backend: str = "pytorch"
    skip_tokenizer_init: bool = False
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    kv_cache_config: KvCacheConfig = dataclasses.field(default_factory=KvCacheConfig)
    kv_connector_config: KvCacheConnectorConfig | None = None
    enable_chunked_prefill: bool = False
    disable_overlap_scheduler: bool = False
    cuda_graph_config: Any = None
    max_num_tokens: int | None = 8192
    max_seq_len: int | None = None
    max_batch_size: int | None = 2048
    env_overrides: dict[str, str] | None = None


class RequestOutput:
    def __init__(self, executor: Executor, request: Request) -> None:
        self._executor, self._request = executor, request
        self._is_done = False
        self.request_id = request.client_id

    @property
    def finished(self) -> bool:
        return self._is_done

    def result(self, timeout: float | None = None) -> "RequestOutput":
        """However short `timeout` is: it is not heard."""
        assert isinstance(self._request.answers, queue.Queue), (
            "made in an event loop, and awaited without one"
        )
        return self._handle(None if self._is_done else self._request.answers.get())

    async def aresult(self) -> "RequestOutput":
        assert isinstance(self._request.answers, _AsyncQueue), (
            "made without an event loop, and awaited in one"
        )
        return self._handle(None if self._is_done else await self._request.answers.queue.get())

    def abort(self) -> None:
        self._executor.cancel(self._request)

    def _handle(self, error: str | None) -> "RequestOutput":
        self._is_done = True
        if error is not None:
            raise RequestError(error)
        return self


class _AsyncQueue:
    """Put to from the executor's thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[str | None] = asyncio.Queue()

    def put(self, answer: str | None) -> None:
        self._loop.call_soon_threadsafe(self.queue.put_nowait, answer)


class LLM:
    def __init__(
        self,
        model: str,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        assert skip_tokenizer_init, "the double has no tokenizer"
        for unknown in kwargs.keys() - {field.name for field in dataclasses.fields(TorchLlmArgs)}:
            raise ValueError(f"LLM got invalid argument: {unknown}")
        args = TorchLlmArgs(
            model=model,
            skip_tokenizer_init=skip_tokenizer_init,
            tensor_parallel_size=tensor_parallel_size,
            dtype=dtype,
            **kwargs,
        )
        assert args.backend == "pytorch"
        connector = None
        if args.kv_connector_config is not None:
            assert args.disable_overlap_scheduler, "the double has no overlap scheduler"
            module = importlib.import_module(args.kv_connector_config.connector_module)
            connector = (
                getattr(module, args.kv_connector_config.connector_scheduler_class),
                getattr(module, args.kv_connector_config.connector_worker_class),
            )
        self._ids = itertools.count(1)
        self._executor = Executor(ModelSource.find(model), connector, args)

    def generate_async(
        self,
        inputs: list[int],
        sampling_params: SamplingParams | None = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
        kv_cache_retention_config: Any = None,
        disaggregated_params: Any = None,
        trace_headers: Any = None,
        _postproc_params: Any = None,
        scheduling_params: Any = None,
        cache_salt: str | None = None,
    ) -> RequestOutput:
        assert not streaming
        sampling = sampling_params or SamplingParams()
        if sampling.end_id is None:
            raise ValueError("without a tokenizer, end_id must be given")
        if not inputs:
            raise ValueError("a prompt needs at least one token")
        seeds = None if sampling.seed is None else [sampling.seed]
        request = Request(
            client_id=next(self._ids),
            tokens=list(inputs),
            sampling_config=SamplingConfig(random_seed=seeds),
            cache_salt=cache_salt,
            answers=_AsyncQueue() if _has_event_loop() else queue.Queue(),
        )
        output = RequestOutput(self._executor, request)
        self._executor.submit(request)
        return output

    def get_kv_cache_events(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        return self._executor.events.get(timeout)

    def shutdown(self) -> None:
        self._executor.shutdown()


def _has_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
