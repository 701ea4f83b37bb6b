import socket

import pytest

from cluster.config import config_from_mapping
from headrace.ports import (
    PortTakenError,
    check_free,
    free_ports,
    internal_ports,
    is_free,
    with_concrete_ports,
)


def config(http_port, grpc_port, host="127.0.0.1"):
    return config_from_mapping({"router": {"host": host, "http_port": http_port, "grpc_port": grpc_port}})


@pytest.fixture
def taken_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        yield listener.getsockname()[1]


def test_a_taken_port_is_named_with_its_holder_and_the_option(taken_port):
    http_port, _ = free_ports(2)
    with pytest.raises(PortTakenError, match=rf"port {taken_port} is in use by .*pid.*--grpc-port"):
        check_free(config(http_port, taken_port))
    with pytest.raises(PortTakenError, match="--http-port"):
        check_free(config(taken_port, http_port))
    assert not is_free("0.0.0.0", taken_port)


def test_free_ports_pass():
    check_free(config(*free_ports(2)))
    check_free(config(0, 0))


def test_the_two_ports_must_differ():
    (port,) = free_ports(1)
    with pytest.raises(PortTakenError, match="must differ"):
        check_free(config(port, port))


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7"])
def test_a_host_that_is_not_ours_is_named(host):
    with pytest.raises(PortTakenError, match=host):
        check_free(config(0, 0, host))


def test_zero_becomes_a_port():
    concrete = with_concrete_ports(config(0, 0)).router
    assert concrete.http_port != concrete.grpc_port
    assert min(concrete.http_port, concrete.grpc_port) > 1024
    assert with_concrete_ports(config(8123, 0)).router.http_port == 8123
    assert with_concrete_ports(config(8123, 8124)) == config(8123, 8124)


def test_internal_ports_are_distinct():
    ports = internal_ports()
    singles = {ports.haproxy_metrics, ports.haproxy_stats, ports.fallback_http, ports.fallback_grpc}
    replicas = set(range(ports.first_replica, ports.last_replica + 1))
    assert len(singles) == 4
    assert len(replicas) >= 16
    assert not singles & replicas
