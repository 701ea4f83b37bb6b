"""A compiled library as ctypes sees it: its structures and functions (kernels/include/cpu/engine.h)."""

import ctypes
from pathlib import Path
from typing import Any


class LibraryError(RuntimeError):
    """A compiled library that the system does not load; the message says why, and what helps."""


class StepInput(ctypes.Structure):
    """`StepInput` of step.h, with its `HeadInput` of head_rows.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("num_rows", "num_sequences", "max_blocks")),
        *((name, ctypes.c_void_p) for name in ("token_ids", "positions", "slots", "parents")),
        *((name, ctypes.c_void_p) for name in ("sequence_starts", "context_lengths", "block_tables")),
        *((name, ctypes.c_void_p) for name in ("held_starts", "held_slots")),
        *((name, ctypes.c_void_p) for name in ("needs_logits", "needs_best")),
        *((name, ctypes.c_void_p) for name in ("allowed_starts", "allowed_token_ids")),
        *((name, ctypes.c_void_p) for name in ("logits", "stats", "allowed_logits", "values", "tokens")),
        *((name, ctypes.c_int32) for name in ("top_k", "needs_log_sums")),
    )


class EngineConfig(ctypes.Structure):
    """`EngineConfig` of engine.h."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("frequencies", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("num_blocks", "block_size_tokens", "spins")),
        ("wait_limit_ns", ctypes.c_int64),
    )


def load_library(path: Path) -> Any:
    """Raises LibraryError."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryError(f"{error}: it was built for another system; compile the model here") from None
    pointer, i32 = ctypes.c_void_p, ctypes.c_int32
    library.headrace_open.restype = pointer
    library.headrace_activations.restype = pointer
    library.headrace_close.restype = None
    for name, arguments in {
        "run": (pointer, pointer, pointer),
        "copy_slots": (pointer, pointer, pointer, i32),
        "write_kv": (pointer, i32, pointer, i32, pointer),
        "read_kv": (pointer, i32, pointer, i32, pointer),
        "error": (pointer,),
    }.items():
        function = getattr(library, f"headrace_{name}")
        function.argtypes, function.restype = arguments, ctypes.c_char_p
    for name in ("activations", "close"):
        getattr(library, f"headrace_{name}").argtypes = (pointer,)
    library.headrace_open.argtypes = (pointer,)
    return library
