"""The layer over CUDA's driver: which calls it makes, and that no result goes unread.

Once over bindings that only remember, and once over the real ones and a driver library of our own, where
cuda-bindings are installed."""

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megakernel import cuda_driver
from megakernel.cuda_arguments import StepArguments
from megakernel.cuda_device import CudaError, CudaUnavailableError, Grid, ResidencyError
from megakernel.cuda_driver import CudaDriver, open_driver

GRID = Grid(num_blocks=4, num_threads=288, shared_bytes=101_376)
FREE_GRID = Grid(num_blocks=4, num_threads=256, shared_bytes=0, is_cooperative=False)
ATTRIBUTES = {
    "COOPERATIVE_LAUNCH": 1,
    "MAX_PITCH": 1000,
    "COMPUTE_CAPABILITY_MAJOR": 8,
    "COMPUTE_CAPABILITY_MINOR": 9,
    "MULTIPROCESSOR_COUNT": 4,
    "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 101_376,
}
GIVEN = {
    "cuDeviceGet": 0,
    "cuDevicePrimaryCtxRetain": "context",
    "cuDeviceGetName": b"Some GPU\0\0\0",
    "cuDeviceTotalMem": 1 << 30,
    "cuModuleLoadData": "module",
    "cuModuleGetFunction": "function",
    "cuOccupancyMaxActiveBlocksPerMultiprocessor": 1,
    "cuMemAlloc": 0x100,
    "cuStreamCreate": "stream",
    "cuEventCreate": "event",
    "cuEventElapsedTime": 1.5,
    "cuGetErrorName": b"CUDA_ERROR_SOMETHING",
    "cuGetErrorString": b"in words",
}


class Result(IntEnum):
    SUCCESS = 0
    SOMETHING = 700


class FakeBindings:
    """`cuda.bindings.driver`, as far as it is used: every call gives a code, and what GIVEN says."""

    CU_MEMHOSTALLOC_PORTABLE, CU_MEMHOSTALLOC_DEVICEMAP = 1, 2
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = SimpleNamespace(CU_EVENT_DEFAULT=0)
    CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_DEVICE=2)
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
    CUdevice_attribute = SimpleNamespace(**{f"CU_DEVICE_ATTRIBUTE_{name}": name for name in ATTRIBUTES})
    CUDA_MEMCPY2D = SimpleNamespace

    def __init__(self, attributes=ATTRIBUTES) -> None:
        self.attributes = attributes
        self.calls: list[tuple] = []
        self.failing: str | None = None

    def __getattr__(self, name):
        assert name.startswith("cu"), name

        def call(*arguments):
            self.calls.append((name, *arguments))
            if name == self.failing:
                return (Result.SOMETHING, None) if name in GIVEN else (Result.SOMETHING,)
            if name == "cuDeviceGetAttribute":
                return Result.SUCCESS, self.attributes[arguments[0]]
            if name == "cuMemHostAlloc":
                return Result.SUCCESS, ctypes.addressof(HELD)
            if name == "cuMemHostGetDevicePointer":
                return Result.SUCCESS, arguments[0]
            return (Result.SUCCESS, GIVEN[name]) if name in GIVEN else (Result.SUCCESS,)

        return call

    def named(self, name):
        return [call[1:] for call in self.calls if call[0] == name]


HELD = (ctypes.c_uint8 * 64)()


@pytest.fixture
def bindings():
    return FakeBindings()


@pytest.fixture
def driver(bindings):
    return CudaDriver(bindings)


@pytest.fixture
def cubin(tmp_path):
    (tmp_path / "step.cubin").write_bytes(b"code")
    return tmp_path / "step.cubin"


def test_the_device_is_described(driver):
    facts = driver.facts
    assert (facts.name, facts.architecture, facts.num_sms) == ("Some GPU", "sm_89", 4)
    assert (facts.shared_bytes, facts.memory_bytes) == (101_376, 1 << 30)


