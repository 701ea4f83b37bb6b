"""A step's kernel arguments as ctypes sees them: the twin of kernels/include/cuda/step.h."""

import ctypes
from enum import IntEnum, IntFlag
from typing import Any

NO_INDEX = 0xFFFFFFFF
"""`kNoIndex`"""
LAST_STEP = 0x80000000
"""`kLastStep`"""
EXTRA_COUNTERS = 64
"""Allocated past an artifact's own."""

TRACE_ROLES, TRACE_EVENTS = 2, 8
"""Consumers and loader; `kTraceEvents`."""


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
    STEP_WAIT = 4
    REPORTING = 0xFFFFFFFF


class Failure(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint32)
        for name in ("code", "block", "warp", "instruction", "counter", "expected", "actual", "step")
    )


class MultiStepArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("remaining", "chain_lengths", "draft_states")),
        *((name, ctypes.c_void_p) for name in ("stop_starts", "stop_token_ids")),
        *((name, ctypes.c_void_p) for name in ("keys", "next_states", "fallbacks")),
        *((name, ctypes.c_void_p) for name in ("best_tokens", "best_states")),
        *((name, ctypes.c_void_p) for name in ("ring", "told", "allowed", "results", "begun")),
        ("key_mask", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("num_steps", "num_sequences", "rows_a_sequence")),
        ("first_unused_slot", ctypes.c_int32),
    )


class StepArguments(ctypes.Structure):
    """`run.num_steps` is 1 unless somebody says otherwise."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "activations", "kv", "turns", "counters")),
        ("failure", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("token_ids", "positions", "slots", "context_lengths")),
        *((name, ctypes.c_void_p) for name in ("path_slots", "path_starts", "table_rows", "block_tables")),
        *((name, ctypes.c_void_p) for name in ("row_flags", "needed_spans")),
        *((name, ctypes.c_void_p) for name in ("allowed_starts", "allowed_token_ids")),
        *((name, ctypes.c_void_p) for name in ("logits", "stats", "values", "tokens", "allowed_logits")),
        ("num_slots", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("num_rows", "max_blocks", "block_size_tokens", "top_k")),
        ("epoch", ctypes.c_uint32),
        ("timeout_ns", ctypes.c_uint64),
        ("run", MultiStepArguments),
        ("trace", ctypes.c_void_p),
        ("trace_instructions", ctypes.c_uint32),
    )

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.run.num_steps = 1
