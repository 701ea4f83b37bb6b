"""See ../README.md."""

from tensorrt_llm.llmapi import LLM, KvCacheConfig, KvCacheConnectorConfig, RequestError, SamplingParams

__version__ = "1.2.1"
__all__ = ["LLM", "KvCacheConfig", "KvCacheConnectorConfig", "RequestError", "SamplingParams"]
