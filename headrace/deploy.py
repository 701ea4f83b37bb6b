"""The Serve application `headrace`: Router (ingress), PrefillWorker, DecodeWorker, deployed together.

Serve owns their lifecycle, health and number. Requests go from the router to the workers by gRPC, to whom
Redis says is there; no token crosses a Serve handle.
"""

from typing import Any

import msgspec
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import DeploymentStatus, LoggingConfig

from cluster.config import HeadraceConfig
from cluster.model_card import ServedModel
from headrace.artifacts import Artifacts
from headrace.probe import NotServingError
from headrace.replicas import DecodeReplica, PrefillReplica, RouterReplica

APPLICATION = "headrace"
_ABOVE_OUR_BOUND = 4
"""Serve's own bounds on a router, over ours: the router answers an overload first, in the API's words."""
_HEALTH_PERIOD_S, _HEALTH_TIMEOUT_S = 2.0, 10.0
_STOP_TIMEOUT_S, _STOP_POLL_S = 8.0, 0.1
_LOGGING = LoggingConfig(enable_access_log=False, log_level="WARNING")


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be served, and what a machine gives for it."""

    config: HeadraceConfig
    """Resolved: see `sizing.resolve`."""
    served: ServedModel
    artifacts: Artifacts
    redis_url: str
    kv_bytes_per_token: int
    gpus_per_worker: float = 0.0
    worker_host: str = "127.0.0.1"
    """Where workers listen, and what routers call them by."""


def application(workload: Workload) -> serve.Application:
    config = workload.config
    common = (config, workload.served, workload.redis_url)
    gpus = workload.gpus_per_worker
    decode, prefill, artifacts = config.decode, config.prefill, workload.artifacts
    roles: list[tuple[type, str, int, float, str | None]] = [
        (DecodeReplica, "DecodeWorker", decode.num_replicas, gpus, artifacts.decode)
    ]
    if prefill.num_replicas:
        prefill_gpus = gpus * prefill.tensor_parallel_size
        roles.append((PrefillReplica, "PrefillWorker", prefill.num_replicas, prefill_gpus, artifacts.prefill))
    workers = [
        _deployment(replica, name, num_replicas, num_gpus).bind(*common, workload.worker_host, artifact)
        for replica, name, num_replicas, num_gpus, artifact in roles
    ]
    bound = _ABOVE_OUR_BOUND * config.router.max_inflight_requests
    router = _deployment(serve.ingress()(RouterReplica), "Router", config.router.num_replicas)
    # The router calls no handle: binding them makes one application of all.
    return router.options(max_ongoing_requests=bound, max_queued_requests=bound).bind(
        *common, workload.kv_bytes_per_token, *workers
    )


def _deployment(replica: Any, name: str, num_replicas: int, num_gpus: float = 0.0) -> Any:
    return serve.deployment(
        replica,
        name=name,
        num_replicas=num_replicas,
        # Threads are the configuration's affair: a reservation would only keep small machines from starting.
        ray_actor_options={"num_cpus": 0, "num_gpus": num_gpus},
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=_STOP_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=_STOP_POLL_S,
        max_constructor_retry_count=1,
        logging_config=_LOGGING,
    )


def deploy(workload: Workload) -> None:
    """On the Ray that this process is connected to; returns when every replica has started.

    Raises NotServingError with the replica's own error where one does not.
    """
    serve.start(
        http_options=HTTPOptions(
            host=workload.config.router.host,
            port=workload.config.router.http_port,
            location=ProxyLocation.HeadOnly,
        ),
        logging_config=_LOGGING,
    )
    try:
        serve.run(application(workload), name=APPLICATION)
    except RuntimeError as error:
        raise NotServingError(f"{error}\n{_complaints()}") from None


def _complaints() -> str:
    """What the deployments that are not well say of themselves."""
    deployments = serve.status().applications[APPLICATION].deployments
    return "\n".join(
        f"{name}: {deployment.message}"
        for name, deployment in deployments.items()
        if deployment.status != DeploymentStatus.HEALTHY and deployment.message
    )
