"""The compiled megakernel as `benchmarks/decode.py` drives it: decode steps over a context, and prompts."""

from typing import NamedTuple

import numpy as np

from cluster.ids import RequestId
from decode_workers.megakernel_executor import MegaKernelExecutor
from decode_workers.step_batch import NO_PARENT, Int32Array, StepBatch
from megakernel.artifact_cache import ArtifactCache
from megakernel.artifact_folder import Artifact
from megakernel.machine import load_machine
from megakernel.model.gguf import GgufWeights
from megakernel.model.load import open_model
from megakernel.recipe import recipe_for
from megakernel.runtime import Runtime
from prefill_workers.engine import PrefillJob
from prefill_workers.megakernel_engine import MegaKernelPrefillEngine

BLOCK_TOKENS = 32
CHUNK_TOKENS = 256
"""Rows of a prefill step."""


class Cell(NamedTuple):
    """Rows of one step, each of a sequence of its own, after `context` tokens."""

    rows: int
    context: int


class OurModel:
    """The packaged or given model, compiled for this CPU."""

    def __init__(self, model: str, threads: int) -> None:
        opened = open_model(model)
        self.weights = opened.weights
        self.fingerprint = opened.fingerprint
        recipe = recipe_for(opened, load_machine("cpu"), threads, "float16")
        self.artifact: Artifact = ArtifactCache().find_or_build(recipe, opened.weights).artifact

    def streamed_bytes(self) -> int:
        """Of weights, read once a step, as the file stores them."""
        assert isinstance(self.weights, GgufWeights)
        skipped = set() if self.weights.shape.has_tied_head else {"embed"}
        tensors = [self.weights.raw(name) for name in self.weights.names - skipped]
        return sum(tensor.data.nbytes for tensor in tensors if len(tensor.shape) > 1)


class OurDecode:
    """Steps over one context that all sequences share but for their last block, as a prefix cache has it."""

    def __init__(self, model: OurModel, max_context: int, max_rows: int) -> None:
        vocab_size = model.weights.shape.vocab_size
        self.context_blocks = -(-max_context // BLOCK_TOKENS)
        self.executor = MegaKernelExecutor(
            model.artifact.load(), model.fingerprint, self.context_blocks + max_rows, BLOCK_TOKENS
        )
        self.tokens = np.random.default_rng(0).integers(0, vocab_size, max_context).astype(np.int32)
        self._fill()

    def prepare(self, cell: Cell) -> None:
        """What a sequence's own last block holds of the context, copied on write."""
        start = cell.context // BLOCK_TOKENS * BLOCK_TOKENS
        partial = np.arange(start, cell.context, dtype=np.int32)
        for row in range(cell.rows):
            self.executor.copy_slots(partial, self._own_slots(row, cell.context - start))

    def step(self, cell: Cell) -> None:
        self.executor.run(self._batch(cell))

    def close(self) -> None:
        self.executor.close()

    def _own_slots(self, row: int, count: int) -> Int32Array:
        first = (self.context_blocks + row) * BLOCK_TOKENS
        return np.arange(first, first + count, dtype=np.int32)

    def _fill(self) -> None:
        """The whole context, as chains of rows."""
        table = np.arange(self.context_blocks, dtype=np.int32)[None, :]
        for start in range(0, len(self.tokens), CHUNK_TOKENS):
            tokens = self.tokens[start : start + CHUNK_TOKENS]
            at = np.arange(start, start + len(tokens), dtype=np.int32)
            self.executor.run(
                StepBatch(
                    token_ids=tokens,
                    positions=at,
                    slots=at,
                    parents=np.arange(-1, len(tokens) - 1, dtype=np.int32),
                    sequence_starts=np.array([0, len(tokens)], dtype=np.int32),
                    context_lengths=np.array([start], dtype=np.int32),
                    block_tables=table,
                    needs_logits=np.zeros(len(tokens), dtype=np.bool_),
                )
            )

    def _batch(self, cell: Cell) -> StepBatch:
        rows, whole = cell.rows, cell.context // BLOCK_TOKENS
        tables = np.tile(np.arange(whole + 1, dtype=np.int32), (rows, 1))
        tables[:, whole] = self.context_blocks + np.arange(rows)
        return StepBatch(
            token_ids=self.tokens[:rows],
            positions=np.full(rows, cell.context, dtype=np.int32),
            slots=tables[:, whole] * np.int32(BLOCK_TOKENS) + np.int32(cell.context % BLOCK_TOKENS),
            parents=np.full(rows, NO_PARENT, dtype=np.int32),
            sequence_starts=np.arange(rows + 1, dtype=np.int32),
            context_lengths=np.full(rows, cell.context, dtype=np.int32),
            block_tables=tables,
            needs_logits=np.ones(rows, dtype=np.bool_),
        )


class OurPrefill:
    """The prefill worker's engine; what it exports goes nowhere."""

    def __init__(self, model: OurModel, max_tokens: int) -> None:
        num_blocks = -(-max_tokens // BLOCK_TOKENS)
        self.runtime = Runtime(model.artifact.load(), num_blocks, BLOCK_TOKENS)
        self.engine = MegaKernelPrefillEngine(
            self.runtime, model.fingerprint, num_blocks, BLOCK_TOKENS, CHUNK_TOKENS
        )

    def prompt(self, token_ids: Int32Array) -> None:
        """KV of all tokens; a prompt must be a new one, or the prefix cache has it."""
        request_id = RequestId("prompt")
        job = PrefillJob(
            request_id=request_id, token_ids=tuple(token_ids.tolist()), first_token=0, tenant="benchmark"
        )
        self.engine.admit(job, lambda _: None)
        while self.engine.has_work():
            self.engine.step()
        self.engine.release(request_id)

    def close(self) -> None:
        self.runtime.close()
