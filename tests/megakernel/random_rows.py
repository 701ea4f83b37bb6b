"""Random steps: sequences of chains and trees after contexts of any length, and what their rows ask."""

import random

import msgspec
import numpy as np

from megakernel.model.shape import ModelShape
from megakernel.step import Rows
from megakernel.vm_state import NO_PARENT
from tests.megakernel.native_steps import BLOCK, Group, chain, int32, rows_of

MAX_CONTEXT_TOKENS = 400
ATTENDED = (8_000, 8_000, 80_000)
"""Committed tokens that all rows and heads of a step attend to, about and at most: what emulation takes long
for."""
ASKS = ("best", "best", "mixed", "mixed", "restricted", "logits", "nothing")
"""What a step's rows ask of the head."""


def draw_rows(rng: random.Random, shape: ModelShape, bucket: int, ask: str) -> tuple[Rows, int]:
    """Sequences in odd blocks of a pool, and the pool's size in blocks."""
    num_rows = rng.choice((bucket, bucket, rng.randint(1, bucket)))
    lengths = _parts(rng, num_rows)
    most = rng.choice(ATTENDED) // shape.num_heads // num_rows
    contexts = [min(most, _context(rng, length)) for length in lengths]
    sizes = [-(-(context + length) // BLOCK) for context, length in zip(contexts, lengths, strict=True)]
    num_blocks = sum(sizes) + rng.randint(0, 3)
    blocks = iter(rng.sample(range(num_blocks), num_blocks))
    groups = [
        Group(
            tokens=[rng.randrange(shape.vocab_size) for _ in range(length)],
            parents=_parents(rng, length),
            context=context,
            table=[next(blocks) for _ in range(size)],
        )
        for length, context, size in zip(lengths, contexts, sizes, strict=True)
    ]
    return _asking(rng, rows_of(*groups), shape.vocab_size, ask), num_blocks


def _parts(rng: random.Random, num_rows: int) -> list[int]:
    """Rows of each sequence: of one, of a few, or of as many as there are rows."""
    kind = rng.choice(("one", "few", "few", "rows"))
    if kind == "one":
        return [num_rows]
    if kind == "rows":
        return [1] * num_rows
    cuts = sorted(rng.sample(range(1, num_rows), min(rng.randint(1, 4), num_rows - 1)))
    return [end - start for start, end in zip([0, *cuts], [*cuts, num_rows], strict=True)]


def _context(rng: random.Random, length: int) -> int:
    """Committed tokens: none, few, about where a split of 128 ends, or many."""
    of_any = rng.randrange(MAX_CONTEXT_TOKENS - length)
    near = rng.choice((128, 256)) - rng.randint(-2, 2 + length)
    return rng.choice((0, rng.randint(1, 40), rng.randint(1, 40), max(0, near), max(0, near), of_any))


def _parents(rng: random.Random, length: int) -> list[int]:
    """A chain, or a tree of which some rows are children of what is committed."""
    if rng.random() < 0.5:
        return chain(length)
    return [NO_PARENT, *(rng.choice((NO_PARENT, row, rng.randrange(row + 1))) for row in range(length - 1))]


def _asking(rng: random.Random, rows: Rows, vocab_size: int, ask: str) -> Rows:
    num_rows = len(rows.token_ids)
    asks = [rng.choice(("best", "restricted", "both", "logits", "nothing")) for _ in range(num_rows)]
    asks = asks if ask == "mixed" else [ask] * num_rows
    allowed = [
        sorted(rng.sample(range(vocab_size), rng.choice((1, 2, 3, rng.randint(1, 40)))))
        if each in ("restricted", "both")
        else []
        for each in asks
    ]
    needs_logits = np.array([each in ("restricted", "logits") for each in asks], dtype=np.bool_)
    needs_best = np.array([each in ("best", "both") for each in asks], dtype=np.bool_)
    of_logit_rows = [tokens for tokens, each in zip(allowed, asks, strict=True) if each != "nothing"]
    return msgspec.structs.replace(
        rows,
        needs_logits=needs_logits,
        needs_best=needs_best,
        needs_log_sums=True,
        top_k=rng.choice((0, 1, 5, 64 if num_rows <= 4 else 7)),
        allowed_starts=int32(np.cumsum([0, *map(len, of_logit_rows)])),
        allowed_token_ids=int32([token for tokens in of_logit_rows for token in tokens]),
    )
