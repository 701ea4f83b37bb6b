"""What the supervisor says of itself while it starts and serves: one state file, written as things change."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.config import HeadraceConfig
from headrace.execution import summary
from headrace.prepare import Prepared
from headrace.run_folder import BuildProgress, ClusterState, Phase, RunFolder, boot_id

_PROGRESS_INTERVAL_S = 0.1


class StateReport:
    """Written by the supervisor's thread and by the one that compiles the model."""

    def __init__(self, folder: RunFolder, config: HeadraceConfig) -> None:
        self.redis_url = config.placement.redis_url
        self.prepared: Prepared | None = None
        self.phase_seconds: dict[str, float] = {}
        self._folder = folder
        self._config = config
        self._lock = threading.Lock()
        self._phase: Phase = "redis"
        self._progress: BuildProgress | None = None
        self._progress_shown_s = 0.0
        self._started_unix_s = time.time()

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        self.write(phase)
        started_s = time.monotonic()
        yield
        self.phase_seconds[phase] = round(time.monotonic() - started_s, 2)

    def write(self, phase: Phase) -> None:
        with self._lock:
            self._phase = phase
            self._folder.write_state(self.state)

    def show_progress(self, what: str, fraction: float) -> None:
        """A few times a second at most; the phase stays what it is."""
        now_s = time.monotonic()
        if now_s - self._progress_shown_s < _PROGRESS_INTERVAL_S:
            return
        self._progress_shown_s = now_s
        with self._lock:
            self._progress = BuildProgress(what, round(fraction, 3))
            self._folder.write_state(self.state)

    @property
    def state(self) -> ClusterState:
        prepared, model, router = self.prepared, self._config.model, self._config.router
        return ClusterState(
            pid=os.getpid(),
            boot_id=boot_id(),
            phase=self._phase,
            model=prepared.served.card.name if prepared else model.name or model.source,
            host=router.host,
            http_port=router.http_port,
            grpc_port=router.grpc_port,
            redis_url=self.redis_url,
            started_unix_s=self._started_unix_s,
            phase_seconds=self.phase_seconds,
            progress=None if prepared else self._progress,
            execution=summary(prepared.config) if prepared else "",
            note=prepared.note if prepared else "",
        )
