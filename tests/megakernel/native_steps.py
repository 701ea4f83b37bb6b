"""Steps for the native runtime and the VM alike: sequences over a pool of blocks in odd order."""

import msgspec
import numpy as np

from megakernel.step import Rows
from megakernel.vm_state import NO_PARENT, VmStep

BLOCK = 16


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of a sequence after `context` committed tokens; row i lies in the slot of position context + i."""

    tokens: list[int]
    parents: list[int]
    context: int
    table: list[int]


def chain(length: int) -> list[int]:
    return [NO_PARENT, *range(length - 1)]


def slot_of(table: list[int], position: int) -> int:
    return table[position // BLOCK] * BLOCK + position % BLOCK


def rows_of(*groups: Group, needs_logits: list[bool] | None = None) -> Rows:
    positions, slots, parents = [], [], []
    for group in groups:
        first = len(parents)
        for row, parent in enumerate(group.parents):
            positions.append(group.context if parent == NO_PARENT else positions[first + parent] + 1)
            slots.append(slot_of(group.table, group.context + row))
            parents.append(parent if parent == NO_PARENT else first + parent)
    tables = np.full((len(groups), max(len(group.table) for group in groups)), -1, dtype=np.int32)
    for index, group in enumerate(groups):
        tables[index, : len(group.table)] = group.table
    starts = np.cumsum([0, *(len(group.tokens) for group in groups)])
    return Rows(
        token_ids=int32([token for group in groups for token in group.tokens]),
        positions=int32(positions),
        slots=int32(slots),
        parents=int32(parents),
        sequence_starts=int32(starts),
        context_lengths=int32([group.context for group in groups]),
        block_tables=tables,
        needs_logits=np.array(needs_logits or [True] * len(parents), dtype=np.bool_),
    )


def vm_step(rows: Rows) -> VmStep:
    """For the VM every row is a logit row: those that are none here have no allowed tokens there."""
    counts = np.diff(rows.sequence_starts)
    fields = ("token_ids", "positions", "slots", "parents", "context_lengths", "block_tables")
    return VmStep(
        sequences=np.repeat(np.arange(len(counts)), counts),
        **{name: getattr(rows, name).astype(np.int64) for name in fields},
        held_starts=rows.held_starts,
        held_slots=rows.held_slots,
        **_asked_of_head(rows),
    )


def _asked_of_head(rows: Rows) -> dict:
    asked = {"needs_best": rows.needs_best, "top_k": rows.top_k}
    if rows.allowed_starts is None:
        return asked
    needs_best = np.zeros_like(rows.needs_logits) if rows.needs_best is None else rows.needs_best
    counts = np.zeros(len(rows.token_ids), dtype=np.int64)
    counts[rows.needs_logits | needs_best] = np.diff(rows.allowed_starts)
    return asked | {
        "needs_best": needs_best,
        "allowed_starts": np.cumsum([0, *counts]),
        "allowed_token_ids": rows.allowed_token_ids.astype(np.int64),
    }


def int32(values) -> np.ndarray:
    return np.array(values, dtype=np.int32)
