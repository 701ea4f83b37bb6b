import os
import resource
from importlib.util import find_spec
from pathlib import Path

import pytest

from headrace import environment
from headrace.ports import InternalPorts

PORTS = InternalPorts(
    haproxy_metrics=1, haproxy_stats=2, fallback_http=3, fallback_grpc=4, first_replica=5, last_replica=6
)


@pytest.fixture(autouse=True)
def restored_environment():
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_every_path_and_port_is_this_clusters_own():
    serve = environment.serve_environment(Path("/run/one"), PORTS)
    paths = [value for name, value in serve.items() if name.endswith(("_LOC", "_PATH", "_BASE", "_FILE"))]
    assert len(paths) == 5
    assert all(path.startswith("/run/one/haproxy") for path in paths)
    ports = [value for name, value in serve.items() if name.endswith("_PORT")]
    assert sorted(ports) == ["1", "2", "3", "4", "5", "6"]


def test_every_variable_is_one_that_serve_reads():
    (folder,) = find_spec("ray").submodule_search_locations
    source = Path(folder, "serve", "_private", "constants.py").read_text()
    unknown = [name for name in environment.serve_environment(Path("/x"), PORTS) if f'"{name}"' not in source]
    assert unknown == []


def test_what_the_user_set_stands_but_for_paths_and_ports(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", "8404")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    environment.apply(Path("/run/one"), PORTS)
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert os.environ["KMP_BLOCKTIME"] == "0"
    assert os.environ["RAY_SERVE_HAPROXY_STATS_PORT"] == "2"
    assert "RAY_ADDRESS" not in os.environ


def test_two_clusters_do_not_share_a_token():
    name = "RAY_AUTH_TOKEN"
    assert environment.ray_environment()[name] != environment.ray_environment()[name]


@pytest.mark.parametrize(
    ("max_files", "expected"), [(resource.RLIM_INFINITY, 4096), (20000, 4096), (1024, 307)]
)
def test_haproxy_asks_for_no_more_descriptors_than_there_are(max_files, expected):
    assert environment._max_connections(max_files) == expected
    if max_files > 0:
        assert expected * 2.5 < max_files
