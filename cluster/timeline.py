"""Stamps of one request's stages: every latency figure is a subtraction of two of them."""

import time
from enum import StrEnum


class Stage(StrEnum):
    RECEIVED = "received"  # router: request body complete
    VALIDATED = "validated"  # router: parsed and checked
    TOKENIZED = "tokenized"
    PLACED = "placed"
    DISPATCHED = "dispatched"  # router: command written towards the decode worker
    DECODE_RECEIVED = "decode_received"
    RESERVED = "reserved"  # decode: KV blocks held
    PREFILL_STARTED = "prefill_started"
    PREFILL_FINISHED = "prefill_finished"
    HANDOFF_COMMITTED = "handoff_committed"
    FIRST_STEP_STARTED = "first_step_started"
    FIRST_TOKEN = "first_token"  # decode: first token sampled  # noqa: S105
    FIRST_TOKEN_RELAYED = "first_token_relayed"  # router: first token received  # noqa: S105
    FINISHED = "finished"  # decode


class Timeline:
    """Nanoseconds since the Unix epoch by stage; a later stamp of the same stage is ignored."""

    __slots__ = ("stamps_ns",)

    def __init__(self, stamps_ns: dict[str, int] | None = None) -> None:
        self.stamps_ns: dict[str, int] = dict(stamps_ns or {})

    def stamp(self, stage: Stage) -> None:
        self.stamps_ns.setdefault(stage.value, time.time_ns())

    def merge(self, stamps_ns: dict[str, int]) -> None:
        for stage, at_ns in stamps_ns.items():
            self.stamps_ns.setdefault(stage, at_ns)

    def between_us(self, start: Stage, end: Stage) -> float | None:
        """Microseconds from one stage to another, or None where either was never reached."""
        start_ns, end_ns = self.stamps_ns.get(start.value), self.stamps_ns.get(end.value)
        if start_ns is None or end_ns is None:
            return None
        return (end_ns - start_ns) / 1_000
