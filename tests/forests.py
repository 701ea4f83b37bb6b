"""Random trees behind committed contexts, and the steps that run them whole or in parts, as rows."""

import random
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

NO_PARENT = -1


class Forest(msgspec.Struct, frozen=True, kw_only=True):
    """A tree a sequence; nodes are numbered over all of them, sequence by sequence, parents first."""

    block_size: int
    prompts: list[list[int]]
    """[sequences] committed tokens."""
    tables: list[list[int]]
    """[sequences] block ids, of more tokens than are committed."""
    sequences: list[int]
    """[nodes]"""
    parents: list[int]
    """[nodes] a node's number, or NO_PARENT."""
    tokens: list[int]

    @property
    def num_nodes(self) -> int:
        return len(self.tokens)

    def path(self, node: int) -> list[int]:
        """Ancestors, the root first, and the node."""
        path = [node]
        while self.parents[path[-1]] != NO_PARENT:
            path.append(self.parents[path[-1]])
        return path[::-1]

    def slot(self, sequence: int, position: int) -> int:
        """Where the block table has a position."""
        table, size = self.tables[sequence], self.block_size
        return table[position // size] * size + position % size

    def committed_slots(self) -> list[int]:
        return [self.slot(s, at) for s, prompt in enumerate(self.prompts) for at in range(len(prompt))]

    def slots_in_order(self) -> list[int]:
        """[nodes] where each tree's nodes lie behind its context, one after the other."""
        firsts = [self.sequences.index(sequence) for sequence in range(len(self.prompts))]
        return [
            self.slot(sequence, len(self.prompts[sequence]) + node - firsts[sequence])
            for node, sequence in enumerate(self.sequences)
        ]

    def scattered_slots(self, rng: random.Random, num_slots: int) -> list[int]:
        """[nodes] anywhere that no committed token is."""
        free = sorted(set(range(num_slots)) - set(self.committed_slots()))
        return rng.sample(free, self.num_nodes)

    def levels(self) -> list[list[int]]:
        depths = [len(self.path(node)) for node in range(self.num_nodes)]
        return [
            [n for n in range(self.num_nodes) if depths[n] == depth] for depth in range(1, max(depths) + 1)
        ]

    def random_chunks(self, rng: random.Random, most: int) -> list[list[int]]:
        """Parts in an order in which each parent is run with its children or before; `most` nodes a part."""
        left, chunks = list(range(self.num_nodes)), []
        done: set[int] = {NO_PARENT}
        while left:
            chunk: list[int] = []
            size = rng.randint(1, most)
            while len(chunk) < size and (ready := [n for n in left if self.parents[n] in done]):
                chunk.append(rng.choice(ready))
                left.remove(chunk[-1])
                done.add(chunk[-1])
            chunks.append(sorted(chunk))
        return chunks

    def fields(self, nodes: Sequence[int], slots: Sequence[int]) -> dict[str, Any]:
        """The rows of `nodes`, ascending, as StepBatch and Rows name them. Ancestors that are not among them
        are held. `slots` are those of all nodes."""
        row_of = {node: row for row, node in enumerate(nodes)}
        sequences = sorted({self.sequences[node] for node in nodes})
        counts = [sum(self.sequences[node] == sequence for node in nodes) for sequence in sequences]
        parents = [row_of.get(self.parents[node], NO_PARENT) for node in nodes]
        held = [
            [slots[ancestor] for ancestor in self.path(node)[:-1]] if parent == NO_PARENT else []
            for node, parent in zip(nodes, parents, strict=True)
        ]
        contexts = [len(self.prompts[sequence]) for sequence in sequences]
        return {
            "token_ids": int32([self.tokens[node] for node in nodes]),
            "positions": int32(
                [len(self.prompts[self.sequences[node]]) + len(self.path(node)) - 1 for node in nodes]
            ),
            "slots": int32([slots[node] for node in nodes]),
            "parents": int32(parents),
            "sequence_starts": int32(np.cumsum([0, *counts])),
            "context_lengths": int32(contexts),
            "block_tables": int32([self.tables[sequence] for sequence in sequences]),
            "needs_logits": np.ones(len(nodes), dtype=np.bool_),
            "held_starts": int32(np.cumsum([0, *map(len, held)])) if any(held) else None,
            "held_slots": int32([slot for each in held for slot in each]) if any(held) else None,
        }


def draw_forest(
    rng: random.Random,
    *,
    vocab_size: int,
    block_size: int,
    num_blocks: int,
    most_nodes: int,
    contexts: Sequence[int],
) -> Forest:
    """Of one sequence or of a few; `contexts` are the numbers of committed tokens to choose from."""
    num_sequences = rng.randint(1, min(3, most_nodes))
    cuts = sorted(rng.sample(range(1, most_nodes), num_sequences - 1))
    counts = [end - start for start, end in zip([0, *cuts], [*cuts, most_nodes], strict=True)]
    blocks = rng.sample(range(num_blocks), num_blocks)
    prompts, tables, sequences, parents = [], [], [], []
    for sequence, count in enumerate(counts):
        prompts.append([rng.randrange(vocab_size) for _ in range(rng.choice(contexts))])
        size = -(-(max(contexts) + most_nodes) // block_size)
        tables.append([blocks.pop() for _ in range(size)])
        first, reach = len(parents), rng.choice((1, 3, count))
        for node in range(count):
            is_root = node == 0 or rng.random() < 0.1
            parents.append(NO_PARENT if is_root else first + rng.randint(max(0, node - reach), node - 1))
            sequences.append(sequence)
    return Forest(
        block_size=block_size,
        prompts=prompts,
        tables=tables,
        sequences=sequences,
        parents=parents,
        tokens=[rng.randrange(vocab_size) for _ in parents],
    )


def int32(values: Any) -> np.ndarray:
    return np.array(values, dtype=np.int32)
