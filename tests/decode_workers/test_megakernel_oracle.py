"""The packaged model in the megakernel beside the PyTorch oracle: greedy, token by token."""

import numpy as np
import pytest

from cluster.text import Tokenizer
from decode_workers.executor import StepExecutor
from decode_workers.megakernel_executor import MegaKernelExecutor
from decode_workers.step_batch import NO_PARENT, Float32Array, StepBatch
from decode_workers.torch_executor import TorchExecutor
from headrace.served_model import served_model
from megakernel.artifact_cache import ArtifactCache
from megakernel.build import BuildError, find_compiler
from megakernel.machine import load_machine
from megakernel.model.load import PACKAGED_MODEL, open_model
from megakernel.recipe import recipe_for
from tests.e2e.prompts import LENGTHS, prompt_token_ids

NUM_TOKENS = 256
BLOCK = 16
CHUNK = 64
TABLE_BLOCKS = -(-(max(LENGTHS) + NUM_TOKENS) // BLOCK)
NUM_BLOCKS = TABLE_BLOCKS * len(LENGTHS)
CLOSE_CALL = 0.5
"""Logits: where the oracle's own top two are nearer than this, int8 activations may choose the other one."""

try:
    find_compiler()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


class Sequences:
    """One a prompt, in blocks of its own, stepped together."""

    def __init__(self, executor: StepExecutor, prompts: list[list[int]]) -> None:
        self.executor = executor
        self.tables = np.arange(NUM_BLOCKS, dtype=np.int32).reshape(len(prompts), TABLE_BLOCKS)
        self.lengths = np.zeros(len(prompts), dtype=np.int32)
        for index, prompt in enumerate(prompts):
            for start in range(0, len(prompt) - 1, CHUNK):
                self._fill(index, prompt[start : min(start + CHUNK, len(prompt) - 1)])

    def step(self, token_ids: list[int]) -> Float32Array:
        """[sequences, vocab] after one more token each."""
        count = len(token_ids)
        at = self.lengths.copy()
        blocks = self.tables[np.arange(count), at // BLOCK]
        batch = StepBatch(
            token_ids=np.array(token_ids, dtype=np.int32),
            positions=at,
            slots=blocks * np.int32(BLOCK) + at % np.int32(BLOCK),
            parents=np.full(count, NO_PARENT, dtype=np.int32),
            sequence_starts=np.arange(count + 1, dtype=np.int32),
            context_lengths=at,
            block_tables=self.tables,
            needs_logits=np.ones(count, dtype=np.bool_),
        )
        self.lengths += 1
        return self.executor.run(batch).logits

    def _fill(self, index: int, token_ids: list[int]) -> None:
        start, count = int(self.lengths[index]), len(token_ids)
        at = np.arange(start, start + count, dtype=np.int32)
        batch = StepBatch(
            token_ids=np.array(token_ids, dtype=np.int32),
            positions=at,
            slots=self.tables[index, at // BLOCK] * np.int32(BLOCK) + at % np.int32(BLOCK),
            parents=np.arange(NO_PARENT, count - 1, dtype=np.int32),
            sequence_starts=np.array([0, count], dtype=np.int32),
            context_lengths=np.array([start], dtype=np.int32),
            block_tables=self.tables[index : index + 1],
            needs_logits=np.zeros(count, dtype=np.bool_),
        )
        self.executor.run(batch)
        self.lengths[index] += count


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_greedy_tokens_are_the_oracles_but_for_close_calls() -> None:
    """Along the oracle's own path: what differs anywhere, differs where its top two are close."""
    opened = open_model(PACKAGED_MODEL)
    tokenizer = Tokenizer.of(served_model(PACKAGED_MODEL, None, None))
    prompts = [prompt_token_ids(tokenizer, length, index) for index, length in enumerate(LENGTHS)]
    recipe = recipe_for(opened, load_machine("cpu"), 2, "float16")
    artifact = ArtifactCache().find_or_build(recipe, opened.weights).artifact
    native = MegaKernelExecutor(artifact.load(), opened.fingerprint, NUM_BLOCKS, BLOCK)
    oracle = TorchExecutor(opened.weights, opened.fingerprint, NUM_BLOCKS, BLOCK, num_threads=2)
    ours, theirs = Sequences(native, prompts), Sequences(oracle, prompts)
    tokens = [prompt[-1] for prompt in prompts]
    margins: list[float] = []
    first_differences: dict[int, int] = {}
    largest_error = 0.0
    for number in range(NUM_TOKENS):
        expected, logits = theirs.step(tokens), ours.step(tokens)
        tokens = expected.argmax(axis=1).tolist()
        largest_error = max(largest_error, float(np.abs(logits - expected).max()))
        for index in np.flatnonzero(logits.argmax(axis=1) != np.array(tokens)).tolist():
            second, first = np.sort(expected[index])[-2:]
            margins.append(float(first - second))
            first_differences.setdefault(index, number)
    native.close()
    oracle.close()
    total = NUM_TOKENS * len(prompts)
    print(
        f"{len(margins)} of {total} tokens differ; {len(first_differences)} of {len(prompts)} prompts, first"
    )
    print(f"at {sorted(first_differences.values())}; margins {np.round(sorted(margins), 3).tolist()}")
    print(f"largest difference of a logit {largest_error:.3f}")
    assert max(margins, default=0.0) < CLOSE_CALL
