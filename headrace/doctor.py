"""Checks of the machine, each with the fix where it fails. Nothing is started and nothing changed."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal

import msgspec
import psutil
from packaging.requirements import Requirement

from cluster.config import HeadraceConfig
from cluster.placement.embedded import EmbeddedRedisError, find_redis_server
from cluster.transfer.nixl import INSTALL, has_rdma_device, installed_version
from headrace.artifacts import facts_of
from headrace.execution import ExecutionError, Obstacle, choose, summary
from headrace.ports import PortTakenError, check_free
from headrace.redis_check import RedisUnusableError, check_redis
from headrace.run_folder import RunFolder
from megakernel.manifest import ArtifactError
from megakernel.model.load import open_model
from megakernel.model.weights import ModelFormatError
from prefill_workers.trtllm_pins import load_pins

Verdict = Literal["ok", "note", "problem"]
"""`note`: something is missing that `up` does not need. `problem`: `up` would fail."""

_MIN_MEMORY_BYTES = 4 * 2**30
_MIN_SHM_BYTES = 128 * 2**20
_MIN_DISK_BYTES = 2**30
_COMMAND_TIMEOUT_S = 10
_CHECK_TIMEOUT_S = 120
"""For a TensorRT-LLM that is loaded from a disk."""
_SHM = "/dev/shm"  # noqa: S108 - asked about, not written to


class Check(msgspec.Struct, frozen=True):
    what: str
    verdict: Verdict
    found: str
    fix: str = ""


def run_checks(config: HeadraceConfig, folder: RunFolder) -> Iterator[Check]:
    """One at a time, so that they can be shown as they come."""
    checks: list[Callable[[], Iterable[Check]]] = [
        _system,
        _packages,
        lambda: _model(config),
        lambda: [_redis(config)],
        lambda: _ports(config, folder),
        lambda: [_memory(), _shared_memory(), _disk(folder)],
        _tools,
        lambda: [_gpu(), _tensorrt(config), _nixl(config)],
    ]
    for check in checks:
        yield from check()


def _system() -> Iterator[Check]:
    yield Check("Python", "ok", f"{platform.python_version()} at {sys.executable}")
    if not sys.platform.startswith("linux"):
        yield Check("system", "problem", sys.platform, "run it on Linux")


def _packages() -> Iterator[Check]:
    """The distribution's own requirements, without those of its extras."""
    try:
        requirements = [Requirement(text) for text in metadata.requires("headrace") or ()]
    except metadata.PackageNotFoundError:
        yield Check("headrace", "note", "not installed as a package", "`make up`, or pip install -e .")
        return
    wrong = []
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
        else:
            if not requirement.specifier.contains(version, prereleases=True):
                wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        yield Check("packages", "problem", "; ".join(wrong), "`make up` installs what the lock file says")
    else:
        main = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "ray", "grpcio"))
        yield Check("packages", "ok", main)


def _model(config: HeadraceConfig) -> Iterator[Check]:
    try:
        opened = open_model(config.model.source)
    except ModelFormatError as error:
        yield Check("model", "problem", str(error), "see the message; `--model` chooses another")
        return
    millions = opened.num_parameters / 1e6
    yield Check("model", "ok", f"{opened.name}, {millions:.0f}M parameters, {opened.quantization}")
    yield _execution(config, opened.fingerprint)


def _execution(config: HeadraceConfig, fingerprint: str) -> Check:
    """As far as can be known without compiling the model."""
    try:
        execution = choose(config, facts_of(config, fingerprint))
    except (ExecutionError, ArtifactError) as error:
        return Check("execution", "problem", str(error), "see the message")
    found = summary(execution.config)
    if execution.obstacle is None:
        return Check("execution", "ok", found)
    return Check("execution", "note", f"{found}: {execution.obstacle.reason}", execution.obstacle.fix)


def _redis(config: HeadraceConfig) -> Check:
    try:
        if config.placement.redis_url is not None:
            return Check("Redis", "ok", f"yours, version {check_redis(config.placement.redis_url)}")
        return Check("Redis", "ok", str(find_redis_server()))
    except EmbeddedRedisError as error:
        return Check("Redis", "problem", "no redis-server", str(error))
    except RedisUnusableError as error:
        return Check(
            "Redis", "problem", str(error), "`--redis-url`, or none to have one of the cluster's own"
        )


def _ports(config: HeadraceConfig, folder: RunFolder) -> Iterator[Check]:
    router = config.router
    ports = f"{router.http_port} (HTTP), {router.grpc_port} (gRPC)"
    if folder.is_locked():
        yield Check("ports", "ok", "a cluster of yours is up")
        return
    try:
        check_free(config)
    except PortTakenError as error:
        yield Check("ports", "problem", str(error), "stop that program, or choose other ports")
    else:
        yield Check("ports", "ok", f"{ports} are free")


def _memory() -> Check:
    available = psutil.virtual_memory().available
    found = f"{available / 2**30:.1f} GiB available, {len(os.sched_getaffinity(0))} cores"
    if available < _MIN_MEMORY_BYTES:
        return Check("memory", "problem", found, f"free up to {_MIN_MEMORY_BYTES / 2**30:.0f} GiB")
    return Check("memory", "ok", found)


