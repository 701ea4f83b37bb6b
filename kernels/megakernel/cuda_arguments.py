"""A step's kernel arguments as ctypes sees them: the twin of kernels/include/cuda/step.h."""

import ctypes
from enum import IntEnum, IntFlag

NO_INDEX = 0xFFFFFFFF
"""`kNoIndex`"""
EXTRA_COUNTERS = 64
"""Allocated past an artifact's own."""


class RowFlag(IntFlag):
    """Of row_flags."""

    WANTS_LOGITS = 1
    WANTS_REDUCTIONS = 2
    IS_RESTRICTED = 4


class FailureCode(IntEnum):
    NONE = 0
    COUNTER_WAIT = 1
    WEIGHTS_WAIT = 2
    PROGRESS_WAIT = 3
    REPORTING = 0xFFFFFFFF


class Failure(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint32)
        for name in ("code", "block", "warp", "instruction", "counter", "expected", "actual", "op")
    )


class StepArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "activations", "kv", "turns", "counters")),
        ("failure", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("token_ids", "positions", "slots", "context_lengths")),
        *((name, ctypes.c_void_p) for name in ("table_rows", "path_starts", "path_slots", "block_tables")),
        *((name, ctypes.c_void_p) for name in ("row_flags", "needed_spans")),
        *((name, ctypes.c_void_p) for name in ("allowed_starts", "allowed_token_ids")),
        *((name, ctypes.c_void_p) for name in ("logits", "stats", "values", "tokens", "allowed_logits")),
        ("num_slots", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("num_rows", "max_blocks", "block_size_tokens", "top_k")),
        ("epoch", ctypes.c_uint32),
        ("timeout_ns", ctypes.c_uint64),
    )
