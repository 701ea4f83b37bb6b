"""What a C++ request lets read."""

from tensorrt_llm.bindings import SamplingConfig


class LlmRequest:
    def __init__(self, request_id: int, sampling_config: SamplingConfig) -> None:
        self._request_id, self._sampling_config = request_id, sampling_config

    @property
    def request_id(self) -> int:
        return self._request_id

    @property
    def sampling_config(self) -> SamplingConfig:
        return self._sampling_config
