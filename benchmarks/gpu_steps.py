"""Steps of random tokens: sequences over a pool of KV blocks in odd order."""

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from benchmarks.gpu_memory import BLOCK_TOKENS
from megakernel.step import IntArray, Rows

NO_PARENT = -1


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of one sequence after its committed tokens; row i lies in the slot of position context + i."""

    context: int
    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    """Within the group; NO_PARENT: a child of the committed prefix."""
    blocks: tuple[int, ...]


def chain(length: int) -> tuple[int, ...]:
    return (NO_PARENT, *range(length - 1))


def num_blocks_of(context: int, rows: int = 1) -> int:
    return -(-(context + rows) // BLOCK_TOKENS)


class Pool:
    """Deals blocks in a random order."""

    def __init__(self, num_blocks: int, seed: int = 0) -> None:
        self._left = np.random.default_rng(seed).permutation(num_blocks).tolist()

    def take(self, count: int) -> tuple[int, ...]:
        assert count <= len(self._left), f"{count} blocks of {len(self._left)} that are left"
        taken, self._left = self._left[:count], self._left[count:]
        return tuple(taken)


def groups_of(
    parts: Sequence[tuple[int, Sequence[int]]], pool: Pool, vocab_size: int, seed: int = 0
) -> list[Group]:
    """`parts`: (context, parents) of each sequence."""
    rng = np.random.default_rng(seed)
    return [
        Group(
            context=context,
            tokens=tuple(rng.integers(0, vocab_size, len(parents)).tolist()),
            parents=tuple(parents),
            blocks=pool.take(num_blocks_of(context, len(parents))),
        )
        for context, parents in parts
    ]


def rows_of(
    groups: Sequence[Group],
    *,
    needs_logits: bool = True,
    needs_best: bool = True,
    top_k: int = 0,
    needs_log_sums: bool = False,
) -> Rows:
    positions: list[int] = []
    slots: list[int] = []
    parents: list[int] = []
    for group in groups:
        first = len(parents)
        for row, parent in enumerate(group.parents):
            positions.append(group.context if parent == NO_PARENT else positions[first + parent] + 1)
            slots.append(slot_of(group, group.context + row))
            parents.append(NO_PARENT if parent == NO_PARENT else first + parent)
    tables = np.full((len(groups), max(len(group.blocks) for group in groups)), -1, dtype=np.int32)
    for index, group in enumerate(groups):
        tables[index, : len(group.blocks)] = group.blocks
    num_rows = len(parents)
    return Rows(
        token_ids=_int32([token for group in groups for token in group.tokens]),
        positions=_int32(positions),
        slots=_int32(slots),
        parents=_int32(parents),
        sequence_starts=_int32(np.cumsum([0, *(len(group.tokens) for group in groups)])),
        context_lengths=_int32([group.context for group in groups]),
        block_tables=tables,
        needs_logits=np.full(num_rows, needs_logits),
        needs_best=np.full(num_rows, needs_best),
        top_k=top_k,
        needs_log_sums=needs_log_sums,
    )


def slot_of(group: Group, position: int) -> int:
    return group.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS


def key_slots(groups: Sequence[Group]) -> list[IntArray]:
    """Of each row the slots that it attends to: its prefix, its ancestors, itself."""
    found = []
    for group in groups:
        prefix = [slot_of(group, position) for position in range(group.context)]
        for row in range(len(group.tokens)):
            path, at = [], row
            while at != NO_PARENT:
                path.append(slot_of(group, group.context + at))
                at = group.parents[at]
            found.append(_int32([*prefix, *reversed(path)]))
    return found


def _int32(values: npt.ArrayLike) -> IntArray:
    return np.asarray(values, dtype=np.int32)
