"""What the schedule search decides: a plan turns a graph into a program."""

import msgspec

ROLES = ("embed", "qkv", "attention", "o", "gate_up", "down", "head")
"""The last part of an op's name; all layers share a role's plan."""


class OpPlan(msgspec.Struct, frozen=True, kw_only=True):
    tile_columns: int
    """Output columns of one instruction, a multiple of what the epilogue needs; for ATTENTION, KV heads."""
    num_k_tiles: int = 1
    """Above 1: K is split, and REDUCE instructions sum the parts."""
    load_k: int = 0
    """On a GPU, how much of K a load of a tile's weights covers, in 128s; 0: as `k_blocks.py` says."""
    input_k: int = 0
    """And how much of K is staged of the input at once, whole loads; 0 beside a `load_k`: all."""
    stages: int = 2
    """Weight tiles of this op in flight in a worker's scratch pages."""
    tile_workers: tuple[int, ...] | None = None
    """Worker of each instruction, K-tiles of a column tile adjacent. None: contiguous, equal runs."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    ops: dict[str, OpPlan]
    """By role."""
    prefetch_instructions: int = 1
    """How many instructions ahead of its own a worker may start to load an instruction's weights."""
