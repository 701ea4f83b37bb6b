"""The real engine and connector against the double: the same KV as PyTorch's engine, and nothing leaked."""

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from prefill_workers.engine import PrefillDone, PrefillFailed
from prefill_workers.torch_engine import TorchPrefillEngine
from tests.prefill_workers.exports import Exported, job, random_tokens
from tests.tiny_model import tiny_weights

DOUBLE = Path(__file__).parents[1] / "trtllm_double"
try:
    import tensorrt_llm  # noqa: F401 - a real one needs a GPU, and has tests/hardware
except ImportError:
    sys.path.append(str(DOUBLE))
else:
    if not str(sys.modules["tensorrt_llm"].__file__).startswith(str(DOUBLE)):
        pytest.skip("a real TensorRT-LLM is installed", allow_module_level=True)

from tensorrt_llm.executor import ModelSource  # noqa: E402 - where the double is was not known before

from prefill_workers.export_engine import ExportEngine  # noqa: E402
from prefill_workers.trtllm_engine import TensorRtLlmSettings, start_engine  # noqa: E402

WEIGHTS = tiny_weights(1, num_layers=3, num_kv_heads=2, max_context_tokens=4096)
BLOCK = 32


@pytest.fixture
def torch_engine() -> TorchPrefillEngine:
    return TorchPrefillEngine(WEIGHTS, "tiny", 400, 16, 256, 1)


class Rig:
    def __init__(self, layout, **changes) -> None:
        ModelSource.known["tiny"] = WEIGHTS
        import msgspec

        settings = {
            "model": "tiny",
            "kv_dtype": "float32",
            "max_tokens_per_step": 64,
            "max_context_tokens": 4000,
            "max_running": 16,
            "staging_bytes": 8 << 20,
            "lease_s": 30.0,
            "start_timeout_s": 10.0,
        }
        num_blocks = changes.pop("num_blocks", 200)
        layout = msgspec.structs.replace(layout, block_size_tokens=BLOCK)
        self.engine: ExportEngine = start_engine(
            TensorRtLlmSettings(**{**settings, **changes}), layout, num_blocks
        )
        self.executor = ModelSource.started[-1]
        self.num_blocks = num_blocks

    def run(self, jobs) -> dict:
        """All of them at once; what each exported, and how it ended. Released at its end."""
        exported = {one.request_id: Exported(self.engine.layout) for one in jobs}
        ends, waiting = {}, list(jobs)
        while waiting or len(ends) < len(jobs):
            while waiting and self.engine.can_admit(waiting[0]):
                one = waiting.pop(0)
                self.engine.admit(one, self.keep(exported[one.request_id]))
            for end in self.engine.step():
                ends[end.request_id] = end
                self.engine.release(end.request_id)
        return {name: (exported[name], ends[name]) for name in exported}

    @staticmethod
    def keep(exported):
        """A chunk's memory is the engine's again once the job is released."""

        def export(chunk):
            exported(
                type(chunk)(chunk.layer, chunk.first_token, chunk.num_tokens, memoryview(bytes(chunk.data)))
            )

        return export

    def assert_nothing_is_held(self) -> None:
        deadline_s = time.monotonic() + 10
        while self.engine.has_work() or self.executor.saving:
            assert time.monotonic() < deadline_s
            self.engine.step()
        assert self.engine.free_kv_tokens == self.num_blocks * BLOCK
        assert self.executor.blocks.num_used_blocks == 0
        self.executor.blocks.check()
        assert self.executor.error is None


@pytest.fixture
def rig(torch_engine, request) -> Iterator[Rig]:
    made = Rig(torch_engine.layout, **getattr(request, "param", {}))
    yield made
    made.engine.close()


def expected(engine: TorchPrefillEngine, one) -> np.ndarray:
    exported = Exported(engine.layout)
    engine.admit(one, exported)
    while not engine.step():
        pass
    engine.release(one.request_id)
    return exported.kv(one.first_token, len(one.token_ids))


@pytest.mark.parametrize("rig", [{}, {"tensor_parallel_size": 2}, {"tensor_parallel_size": 4}], indirect=True)
def test_the_kv_is_that_of_the_pytorch_engine(rig, torch_engine) -> None:
    """Bitwise, of 50 prompts, chunked, cached and in part already there, 16 at once."""
    dice = random.Random(0)
    shared = random_tokens(200, 7)
    jobs = []
    for number in range(50):
        length = dice.choice([5, 31, 32, 33, 70, 130, 400, 2000 if number == 0 else 90])
        begin = shared[: dice.choice([0, 0, 64, 150])]
        tokens = (*begin, *random_tokens(length, number))
        jobs.append(job(f"j{number}", tokens, dice.choice([0, 0, len(begin), 3])))
    ends = rig.run(jobs)
    assert sum(end.cached_tokens for _, end in ends.values()) > 0
    for one in jobs:
        exported, end = ends[one.request_id]
        assert isinstance(end, PrefillDone)
        kv = exported.kv(one.first_token, len(one.token_ids))
        np.testing.assert_array_equal(kv, expected(torch_engine, one))
    rig.assert_nothing_is_held()
