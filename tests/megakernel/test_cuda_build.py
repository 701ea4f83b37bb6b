import pytest

from megakernel.build import BuildError
from megakernel.cuda_build import (
    ARCHITECTURES,
    CudaBuild,
    CudaResourceError,
    FunctionSpills,
    KernelResources,
    build_cubin,
    check_resources,
    find_nvcc,
    most_registers,
    most_shared_bytes,
    parse_ptxas,
)
from megakernel.cuda_toolkit import ToolMissingError, find_tool
from tests.megakernel.cuda_sources import MATRIX, PLAIN, SPILLING

SAID = """\
ptxas warning : Value of threads per SM for entry tight is out of range. .minnctapersm will be ignored
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'tight' for 'sm_89'
ptxas info    : Function properties for tight
    432 bytes stack frame, 576 bytes spill stores, 580 bytes spill loads
ptxas info    : Used 64 registers, used 0 barriers, 432 bytes cumulative stack size, 360 bytes cmem[0]
ptxas info    : Compiling entry function 'roomy' for 'sm_89'
ptxas info    : Function properties for roomy
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 26 registers, used 1 barriers, 1024 bytes smem, 360 bytes cmem[0]
ptxas info    : Function properties for _Z4failv
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
"""


def has_nvcc() -> bool:
    try:
        find_nvcc()
    except ToolMissingError:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="no nvcc: pip install 'headrace[cuda-tools]'")


def of(kernels=(), spills=(), architecture="sm_89") -> CudaBuild:
    return CudaBuild(
        architecture=architecture, nvcc="", flags=(), kernels=kernels, spills=spills, warnings=()
    )


def kernel(registers=32, static_shared_bytes=0) -> KernelResources:
    return KernelResources(
        name="k", registers=registers, static_shared_bytes=static_shared_bytes, stack_bytes=0
    )


def test_what_ptxas_prints_is_read():
    kernels, spills, warnings = parse_ptxas(SAID)
    assert kernels == (
        KernelResources(name="tight", registers=64, static_shared_bytes=0, stack_bytes=432),
        KernelResources(name="roomy", registers=26, static_shared_bytes=1024, stack_bytes=0),
    )
    assert spills == (
        FunctionSpills(name="tight", store_bytes=576, load_bytes=580),
        FunctionSpills(name="_Z4failv", store_bytes=4, load_bytes=8),
    )
    assert len(warnings) == 1


def test_a_spill_anywhere_is_refused():
    build = of([kernel()], [FunctionSpills(name="_Z4failv", store_bytes=4, load_bytes=8)])
    with pytest.raises(CudaResourceError, match="sm_89: _Z4failv spills 4 bytes, and loads 8 again"):
        check_resources(build, threads=288, dynamic_shared_bytes=0)


def test_a_block_of_nine_warps_leaves_168_registers_a_thread():
    """Three of them have a scheduler's 16,384."""
    assert [most_registers(threads) for threads in (256, 288, 384, 1024)] == [255, 168, 168, 64]
    check_resources(of([kernel(registers=168)]), threads=288, dynamic_shared_bytes=0)
    with pytest.raises(CudaResourceError, match="k takes 169 registers a thread, of 168"):
        check_resources(of([kernel(registers=169)]), threads=288, dynamic_shared_bytes=0)
    with pytest.raises(CudaResourceError, match="of 128"):
        check_resources(of([kernel(registers=129)]), threads=288, dynamic_shared_bytes=0, max_registers=128)


def test_static_shared_memory_counts_with_dynamic():
    assert most_shared_bytes("sm_89") == 101_376
    fitting = of([kernel(static_shared_bytes=1024)])
    check_resources(fitting, threads=288, dynamic_shared_bytes=101_376 - 1024)
    with pytest.raises(CudaResourceError, match="k takes 101377 bytes of shared memory, of 101376"):
        check_resources(fitting, threads=288, dynamic_shared_bytes=101_376 - 1023)
    check_resources(
        of([kernel(static_shared_bytes=1024)], architecture="sm_90"),
        threads=288,
        dynamic_shared_bytes=200_000,
    )


def test_an_unknown_architecture_is_named():
    with pytest.raises(
        ValueError, match="'sm_75': one of sm_80, sm_86, sm_89, sm_90, compute_89:sm_90 is wanted"
    ):
        most_shared_bytes("sm_75")


def test_without_a_toolkit_the_message_names_the_wheels(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(ToolMissingError, match=r"no no-such-tool.*headrace\[cuda-tools\]"):
        find_tool("no-such-tool")


def test_cuda_home_comes_before_the_path(tmp_path, monkeypatch):
    for place in ("home/bin", "path"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "nvcc").write_text("#!/bin/sh\n")
        (tmp_path / place / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert find_tool("nvcc") == tmp_path / "home/bin/nvcc"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    assert find_tool("nvcc") == tmp_path / "path/nvcc"


TARGETS = {"compute_89:sm_90": "-gencode=arch=compute_89,code=sm_90"}


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cubin_is_made_for_each_architecture(tmp_path, architecture):
    made = build_cubin(MATRIX, architecture, folder=tmp_path)
    assert made.path.read_bytes().startswith(b"\x7fELF")
    assert made.build.architecture == architecture
    assert TARGETS.get(architecture, f"-arch={architecture}") in made.build.flags
    assert "release 13" in made.build.nvcc
    assert [found.name for found in made.build.kernels] == ["matrix"]
    check_resources(made.build, threads=288, dynamic_shared_bytes=most_shared_bytes(architecture))


@needs_nvcc
def test_a_cubin_is_made_once_and_again_for_other_flags_and_headers(tmp_path):
    (tmp_path / "include/cuda").mkdir(parents=True)
    header = tmp_path / "include/cuda/scale.h"
    header.write_text("// one\n")
    said = []

    def build(*flags):
        return build_cubin(
            PLAIN,
            "sm_89",
            include_folder=tmp_path / "include",
            folder=tmp_path / "cache",
            extra_flags=flags,
            progress=lambda *at: said.append(at),
        )

    first = build("-DSCALE=2")
    assert said[0] == ("compiling", 0.0)
    assert said[-1] == ("compiling", 1.0)
    stamp = first.path.stat().st_mtime_ns
    again = build("-DSCALE=2")
    assert again == first
    assert again.path.stat().st_mtime_ns == stamp
    others = [build("-DSCALE=3")]
    header.write_text("// other\n")
    others.append(build("-DSCALE=2"))
    assert len({made.path for made in (first, *others)}) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 3


@needs_nvcc
def test_what_nvcc_says_is_in_the_error_and_nothing_is_left(tmp_path):
    with pytest.raises(BuildError, match=r"(?s)failed with status \d+:.*SCALE"):
        build_cubin(PLAIN, "sm_89", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@needs_nvcc
def test_a_kernel_that_spills_is_refused(tmp_path):
    made = build_cubin(SPILLING, "sm_89", folder=tmp_path)
    (found,) = made.build.kernels
    assert found.registers == 64
    assert found.static_shared_bytes == 8192
    assert found.stack_bytes > 0
    with pytest.raises(CudaResourceError, match="spilling spills"):
        check_resources(made.build, threads=1024, dynamic_shared_bytes=0)
