"""What a router and the process that compiles an upload for it say to each other: JSON, a message a line."""

from typing import Literal

import msgspec


class CompileJob(msgspec.Struct, frozen=True, kw_only=True):
    upload: str
    """The file that the body is in."""
    upload_format: Literal["jsonl", "csv"]
    skip_bad: bool
    max_items: int
    folder: str
    """Of the store."""
    tenant: str
    name: str
    tokenizer_json: str
    end_token: int
    fingerprint: str


class LineFault(msgspec.Struct, frozen=True, kw_only=True):
    line: int
    message: str


class Progressed(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    phase: str
    done: int
    total: int | None


class Compiled(msgspec.Struct, frozen=True, kw_only=True, tag="compiled"):
    version: int
    num_items: int
    num_path_tokens: int
    num_nodes: int
    num_bytes: int
    num_faults: int
    faults: tuple[LineFault, ...]
    phase_ms: dict[str, float]


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """The upload is wrong; nothing of it is kept."""

    message: str
    num_faults: int
    faults: tuple[LineFault, ...]


class Busy(msgspec.Struct, frozen=True, kw_only=True, tag="busy"):
    """Another process compiles an upload of the name."""


class NoSpace(msgspec.Struct, frozen=True, kw_only=True, tag="no_space"):
    message: str


CompileMessage = Progressed | Compiled | Refused | Busy | NoSpace
