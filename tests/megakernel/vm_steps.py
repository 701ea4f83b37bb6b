"""Sequences and steps for VM tests: tokens by position, over a pool of blocks in odd order."""

import msgspec
import numpy as np

from megakernel.vm import Vm, VmResult
from megakernel.vm_state import NO_PARENT, VmStep

BLOCK_SIZE = 4


class Sequence:
    """One sequence's block table over a shared pool, and what is committed of it."""

    def __init__(self, blocks) -> None:
        self.blocks = np.asarray(blocks, dtype=np.int64)
        self.num_tokens = 0

    def slot(self, position: int) -> int:
        return int(self.blocks[position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE

    def extend(self, vm: Vm, tokens, chunk: int, **options) -> list[VmResult]:
        """Commits the tokens as chains of rows; a result a chunk."""
        results = []
        for start in range(0, len(tokens), chunk):
            part = list(tokens[start : start + chunk])
            results.append(vm.run(step_of([Rows(self, part, chain(len(part)))]), **options))
            self.num_tokens += len(part)
        return results


class Rows(msgspec.Struct, frozen=True, eq=False):
    """Rows of a sequence after what is committed; row i lies in the slot of position committed + i."""

    sequence: Sequence
    tokens: list[int]
    parents: list[int]
    """Within these rows."""


def chain(length: int) -> list[int]:
    return [NO_PARENT, *range(length - 1)]


def step_of(groups: list[Rows]) -> VmStep:
    fields = {name: [] for name in ("token_ids", "positions", "slots", "parents", "sequences")}
    for number, group in enumerate(groups):
        first, committed = len(fields["token_ids"]), group.sequence.num_tokens
        positions: list[int] = []
        for row, parent in enumerate(group.parents):
            positions.append(committed if parent == NO_PARENT else positions[parent] + 1)
            fields["parents"].append(parent if parent == NO_PARENT else first + parent)
            fields["slots"].append(group.sequence.slot(committed + row))
        fields["token_ids"] += group.tokens
        fields["positions"] += positions
        fields["sequences"] += [number] * len(group.tokens)
    width = max(len(group.sequence.blocks) for group in groups)
    tables = np.full((len(groups), width), -1, dtype=np.int64)
    for number, group in enumerate(groups):
        tables[number, : len(group.sequence.blocks)] = group.sequence.blocks
    return VmStep(
        **{name: np.array(values, dtype=np.int64) for name, values in fields.items()},
        context_lengths=np.array([group.sequence.num_tokens for group in groups], dtype=np.int64),
        block_tables=tables,
    )
