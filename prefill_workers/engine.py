"""The seam between a prefill worker and what computes KV."""

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from cluster.block_changes import BlockChanges
from cluster.ids import ChainHash, RequestId
from cluster.kv_layout import KvLayout
from cluster.transfer import KvChunk


class PrefillJob(msgspec.Struct, frozen=True, kw_only=True):
    """Compute KV of `token_ids`, export [first_token, len(token_ids))."""

    request_id: RequestId
    token_ids: tuple[int, ...]
    first_token: int
    tenant: str


class PrefillDone(msgspec.Struct, frozen=True, kw_only=True):
    request_id: RequestId
    cached_tokens: int


class PrefillFailed(msgspec.Struct, frozen=True, kw_only=True):
    """This job alone cannot be computed, or exported."""

    request_id: RequestId
    message: str


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What jobs keep an engine from using otherwise; none and 0 where nothing is under way."""

    num_jobs: int
    """Admitted, and still read by somebody: also behind `release`, while copies of an engine's ranks end."""
    staging_bytes: int = 0
    """Of the host memory that KV passes through on its way out."""


ExportChunk = Callable[[KvChunk], None]
"""Called from the engine's thread with each finished layer of each chunk of tokens, in order of
computation; the chunk's memory stays valid until the job is released."""


class PrefillEngine(Protocol):
    """Computes KV for several jobs at once. One thread drives it: every method is called from there,
    except `layout` and what tells of the prefix cache."""

    @property
    def layout(self) -> KvLayout: ...

    def can_admit(self, job: PrefillJob) -> bool:
        """Whether KV blocks for the whole job can be held now."""
        ...

    def admit(self, job: PrefillJob, export: ExportChunk) -> None:
        """Hold blocks and queue the job; exports what the prefix cache already has at the next step."""
        ...

    def step(self) -> Sequence[PrefillDone | PrefillFailed]:
        """Compute one chunk of tokens within the token budget, over admitted jobs, oldest first; which
        ended."""
        ...

    def release(self, request_id: RequestId) -> None:
        """Let go of a job's blocks (its full blocks stay in the prefix cache). Also cancels it."""
        ...

    def has_work(self) -> bool: ...

    @property
    def free_kv_tokens(self) -> int: ...

    @property
    def held(self) -> Held: ...

    @property
    def total_staging_bytes(self) -> int:
        """0: an engine without staging memory."""
        ...

    @property
    def index_block_tokens(self) -> int:
        """Of the blocks that `drain_changes` and `all_hashes` name."""
        ...

    def drain_changes(self) -> BlockChanges:
        """Full blocks that entered or left the prefix cache since the last call, for the placement index."""
        ...

    def all_hashes(self) -> Sequence[ChainHash]:
        """Of every cached full block."""
        ...

    def close(self) -> None:
        """End what it has beside this thread. Nothing is called behind it."""
        ...
