"""Runs of several steps over random KV, and what is left of them."""

import random
from collections.abc import Sequence

import msgspec
import numpy as np

from megakernel.draft_automaton import build_automaton
from megakernel.multi_step import HostRun, MultiStep, StepRun, StepTokens
from tests.megakernel.native_steps import BLOCK, int32, slot_of


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence of a run."""

    pending: int
    context: int
    table: list[int]
    max_new_tokens: int
    stop_tokens: tuple[int, ...] = ()


def run_of(asked: Sequence[Asked], num_steps: int, **options) -> MultiStep:
    tables = np.full((len(asked), max(len(one.table) for one in asked)), -1, dtype=np.int32)
    for index, one in enumerate(asked):
        tables[index, : len(one.table)] = one.table
    return MultiStep(
        num_steps=num_steps,
        token_ids=int32([one.pending for one in asked]),
        context_lengths=int32([one.context for one in asked]),
        block_tables=tables,
        max_new_tokens=int32([one.max_new_tokens for one in asked]),
        stop_starts=int32(np.cumsum([0, *(len(one.stop_tokens) for one in asked)])),
        stop_token_ids=int32([token for one in asked for token in one.stop_tokens]),
        **options,
    )


def with_drafts(run: MultiStep, texts: Sequence[Sequence[int]], most: int) -> MultiStep:
    """Drafts from `texts`, whose states follow the pending tokens alone."""
    drafts = build_automaton(texts)
    states = int32([drafts.follow(0, token) for token in run.token_ids.tolist()])
    return msgspec.structs.replace(run, drafts=drafts, max_draft_tokens=most, draft_states=states)


def draw_asked(rng: random.Random, num_sequences: int, *, vocab_size: int, num_blocks: int) -> list[Asked]:
    """Each in blocks of its own, two at most."""
    blocks = rng.sample(range(num_blocks), 2 * num_sequences)
    return [
        Asked(
            pending=rng.randrange(vocab_size),
            context=rng.choice((0, rng.randrange(1, BLOCK), BLOCK - 1, rng.randrange(BLOCK, 2 * BLOCK - 12))),
            table=blocks[2 * index : 2 * index + 2],
            max_new_tokens=rng.randrange(1, 12),
        )
        for index in range(num_sequences)
    ]


def fill_kv(runtime, asked: Sequence[Asked], seed: int) -> None:
    rng, shape = np.random.default_rng(seed), runtime.shape
    for one in asked:
        slots = int32([slot_of(one.table, position) for position in range(one.context)])
        for layer in range(shape.num_layers):
            values = rng.standard_normal((2, one.context, shape.num_kv_heads, shape.head_dim))
            runtime.write_kv(layer, slots, values.astype(np.float16).tobytes())


def all_steps(run: StepRun) -> list[StepTokens]:
    steps = []
    while (step := run.next()) is not None:
        steps.append(step)
    return steps


def by_host(runtime, run: MultiStep) -> list[StepTokens]:
    return all_steps(HostRun(runtime.step, run, BLOCK))


def emitted(run: MultiStep, steps: Sequence[StepTokens]) -> list[list[int]]:
    """Each sequence's tokens, all steps together."""
    return [
        [token for step in steps for token in step.tokens_of(index)] for index in range(run.num_sequences)
    ]


def mistaken(rng: random.Random, text: Sequence[int], vocab_size: int, how_often: float = 0.2) -> list[int]:
    return [rng.randrange(vocab_size) if rng.random() < how_often else token for token in text]


def kv_of(runtime, asked: Sequence[Asked], lengths: Sequence[int]) -> list[bytes]:
    """Of each sequence's committed tokens, by layer."""
    return [
        bytes(runtime.read_kv(layer, int32([slot_of(one.table, at) for at in range(length)])))
        for one, length in zip(asked, lengths, strict=True)
        for layer in range(runtime.shape.num_layers)
    ]