def test_kernels_get_their_shared_memory(driver, bindings, cubin):
    kernels = driver.load(cubin, ["one", "two"], GRID)
    assert list(kernels) == ["one", "two"]
    assert bindings.named("cuModuleLoadData") == [(b"code",)]
    assert bindings.named("cuFuncSetAttribute") == [("function", 8, 101_376)] * 2


def test_a_grid_that_is_not_resident_is_refused(driver, bindings, cubin):
    with pytest.raises(ResidencyError, match=r"one: 5 blocks of 288 threads.*holds 1 on each of 4 SMs"):
        driver.load(cubin, ["one"], Grid(num_blocks=5, num_threads=288, shared_bytes=0))


def test_a_launch_passes_the_address_of_the_arguments(driver, bindings, cubin):
    kernel = driver.load(cubin, ["one"], GRID)["one"]
    seen = []

    def launch(*arguments):
        pointers = ctypes.cast(arguments[-1], ctypes.POINTER(ctypes.c_void_p))
        seen.append((arguments[:-1], StepArguments.from_address(pointers[0]).num_rows))
        return (Result.SUCCESS,)

    bindings.cuLaunchCooperativeKernel = launch
    driver.launch(driver.new_stream(), kernel, StepArguments(num_rows=3))
    assert seen == [(("function", 4, 1, 1, 288, 1, 1, 101_376, "stream"), 3)]


def test_blocks_that_do_not_wait_for_one_another_are_launched_as_they_fit(driver, bindings, cubin):
    kernel = driver.load(cubin, ["one"], FREE_GRID)["one"]
    driver.launch(driver.new_stream(), kernel, StepArguments())
    ((*launched, _, extra),) = bindings.named("cuLaunchKernel")
    assert launched == ["function", 4, 1, 1, 256, 1, 1, 0, "stream"]
    assert extra == 0
    assert not bindings.named("cuLaunchCooperativeKernel")


def test_memory_is_zeroed_before_any_stream_uses_it(driver, bindings):
    assert driver.allocate(40) == 0x100
    names = [call[0] for call in bindings.calls]
    assert names[-3:] == ["cuMemAlloc", "cuMemsetD8", "cuCtxSynchronize"]
    assert bindings.named("cuMemsetD8") == [(0x100, 0, 40)]


def test_pinned_memory_is_an_array(driver, bindings):
    HELD[3] = 9
    memory = driver.allocate_host(64)
    assert not memory.array.any()
    memory.array[5] = 7
    assert HELD[5] == 7
    assert memory.address == ctypes.addressof(HELD)
    assert driver.address_of_host(memory.address + 8) == memory.address + 8
    driver.free_host(memory)
    assert bindings.named("cuMemFreeHost") == [(ctypes.addressof(HELD),)]


def test_lines_are_one_copy_unless_their_pitch_is_too_large(driver, bindings):
    stream = driver.new_stream()
    driver.copy_lines(stream, 0, 1000, 5000, 16, 8, 3)
    ((copy, _),) = bindings.named("cuMemcpy2DAsync")
    assert (copy.dstDevice, copy.dstPitch, copy.srcDevice, copy.srcPitch) == (0, 1000, 5000, 16)
    assert (copy.WidthInBytes, copy.Height) == (8, 3)
    driver.copy_lines(stream, 0, 1001, 5000, 16, 8, 3)
    assert bindings.named("cuMemcpyDtoDAsync") == [
        (0, 5000, 8, "stream"),
        (1001, 5016, 8, "stream"),
        (2002, 5032, 8, "stream"),
    ]


def test_nothing_is_copied_for_nothing(driver, bindings):
    stream, empty = driver.new_stream(), np.empty(0, dtype=np.uint8)
    driver.copy_to_device(stream, 0x100, empty)
    driver.copy_to_host(stream, empty, 0x100)
    assert not bindings.named("cuMemcpyHtoDAsync")
    assert not bindings.named("cuMemcpyDtoHAsync")


