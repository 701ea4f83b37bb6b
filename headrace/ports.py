"""TCP ports: which are taken, and free ones for what the user never sees."""

import contextlib
import socket
from collections.abc import Iterator

import msgspec

from cluster.config import HeadraceConfig
from headrace.processes import listener_of

_NUM_REPLICA_PORTS = 32
"""Serve hands each router replica an HTTP port of its own out of a range."""
_REPLICA_PORTS_FROM, _REPLICA_PORTS_TO = 21000, 31000
"""Below the range that kernels take outgoing ports from (32768 up)."""


class PortTakenError(Exception):
    """A port that was asked for is in use; the message names it, its holder and what to change."""


class InternalPorts(msgspec.Struct, frozen=True, kw_only=True):
    """Ports between Serve's own parts."""

    haproxy_metrics: int
    haproxy_stats: int
    fallback_http: int
    fallback_grpc: int
    first_replica: int
    last_replica: int


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def check_free(config: HeadraceConfig) -> None:
    """Raises PortTakenError for the first of the cluster's two public ports that is taken."""
    router = config.router
    if router.http_port == router.grpc_port and router.http_port != 0:
        raise PortTakenError(f"--http-port and --grpc-port are both {router.http_port}; they must differ")
    for what, port in (("http-port", router.http_port), ("grpc-port", router.grpc_port)):
        if port == 0 or is_free(router.host, port):
            continue
        holder = listener_of(port)
        raise PortTakenError(
            f"port {port} is in use{f' by {holder}' if holder else ''}; stop that, or choose another "
            f"with --{what}"
        )


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Distinct ports that are free now; whoever is to use them should do so soon."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((host, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def with_concrete_ports(config: HeadraceConfig) -> HeadraceConfig:
    """The same, with free ports in place of 0."""
    router = config.router
    if router.http_port and router.grpc_port:
        return config
    http_port, grpc_port = free_ports(2, router.host)
    router = msgspec.structs.replace(
        router, http_port=router.http_port or http_port, grpc_port=router.grpc_port or grpc_port
    )
    return msgspec.structs.replace(config, router=router)


def _replica_ranges() -> Iterator[int]:
    yield from range(_REPLICA_PORTS_FROM, _REPLICA_PORTS_TO, _NUM_REPLICA_PORTS)


def internal_ports() -> InternalPorts:
    """Raises PortTakenError where no range for the router's replicas is free."""
    haproxy_metrics, haproxy_stats, fallback_http, fallback_grpc = free_ports(4)
    for first in _replica_ranges():
        if all(is_free("0.0.0.0", port) for port in range(first, first + _NUM_REPLICA_PORTS)):  # noqa: S104
            return InternalPorts(
                haproxy_metrics=haproxy_metrics,
                haproxy_stats=haproxy_stats,
                fallback_http=fallback_http,
                fallback_grpc=fallback_grpc,
                first_replica=first,
                last_replica=first + _NUM_REPLICA_PORTS - 1,
            )
    raise PortTakenError(
        f"no {_NUM_REPLICA_PORTS} neighbouring ports are free in {_REPLICA_PORTS_FROM}..{_REPLICA_PORTS_TO}"
    )
