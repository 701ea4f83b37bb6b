"""Rows for steps that are only timed: plain decode of sequences that share one context."""

import numpy as np

from megakernel.model_runtime import ModelRuntime
from megakernel.step import Rows

BLOCK_TOKENS = 32
_NO_PARENT = -1


def num_blocks(num_rows: int, context_tokens: int) -> int:
    """Of a KV pool of blocks of BLOCK_TOKENS, for `decode_rows`."""
    return -(-context_tokens // BLOCK_TOKENS) + -(-num_rows // BLOCK_TOKENS)


def decode_rows(
    num_rows: int, context_tokens: int, *, first_block: int = 0, block_size_tokens: int = BLOCK_TOKENS
) -> Rows:
    """Sequences of one new row each, behind a context they share, in blocks from `first_block` on."""
    context_blocks = -(-context_tokens // block_size_tokens)
    first_slot = (first_block + context_blocks) * block_size_tokens
    table = np.arange(first_block, first_block + max(1, context_blocks), dtype=np.int32)
    return Rows(
        token_ids=np.zeros(num_rows, dtype=np.int32),
        positions=np.full(num_rows, context_tokens, dtype=np.int32),
        slots=np.arange(first_slot, first_slot + num_rows, dtype=np.int32),
        parents=np.full(num_rows, _NO_PARENT, dtype=np.int32),
        sequence_starts=np.arange(num_rows + 1, dtype=np.int32),
        context_lengths=np.full(num_rows, context_tokens, dtype=np.int32),
        block_tables=np.tile(table, (num_rows, 1)),
        needs_logits=np.ones(num_rows, dtype=np.bool_),
    )


def fill_context(runtime: ModelRuntime, context_tokens: int, first_slot: int = 0) -> None:
    """KV of a context for `decode_rows`: memory that nobody has written is one page of zeros, read from the
    cache, and steps over it look faster than they are."""
    shape = runtime.shape
    dtype = np.float16 if runtime.kv_format == "float16" else np.float32
    values = np.random.default_rng(0).standard_normal(
        (2, context_tokens, shape.num_kv_heads, shape.head_dim), dtype=np.float32
    )
    wire = values.astype(dtype).tobytes()
    slots = np.arange(first_slot, first_slot + context_tokens, dtype=np.int32)
    for layer in range(shape.num_layers):
        runtime.write_kv(layer, slots, wire)
