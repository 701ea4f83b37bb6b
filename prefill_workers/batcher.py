"""Which queued prompt is computed next: earliest deadline first, then age. Pure; the engine's thread asks.

The head of the queue is never overtaken by a smaller prompt that would fit: under load the large
ones would wait for ever.
"""

from cluster.ids import HandoffId
from cluster.messages import Record
from prefill_workers.engine import PrefillJob

NO_DEADLINE_NS = 2**63


class QueueFullError(Exception):
    """As many prompts wait as may. Handled by the servicer: RESOURCE_EXHAUSTED."""


class QueuedJob(Record, frozen=True, kw_only=True):
    handoff_id: HandoffId
    job: PrefillJob
    deadline_unix_ns: int | None
    arrival_number: int
    """Rises with every job offered: age, without a clock."""


def urgency(queued: QueuedJob) -> tuple[int, int]:
    """Sort key: smaller goes first."""
    deadline_ns = NO_DEADLINE_NS if queued.deadline_unix_ns is None else queued.deadline_unix_ns
    return deadline_ns, queued.arrival_number


class PrefillQueue:
    """A bounded queue by urgency. Not thread-safe: its owner's lock guards it."""

    def __init__(self, max_jobs: int) -> None:
        self._max_jobs = max_jobs
        self._jobs: dict[HandoffId, QueuedJob] = {}
        self._num_offered = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, handoff_id: HandoffId) -> bool:
        return handoff_id in self._jobs

    @property
    def num_tokens(self) -> int:
        return sum(len(queued.job.token_ids) for queued in self._jobs.values())

    def offer(self, handoff_id: HandoffId, job: PrefillJob, deadline_unix_ns: int | None) -> QueuedJob:
        """Raises QueueFullError. Ids must differ."""
        assert handoff_id not in self._jobs, handoff_id
        if len(self._jobs) >= self._max_jobs:
            raise QueueFullError(f"{self._max_jobs} prompts are waiting already")
        queued = QueuedJob(
            handoff_id=handoff_id,
            job=job,
            deadline_unix_ns=deadline_unix_ns,
            arrival_number=self._num_offered,
        )
        self._num_offered += 1
        self._jobs[handoff_id] = queued
        return queued

    def head(self) -> QueuedJob | None:
        return min(self._jobs.values(), key=urgency, default=None)

    def remove(self, handoff_id: HandoffId) -> bool:
        """Take a job out, to compute it or to drop it; whether it was there."""
        return self._jobs.pop(handoff_id, None) is not None