def test_every_thread_has_the_context_made_current_once(driver, bindings):
    stream = driver.new_stream()
    thread = threading.Thread(target=lambda: [driver.synchronize(stream) for _ in range(2)])
    thread.start()
    thread.join()
    driver.synchronize(stream)
    assert bindings.named("cuCtxSetCurrent") == [("context",)] * 2


CALLS = {
    "cuModuleLoadData": lambda driver, path: driver.load(path, ["one"], GRID),
    "cuModuleGetFunction": lambda driver, path: driver.load(path, ["one"], GRID),
    "cuFuncSetAttribute": lambda driver, path: driver.load(path, ["one"], GRID),
    "cuOccupancyMaxActiveBlocksPerMultiprocessor": lambda driver, path: driver.load(path, ["one"], GRID),
    "cuCtxSetCurrent": lambda driver, path: driver.new_stream(),
    "cuMemAlloc": lambda driver, path: driver.allocate(1),
    "cuMemsetD8": lambda driver, path: driver.allocate(1),
    "cuCtxSynchronize": lambda driver, path: driver.allocate(1),
    "cuMemFree": lambda driver, path: driver.free(1),
    "cuStreamCreate": lambda driver, path: driver.new_stream(),
    "cuMemcpyHtoDAsync": lambda driver, path: driver.copy_to_device(driver.new_stream(), 1, np.zeros(4)),
    "cuMemcpyDtoHAsync": lambda driver, path: driver.copy_to_host(driver.new_stream(), np.zeros(4), 1),
    "cuMemcpy2DAsync": lambda driver, path: driver.copy_lines(driver.new_stream(), 0, 1, 0, 1, 1, 1),
    "cuMemcpyDtoDAsync": lambda driver, path: driver.copy_lines(driver.new_stream(), 0, 2000, 0, 1, 1, 1),
    "cuLaunchCooperativeKernel": lambda driver, path: driver.launch(
        driver.new_stream(), driver.load(path, ["one"], GRID)["one"], StepArguments()
    ),
    "cuLaunchKernel": lambda driver, path: driver.launch(
        driver.new_stream(), driver.load(path, ["one"], FREE_GRID)["one"], StepArguments()
    ),
    "cuMemHostGetDevicePointer": lambda driver, path: driver.address_of_host(1),
    "cuEventCreate": lambda driver, path: driver.new_event(),
    "cuEventRecord": lambda driver, path: driver.record(driver.new_stream(), driver.new_event()),
    "cuEventElapsedTime": lambda driver, path: driver.elapsed_ms(driver.new_event(), driver.new_event()),
    "cuStreamSynchronize": lambda driver, path: driver.synchronize(driver.new_stream()),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_error_names_the_call_and_itself(driver, bindings, cubin, name):
    bindings.failing = name
    with pytest.raises(CudaError, match=f"^{name}: CUDA_ERROR_SOMETHING, in words$") as error:
        CALLS[name](driver, cubin)
    assert (error.value.call, error.value.error) == (name, "CUDA_ERROR_SOMETHING")


def test_an_error_without_a_name_has_its_number(driver, bindings):
    bindings.failing = "cuStreamCreate"
    bindings.cuGetErrorName = bindings.cuGetErrorString = lambda code: (Result.SOMETHING, None)
    with pytest.raises(CudaError, match=r"^cuStreamCreate: error 700$"):
        driver.new_stream()


def test_closing_gives_all_back_whatever_fails(driver, bindings, cubin):
    driver.load(cubin, ["one"], GRID)
    driver.allocate(4)
    driver.new_stream()
    driver.new_event()
    driver.allocate_host(64)
    bindings.failing = "cuMemFree"
    driver.close()
    driver.close()
    gone = [call[0] for call in bindings.calls if re.search("Destroy|Unload|Free|Release", call[0])]
    assert gone == [
        "cuEventDestroy",
        "cuStreamDestroy",
        "cuModuleUnload",
        "cuMemFree",
        "cuMemFreeHost",
        "cuDevicePrimaryCtxRelease",
    ]


def test_without_bindings_the_message_names_the_extra(monkeypatch):
    for name in ("cuda", "cuda.bindings", "cuda.bindings.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CudaUnavailableError, match=r"pip install 'headrace\[cuda\]'"):
        open_driver()


def test_without_a_driver_the_message_says_so(bindings):
    def no_library(flags):
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    bindings.cuInit = no_library
    with pytest.raises(CudaUnavailableError, match=r"no CUDA device 0: Failed to dlopen libcuda\.so\.1"):
        CudaDriver(bindings)


def test_a_device_without_cooperative_launches_is_refused():
    with pytest.raises(CudaUnavailableError, match="all blocks of a kernel at once"):
        CudaDriver(FakeBindings(ATTRIBUTES | {"COOPERATIVE_LAUNCH": 0}))


def has_bindings() -> bool:
    try:
        return importlib.util.find_spec("cuda.bindings.driver") is not None
    except ImportError:
        return False


COMPILER = shutil.which("g++") or shutil.which("clang++")
SOURCE = Path(__file__).parent / "native" / "driver_library.cpp"
SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
from megakernel.cuda_arguments import StepArguments
from megakernel.cuda_device import CudaError, Grid, Stream
from megakernel.cuda_driver import open_driver

driver = open_driver()
grid = Grid(num_blocks=132, num_threads=288, shared_bytes=101376)
kernel = driver.load(Path(sys.argv[1]), ["step_rows1"], grid)["step_rows1"]
stream, held = driver.new_stream(), driver.allocate_host(64)
one, other, found = driver.allocate(64), driver.allocate(64), np.empty(64, np.uint8)
held.array[:] = np.arange(64)
driver.copy_to_device(stream, one, held.array)
driver.copy_lines(stream, other, 8, one, 16, 4, 3)
driver.copy_to_host(stream, found, other)
start, end = driver.new_event(), driver.new_event()
driver.record(stream, start)
arguments = StepArguments(num_rows=2, epoch=7, timeout_ns=5)
driver.launch(stream, kernel, arguments)
driver.record(stream, end)
driver.synchronize(stream)
arguments.num_rows = 1000
try:
    driver.launch(stream, kernel, arguments)
    error = None
except CudaError as failed:
    error = str(failed)
grid = Grid(num_blocks=32, num_threads=256, shared_bytes=0, is_cooperative=False)
driver.launch(Stream(0x1234), driver.load(Path(sys.argv[1]), ["other"], grid)["other"], arguments)
report = {"found": found.tolist(), "ms": driver.elapsed_ms(start, end), "error": error}
report |= {"architecture": driver.facts.architecture, "num_sms": driver.facts.num_sms}
driver.free(one)
driver.free_host(held)
driver.close()
print(json.dumps(report))
"""


@pytest.mark.skipif(not has_bindings(), reason="no cuda-bindings: make cuda-tools")
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_real_bindings_take_what_the_layer_passes(tmp_path, cubin):
    library = tmp_path / "libcuda.so.1"
    subprocess.run([COMPILER, "-shared", "-fPIC", str(SOURCE), "-o", str(library), "-ldl"], check=True)
    paths = [str(Path(cuda_driver.__file__).parents[1])]
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", SCRIPT, str(cubin)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *said, report = done.stdout.splitlines()
    assert json.loads(report) == {
        "found": [*range(4), *[0] * 4, *range(16, 20), *[0] * 4, *range(32, 36), *[0] * 44],
        "ms": 1.5,
        "error": "cuLaunchCooperativeKernel: CUDA_ERROR_LAUNCH_FAILED, in words",
        "architecture": "sm_90",
        "num_sms": 132,
    }
    assert said == [
        "load code",
        "grid 132 1 1 block 288 1 1 shared 101376 rows 2 epoch 7 timeout 5",
        "grid 132 1 1 block 288 1 1 shared 101376 rows 1000 epoch 7 timeout 5",
        "load code",
        "32 blocks of 256 shared 0 stream 0x1234 rows 1000 extra 0",
        "release",
    ]
