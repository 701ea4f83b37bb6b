"""llama.cpp with prompt lookup, as llama-cpp-python has it, for `benchmarks/creatives.py`."""

import time
from collections.abc import Sequence
from pathlib import Path

NUM_PREDICTED = 10
CONTEXT_TOKENS = 2048


class LlamaLookup:
    def __init__(self, model: Path, threads: int) -> None:
        import llama_cpp
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        self._llama = llama_cpp.Llama(
            str(model),
            n_ctx=CONTEXT_TOKENS,
            n_threads=threads,
            n_threads_batch=threads,
            draft_model=LlamaPromptLookupDecoding(num_pred_tokens=NUM_PREDICTED),
            verbose=False,
        )
        self._end = self._llama.token_eos()

    def write(self, prompt: Sequence[int], max_tokens: int) -> tuple[float, int]:
        """Greedy: seconds and tokens behind the first one."""
        started_s, ended_s, count = 0.0, 0.0, 0
        for token in self._llama.generate(list(prompt), temp=0.0):
            ended_s = time.perf_counter()
            if count == 0:
                started_s = ended_s
            count += 1
            if count == max_tokens or token == self._end:
                break
        return ended_s - started_s, count - 1
