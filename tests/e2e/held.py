"""What a cluster holds for requests, as seen from outside: by its metrics, and by TensorRT-LLM's double."""

import json
from pathlib import Path

import psutil

from tests.e2e.failures import wait_until
from tests.e2e.local_cluster import LocalCluster

GAUGES = (
    "headrace_router_inflight_requests",
    "headrace_num_requests_running",
    "headrace_num_requests_waiting",
    "headrace_kv_cache_used_tokens",
    "headrace_handoffs_receiving",
    "headrace_prefill_requests_running",
    "headrace_prefill_requests_waiting",
    "headrace_prefill_requests_held",
    "headrace_prefill_kv_cache_used_tokens",
    "headrace_prefill_staging_used_bytes",
)


class DoubleLog:
    """What the doubles of a cluster wrote (`tests/trtllm_double/tensorrt_llm/monitor.py`)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def violations(self) -> list[str]:
        return [str(line["violation"]) for line in self._lines() if "violation" in line]

    def num_used_blocks(self) -> list[int]:
        """Of each double that runs, when nothing was left to run for it the last time."""
        last = {line["pid"]: line["num_used_blocks"] for line in self._lines() if "num_used_blocks" in line}
        return [int(str(used)) for pid, used in last.items() if psutil.pid_exists(int(str(pid)))]

    def _lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def wait_until_nothing_is_held(cluster: LocalCluster, log: DoubleLog) -> None:
    held: dict[str, float | None] = {}

    def is_nothing_held() -> bool:
        metrics = cluster.metrics()
        for name in GAUGES:
            held[name] = metrics.total(name) if metrics.select(name) else None
        return all(value == 0 for value in held.values())

    wait_until(is_nothing_held, lambda: f"held (None: nobody says): {held}")
    assert log.violations() == []
    assert log.num_used_blocks() == [0]
