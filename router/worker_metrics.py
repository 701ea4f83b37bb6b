"""This router's metrics and every live worker's, as one exposition."""

import asyncio

import grpc.aio

from cluster.messages import WorkerRecord
from cluster.metrics import RouterMetrics, exposition
from cluster.wire import headrace_pb2 as pb
from cluster.wire.headrace_pb2_grpc import WorkerAdminStub
from router.channels import Channels
from router.decode_pool import Directory
from router.metrics_merge import ExpositionMerger, label_text

FETCH_TIMEOUT_S = 0.5
_UP = "headrace_worker_metrics_up"


async def cluster_exposition(metrics: RouterMetrics, directory: Directory, channels: Channels) -> str:
    """Workers that do not answer within FETCH_TIMEOUT_S are left out, and shown to be by a metric."""
    workers = directory.snapshot()
    texts = await asyncio.gather(*[_fetch(worker, channels) for worker in workers])
    merger = ExpositionMerger()
    merger.add(exposition(metrics.registry))
    up = [f"# HELP {_UP} Whether the worker answered for its metrics", f"# TYPE {_UP} gauge"]
    for worker, text in zip(workers, texts, strict=True):
        labels = {"worker": worker.address.worker_id, "role": worker.role}
        up.append(f"{_UP}{{{label_text(labels)}}} {0 if text is None else 1}.0")
        if text is not None:
            merger.add(text, labels)
    if workers:
        merger.add("\n".join(up))
    return merger.text()


async def _fetch(worker: WorkerRecord, channels: Channels) -> str | None:
    stub = WorkerAdminStub(channels.get(worker.address.grpc_address))
    try:
        response: pb.MetricsResponse = await stub.Metrics(pb.MetricsRequest(), timeout=FETCH_TIMEOUT_S)
    except (grpc.aio.AioRpcError, grpc.aio.UsageError):
        return None
    return response.text
