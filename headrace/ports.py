"""TCP ports: which are taken, and free ones for what the user never sees."""

import random
import socket

import msgspec

from cluster.config import HeadraceConfig
from headrace.processes import listener_of

_NUM_REPLICA_PORTS = 32
"""Serve hands each router replica an HTTP port of its own out of a range."""
_FROM, _TO = 21000, 31000
"""Below the range that kernels take the ports of outgoing connections from (32768 up)."""


class PortTakenError(Exception):
    """A port that was asked for cannot be had; the message names it, its holder and what to change."""


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


def _check_host(host: str) -> None:
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        with socket.socket(found[0][0], socket.SOCK_STREAM) as probe:
            probe.bind(found[0][4])
    except OSError as error:
        raise PortTakenError(
            f"`router.host` {host} is no address of this machine: {error.strerror}"
        ) from None


def check_free(config: HeadraceConfig) -> None:
    """Raises PortTakenError for the first of the cluster's two public ports that cannot be had."""
    router = config.router
    _check_host(router.host)
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


def free_ports(count: int) -> range:
    """Neighbouring ports that are free now; whoever is to use them should do so soon.

    Looked for from a random place on, so that two clusters starting at once do not find the same.
    Raises PortTakenError where there are none.
    """
    starts = range(_FROM, _TO - count, count)
    offset = random.randrange(len(starts))  # noqa: S311 - nothing secret about it
    for start in (*starts[offset:], *starts[:offset]):
        if all(is_free("0.0.0.0", port) for port in range(start, start + count)):  # noqa: S104
            return range(start, start + count)
    raise PortTakenError(f"no {count} neighbouring ports are free in {_FROM}..{_TO}")


def with_concrete_ports(config: HeadraceConfig) -> HeadraceConfig:
    """The same, with free ports in place of 0. Raises PortTakenError."""
    router = config.router
    if router.http_port and router.grpc_port:
        return config
    http_port, grpc_port = free_ports(2)
    router = msgspec.structs.replace(
        router, http_port=router.http_port or http_port, grpc_port=router.grpc_port or grpc_port
    )
    return msgspec.structs.replace(config, router=router)


def internal_ports() -> InternalPorts:
    """Raises PortTakenError."""
    haproxy_metrics, haproxy_stats, fallback_http, fallback_grpc, *replicas = free_ports(
        4 + _NUM_REPLICA_PORTS
    )
    return InternalPorts(
        haproxy_metrics=haproxy_metrics,
        haproxy_stats=haproxy_stats,
        fallback_http=fallback_http,
        fallback_grpc=fallback_grpc,
        first_replica=replicas[0],
        last_replica=replicas[-1],
    )
