"""Names for the things that cross a process boundary."""

import secrets
from typing import NewType

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)
HandoffId = NewType("HandoffId", str)
SessionId = NewType("SessionId", str)
ChainHash = NewType("ChainHash", bytes)
"""16 bytes: the hash of a KV block's tokens, chained on its parent's (see `block_hash`)."""
Epoch = NewType("Epoch", int)
"""A worker incarnation's number: the fencing token of its lease and of every hand-off to it."""


def new_request_id(prefix: str = "req") -> RequestId:
    return RequestId(f"{prefix}-{secrets.token_hex(12)}")


def new_handoff_id() -> HandoffId:
    return HandoffId(f"kv-{secrets.token_hex(12)}")


def new_worker_id(role: str) -> WorkerId:
    return WorkerId(f"{role}-{secrets.token_hex(6)}")
