"""The wrappers of PTX and their emulated twins: the same functions, and both compile."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

INCLUDE = Path(__file__).resolve().parents[2] / "kernels" / "include"
DEVICE, EMULATED = INCLUDE / "cuda" / "ptx", INCLUDE / "cuda_emulation" / "cuda" / "ptx"
NAMES = sorted(path.name for path in DEVICE.glob("*.h"))
NVCC = shutil.which("nvcc")

SOURCE = """
#include "cuda/ptx/clock.h"
#include "cuda/ptx/convert.h"
#include "cuda/ptx/copy.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/memory.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/warp.h"
#include "cuda/registry.h"
using namespace headrace;

template <class T>
__device__ void pass_on(uint8_t* at) {
    ptx::store_shared<T>(ptx::shared_base() + 64, ptx::load_shared<T>(ptx::shared_base()));
    ptx::store_global(reinterpret_cast<T*>(at) + 1, ptx::load_global(reinterpret_cast<const T*>(at)));
    ptx::store_global(reinterpret_cast<T*>(at) + 3, ptx::load_constant(reinterpret_cast<const T*>(at) + 2));
}

struct Arguments {
    uint8_t* bytes;
    uint32_t* words;
    float* floats;
};

extern "C" __global__ void __launch_bounds__(288, 1) everything(const __grid_constant__ Arguments a) {
    const ptx::SharedAddress s = ptx::shared_base();
    pass_on<uint16_t>(a.bytes), pass_on<uint32_t>(a.bytes), pass_on<int32_t>(a.bytes);
    pass_on<float>(a.bytes), pass_on<uint2>(a.bytes), pass_on<float2>(a.bytes);
    pass_on<uint4>(a.bytes), pass_on<float4>(a.bytes);
    ptx::store_global(a.bytes, ptx::load_global(static_cast<const uint8_t*>(a.bytes)));
    ptx::mbarrier_init(s, 3), ptx::fence_mbarrier_init(), ptx::sync_threads(0, 288);
    ptx::add_shared_release(s + 8, ptx::load_shared_acquire(s + 12));
    ptx::add_release(a.words, ptx::add_acquire_release(a.words + 2, ptx::load_acquire(a.words + 1)));
    ptx::store_system(a.words, ptx::compare_exchange(a.words, 1, 2)), ptx::fence_system();
    a.words[1] = ptx::load_system(a.words + 2) + ptx::load_settled(reinterpret_cast<int32_t*>(a.words) + 3);
    ptx::prefetch(ptx::settled_pointer(a.bytes));
    uint4 held{};
    ptx::load_global_if(a.words[4] > 0, reinterpret_cast<const uint4*>(a.bytes), held);
    ptx::store_global(reinterpret_cast<uint4*>(a.bytes), held);
    a.floats[0] = ptx::load_constant_early(reinterpret_cast<const float4*>(a.bytes)).x;
    ptx::copy_async_16(s + 16, a.bytes), ptx::copy_async_arrive(s), ptx::fence_async_shared();
    ptx::copy_async_commit(), ptx::copy_async_wait<3>(), ptx::copy_async_pace<3>();
    ptx::mbarrier_arrive(s), ptx::mbarrier_arrive_expect(s, 64), ptx::copy_bulk(s + 64, a.bytes, 64, s);
    while (!ptx::mbarrier_try_wait(s, 0)) ptx::sleep_ns(20);
    uint32_t r[4];
    float c[4] = {1, 2, 3, 4};
    ptx::load_matrix_x4(r, s + 16 * ptx::lane());
    ptx::mma_bf16(c, r[0], r[1], r[2], r[3], r[0], r[1]);
    ptx::mma_f16(c, r[0], r[1], r[2], r[3], r[0], r[1]);
    ptx::sync_warp();
    c[0] += ptx::shuffle_xor(c[1], 1) + ptx::shuffle(c[2], 3);
    r[0] = ptx::shuffle_xor(r[1], 1) + ptx::shuffle(r[2], 3) + ptx::ballot(c[0] > 0) + ptx::lowest_bit(r[1]);
    c[1] = ptx::half_to_float(r[0]) + ptx::bf16_to_float(r[1]) + ptx::exp2_approx(c[0]) + ptx::exp_f32(c[1]);
    c[2] = ptx::log_f32(c[2]) + ptx::reciprocal_sqrt(c[3]) + ptx::fma(c[0], c[1], c[2]);
    c[3] += ptx::reciprocal_sqrt_approx(c[0]);
    r[1] = ptx::pack_bf16x2(c[0], c[1]) + ptx::pack_f16x2(c[2], c[3]) + ptx::float_to_half(c[1]);
    r[2] = static_cast<uint32_t>(ptx::nanoseconds()) + ptx::cycles() + ptx::block() + ptx::num_blocks();
    r[3] = ptx::and_or(r[0], r[1], r[2]) + ptx::permute_bytes(r[0], r[1], r[2]);
    a.words[ptx::thread()] = r[0] + r[1] + r[2] + r[3] + ptx::warp();
    a.floats[ptx::thread()] = c[0] + c[1] + c[2] + c[3];
    if (c[0] > 3) ptx::trap();
}

HEADRACE_KERNELS(everything)
"""
"""Calls every wrapper, with every type that it is made for."""


def declarations(header: Path) -> list[str]:
    """Functions with their template lines, and aliases, in order; whatever else there is, is a twin's own."""
    text = re.sub(r"//[^\n]*", "", header.read_text(encoding="utf-8"))
    text = text.replace("HEADRACE_ALWAYS_INLINE", "__forceinline__")
    pattern = r"((?:template <[^>]*>\s*)?__device__ __forceinline__ [^{]*?\))\s*\{|(using \w+ = \w+;)"
    return [" ".join((function or alias).split()) for function, alias in re.findall(pattern, text)]


def test_both_folders_have_the_same_headers():
    assert len(NAMES) == 7
    assert sorted(path.name for path in EMULATED.glob("*.h")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_twins_declare_the_same(name):
    device = declarations(DEVICE / name)
    assert declarations(EMULATED / name) == device
    assert device


def test_every_wrapper_is_compiled_below():
    """Of the functions, by name."""
    declared = {
        re.search(r"(\w+)\(", line)[1]
        for name in NAMES
        for line in declarations(DEVICE / name)
        if "(" in line
    }
    assert len(declared) > 40
    assert {name for name in declared if not re.search(rf"ptx::{name}\b", SOURCE)} == set()


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90"])
def test_the_device_s_compile(architecture, tmp_path):
    source = tmp_path / "everything.cu"
    source.write_text(SOURCE)
    flags = ("-std=c++17", f"-arch={architecture}", f"-I{INCLUDE}", "-Werror", "all-warnings", "-cubin")
    command = [NVCC, *flags, str(source), "-o", str(tmp_path / "everything.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_twins_compile_without_warnings(tmp_path):
    source = tmp_path / "everything.cpp"
    source.write_text(SOURCE)
    flags = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror")
    command = [shutil.which("g++"), *flags, f"-I{INCLUDE / 'cuda_emulation'}", f"-I{INCLUDE}", str(source)]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "everything.so")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
