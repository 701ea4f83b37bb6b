"""A small engine whose KV is a function of the tokens, so that every byte at the far end can be checked."""

import threading
from collections.abc import Callable

import numpy as np

from cluster.block_changes import BlockChanges
from cluster.ids import ChainHash, RequestId
from cluster.kv_layout import KvLayout
from cluster.transfer import KvChunk
from prefill_workers.engine import ExportChunk, Held, PrefillDone, PrefillJob

LAYOUT = KvLayout(
    model_fingerprint="kv-engine",
    num_layers=3,
    num_kv_heads=2,
    head_dim=4,
    dtype="float32",
    block_size_tokens=4,
)
VOCAB_SIZE = 1000


def expected_kv(token_ids: tuple[int, ...], layer: int, position: int) -> bytes:
    """K then V of one token in one layer: of the prefix's sum, so a wrong prefix shows too."""
    prefix = float(sum(token_ids[: position + 1]))
    elements = np.arange(LAYOUT.num_kv_heads * LAYOUT.head_dim, dtype=np.float32)
    k = prefix + layer * 0.5 + elements * 1000
    return np.stack([k, -k]).astype(np.float32).tobytes()


class _Job:
    def __init__(self, job: PrefillJob, export: ExportChunk, num_cached: int) -> None:
        self.job = job
        self.export = export
        self.num_cached = num_cached
        self.num_computed = 0
        self.is_finished = False


class KvEngine:
    """`PrefillEngine` that only counts blocks and caches whole prompts; steps can be made to wait or fail."""

    def __init__(self, total_kv_tokens: int = 256, tokens_per_step: int = 8) -> None:
        self.total_kv_tokens = total_kv_tokens
        self.tokens_per_step = tokens_per_step
        self.jobs: dict[RequestId, _Job] = {}
        self.admitted: list[tuple[int, ...]] = []
        """Token ids of every admitted job, in order."""
        self.before_step: Callable[[], None] = lambda: None
        self.before_admit: Callable[[], None] = lambda: None
        self.threads: set[int] = set()
        """Idents of the threads that drove the engine."""
        self._cached: set[tuple[str, tuple[int, ...]]] = set()

    @property
    def layout(self) -> KvLayout:
        return LAYOUT

    @property
    def index_block_tokens(self) -> int:
        return LAYOUT.block_size_tokens

    def drain_changes(self) -> BlockChanges:
        return BlockChanges()

    def all_hashes(self) -> list[ChainHash]:
        return []

    def close(self) -> None: ...

    @property
    def free_kv_tokens(self) -> int:
        held = sum(len(running.job.token_ids) for running in self.jobs.values())
        return self.total_kv_tokens - held

    @property
    def held(self) -> Held:
        return Held(num_jobs=len(self.jobs), staging_bytes=10 * len(self.jobs))

    @property
    def total_staging_bytes(self) -> int:
        return 1000

    def has_work(self) -> bool:
        return any(not running.is_finished for running in self.jobs.values())

    def can_admit(self, job: PrefillJob) -> bool:
        self.threads.add(threading.get_ident())
        return len(job.token_ids) <= self.free_kv_tokens

    def admit(self, job: PrefillJob, export: ExportChunk) -> None:
        self.before_admit()
        assert job.request_id not in self.jobs
        self.jobs[job.request_id] = _Job(job, export, self._num_cached(job))
        self.admitted.append(job.token_ids)

    def step(self) -> list[PrefillDone]:
        self.before_step()
        self.threads.add(threading.get_ident())
        running = next(job for job in self.jobs.values() if not job.is_finished)
        tokens = running.job.token_ids
        start = running.num_computed
        end = running.num_cached if start < running.num_cached else start + self.tokens_per_step
        running.num_computed = end = min(end, len(tokens))
        self._export(running, max(start, running.job.first_token), end)
        if end < len(tokens):
            return []
        running.is_finished = True
        self._cached.add((running.job.tenant, tokens))
        return [PrefillDone(request_id=running.job.request_id, cached_tokens=running.num_cached)]

    def release(self, request_id: RequestId) -> None:
        self.threads.add(threading.get_ident())
        self.jobs.pop(request_id, None)

    def _num_cached(self, job: PrefillJob) -> int:
        return max(
            (len(t) for tenant, t in self._cached if tenant == job.tenant and job.token_ids[: len(t)] == t),
            default=0,
        )

    def _export(self, running: _Job, start: int, end: int) -> None:
        if start >= end:
            return
        tokens = running.job.token_ids
        for layer in range(LAYOUT.num_layers):
            kv = [np.frombuffer(expected_kv(tokens, layer, i), dtype=np.float32) for i in range(start, end)]
            half = len(kv[0]) // 2
            data = np.stack([np.stack([each[:half] for each in kv]), np.stack([each[half:] for each in kv])])
            running.export(KvChunk(layer, start, end - start, memoryview(data).cast("B")))
