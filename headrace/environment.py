"""The environment that the supervisor's processes inherit: how Ray, Serve, HAProxy and OpenMP behave here.

The one place that sets environment variables. Ray and Serve read theirs when imported: `apply` first.
"""

import os
import resource
import secrets
from pathlib import Path

from headrace.ports import InternalPorts

_MAX_CONNECTIONS = 4096
_NO_PRELOADED_WORKERS = {"RAY_enable_worker_prestart": "0", "RAY_prestart_worker_first_driver": "0"}
_SLEEPING_THREADS = {
    # A waiting thread of torch's pool sleeps: two workers share the cores, and a spinning one would
    # take them from the other.
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
    "GOMP_SPINCOUNT": "0",
}


def ray_environment() -> dict[str, str]:
    return {
        **_NO_PRELOADED_WORKERS,
        # Ours alone, and not a file in the user's home.
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # it would kill a worker for what another program took
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def serve_environment(folder: Path, ports: InternalPorts) -> dict[str, str]:
    """HAProxy in front and user code in the replica's own loop; every path and port this cluster's own."""
    haproxy = folder / "haproxy"
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{haproxy}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{haproxy}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": f"{haproxy}",
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{haproxy}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{haproxy}/metrics.sock",
        # The router has metrics of its own. HAProxy would write two log lines a request.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_LOG_TARGET": "127.0.0.1:514 sample 1:1000000",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.haproxy_metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.haproxy_stats),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.fallback_http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports.fallback_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports.first_replica),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports.last_replica),
        # A router that goes has nothing to wait for: HAProxy sends refused connections elsewhere.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "5",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_RISE": "1",
        "RAY_SERVE_HAPROXY_MAXCONN": str(_max_connections(resource.getrlimit(resource.RLIMIT_NOFILE)[1])),
    }


def _max_connections(max_files: int) -> int:
    """HAProxy holds up to two and a half descriptors a connection, and refuses to start without them."""
    if max_files == resource.RLIM_INFINITY:
        return _MAX_CONNECTIONS
    return max(64, min(_MAX_CONNECTIONS, (max_files - 256) * 2 // 5))


def apply(folder: Path, ports: InternalPorts) -> None:
    """What the user has set stands, but for the paths and ports, which belong to this cluster."""
    for name, value in {**ray_environment(), **_SLEEPING_THREADS}.items():
        os.environ.setdefault(name, value)
    os.environ.update(serve_environment(folder, ports))
    os.environ.pop("RAY_ADDRESS", None)  # an address of another cluster would be joined instead
