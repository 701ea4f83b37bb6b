"""What `up` and `status` show of a running cluster."""

import asyncio
import time

import msgspec
from rich.table import Table

from cluster.config import PlacementConfig
from cluster.messages import WorkerRecord
from cluster.placement.redis_store import RedisPlacementStore, connect
from cluster.placement.store import PlacementUnavailableError
from headrace.probe import MetricsSnapshot
from headrace.run_folder import ClusterState

_STORE_TIMEOUT_S = 2.0


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Between two looks at the metrics, and the load at the second."""

    requests_per_s: float
    tokens_per_s: float
    running: int
    waiting: int
    kv_used: float
    """Fraction of the decode workers' KV slots."""

    def line(self) -> str:
        return f"{self.requests_per_s:.1f} requests/s · {self.tokens_per_s:.0f} tokens/s · {self.load()}"

    def load(self) -> str:
        return f"{self.running} running, {self.waiting} waiting · KV {self.kv_used:.0%}"


class Look(msgspec.Struct, frozen=True):
    """The metrics at one time."""

    at_s: float
    metrics: MetricsSnapshot


def rates(previous: Look | None, now: Look) -> Rates:
    """Without a previous look, the rates are 0."""

    def per_s(name: str) -> float:
        if previous is None or now.at_s <= previous.at_s:
            return 0.0
        gained = now.metrics.total(name) - previous.metrics.total(name)
        return max(0.0, gained) / (now.at_s - previous.at_s)  # a restarted router counts from 0

    total = now.metrics.total("headrace_kv_cache_total_tokens")
    return Rates(
        requests_per_s=per_s("headrace_requests_total"),
        tokens_per_s=per_s("headrace_generation_tokens_total"),
        running=int(now.metrics.total("headrace_num_requests_running")),
        waiting=int(now.metrics.total("headrace_num_requests_waiting")),
        kv_used=now.metrics.total("headrace_kv_cache_used_tokens") / total if total else 0.0,
    )


def registered_workers(redis_url: str, model: str) -> list[WorkerRecord]:
    """Workers whose lease is alive. Raises PlacementUnavailableError."""

    async def ask() -> list[WorkerRecord]:
        store = RedisPlacementStore(
            connect(redis_url),
            model,
            block_ttl_s=PlacementConfig().block_ttl_s,
            op_timeout_s=_STORE_TIMEOUT_S,
        )
        try:
            return await store.workers()
        finally:
            await store.close()

    return asyncio.run(ask())


def workers_of(state: ClusterState) -> list[WorkerRecord]:
    """Raises PlacementUnavailableError, also where the cluster has no Redis yet."""
    if state.redis_url is None:
        raise PlacementUnavailableError("Redis has not been started yet")
    return registered_workers(state.redis_url, state.model)


def workers_table(workers: list[WorkerRecord]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("WORKER", "ROLE", "ADDRESS", "STATE"):
        table.add_column(name)
    for name in ("RUNNING", "QUEUED", "KV USED", "KV TOKENS"):
        table.add_column(name, justify="right")
    for worker in sorted(workers, key=lambda worker: (worker.role, worker.address.worker_id)):
        status = worker.status
        used = 1 - status.free_kv_tokens / status.total_kv_tokens if status.total_kv_tokens else 0.0
        table.add_row(
            worker.address.worker_id,
            worker.role,
            worker.address.grpc_address,
            "accepting" if status.is_accepting else "draining",
            str(status.running_requests),
            str(status.queued_requests),
            f"{used:.0%}",
            f"{status.total_kv_tokens}",
        )
    return table


def uptime(state: ClusterState) -> str:
    seconds = int(time.time() - state.started_unix_s)
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s"