def _shared_memory() -> Check:
    try:
        free = shutil.disk_usage(_SHM).free
    except OSError as error:
        return Check(_SHM, "problem", str(error.strerror), "mount a tmpfs there: Ray keeps objects in it")
    found = f"{free / 2**20:.0f} MiB free"
    if free < _MIN_SHM_BYTES:
        return Check(_SHM, "problem", found, "enlarge it; for a container: --shm-size=1g")
    return Check(_SHM, "ok", found)


def _disk(folder: RunFolder) -> Check:
    existing = next(path for path in (folder.path, *folder.path.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    found = f"{free / 2**30:.1f} GiB free at {existing}"
    if free < _MIN_DISK_BYTES:
        return Check("disk", "problem", found, "free some, or set HEADRACE_HOME elsewhere: Ray logs there")
    return Check("disk", "ok", found)


def _tools() -> Iterator[Check]:
    for what, names, purpose in (
        ("C++ compiler", ("c++", "g++", "clang++"), "it compiles the megakernel; PyTorch decodes without it"),
        ("C compiler", ("cc", "gcc", "clang"), "the CPU is measured with it, once; else with numpy"),
        ("make", ("make",), "the repository's commands use it"),
        ("git", ("git",), "only needed to develop"),
        ("nvcc", ("nvcc",), "only needed to build CUDA kernels"),
    ):
        path = next((found for name in names if (found := _which(name))), None)
        if path:
            yield Check(what, "ok", path)
        else:
            yield Check(what, "note", "not found", f"install it if you want it: {purpose}")


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")


def _gpu() -> Check:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        has_device = Path("/dev/nvidia0").exists()
        fix = "install the driver's nvidia-smi" if has_device else "none needed: the CPU serves"
        return Check("GPU", "note", "no nvidia-smi", fix)
    try:
        gpus = _query_gpus(tool, "name,memory.total,driver_version")
    except (OSError, subprocess.SubprocessError) as error:
        return Check("GPU", "note", f"nvidia-smi failed: {error}", "repair the driver; the CPU serves")
    return Check("GPU", "ok", "; ".join(gpus))


def _query_gpus(tool: str, fields: str) -> list[str]:
    """A line a GPU. Raises OSError, SubprocessError."""
    query = [tool, f"--query-gpu={fields}", "--format=csv,noheader"]
    answer = subprocess.run(  # noqa: S603 - a fixed command, found on PATH
        query, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=True
    )
    return [line for line in answer.stdout.splitlines() if line]


def _tensorrt(config: HeadraceConfig) -> Check:
    is_asked_for = config.prefill.engine == "tensorrt"
    if importlib.util.find_spec("tensorrt_llm") is None and not is_asked_for:
        return Check("tensorrt_llm", "note", "not installed", "none needed: PyTorch runs prefill")
    obstacle = _tensorrt_obstacle()
    if obstacle is None:
        return Check("tensorrt_llm", "ok", f"{metadata.version('tensorrt_llm')}, as expected")
    fix = obstacle.fix if is_asked_for else f"{obstacle.fix}; none needed where PyTorch runs prefill"
    return Check("tensorrt_llm", "problem" if is_asked_for else "note", obstacle.reason, fix)


def _nixl(config: HeadraceConfig) -> Check:
    version = installed_version()
    is_asked_for = config.transfer.transport == "nixl"
    if version is not None and (is_asked_for or has_rdma_device()):
        return Check("NIXL", "ok", f"{version}, for hand-offs between hosts")
    if version is not None:
        fix = "none needed: gRPC carries KV between hosts, and over TCP it is the faster one"
        return Check("NIXL", "note", f"{version}, and no RDMA device for it", fix)
    fix = f"`{INSTALL}`" if is_asked_for else f"none needed: gRPC carries KV between hosts; `{INSTALL}`"
    return Check("NIXL", "problem" if is_asked_for else "note", "not installed", fix)


def _tensorrt_obstacle() -> Obstacle | None:
    """In a process of its own: what it loads is large, and may end it."""
    command = [sys.executable, "-m", "prefill_workers.check_trtllm"]
    try:
        answer = subprocess.run(  # noqa: S603 - a fixed command
            command, capture_output=True, text=True, timeout=_CHECK_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Obstacle(f"it cannot be checked: {error}", f"see what `{' '.join(command[1:])}` says")
    if answer.returncode == 0:
        return _gpu_obstacle(load_pins().compute_capabilities)
    said = answer.stderr.strip().splitlines()[-1:] or [f"its check ended with {answer.returncode}"]
    num_different = len(answer.stdout.splitlines()) if answer.returncode == 1 else 0
    differences = f" ({num_different} differences)" if num_different else ""
    return Obstacle(f"{said[0]}{differences}", "docs/tensorrt-llm.md has the container that fits")


def _gpu_obstacle(capabilities: list[str]) -> Obstacle | None:
    known = f"it runs on compute capability {', '.join(capabilities)}"
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Obstacle("there is no nvidia-smi", "use a machine with an NVIDIA GPU and its driver")
    try:
        found = _query_gpus(tool, "compute_cap")
    except (OSError, subprocess.SubprocessError) as error:
        return Obstacle(f"nvidia-smi failed: {error}", "repair the driver")
    if not found:
        return Obstacle("nvidia-smi names no GPU", f"pass one to this container: {known}")
    for capability in found:
        if capability not in capabilities:
            return Obstacle(f"a GPU has compute capability {capability}", f"use another: {known}")
    return None
