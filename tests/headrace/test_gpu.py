"""Which machines' GPUs decode in the megakernel, and what is said of those that do not."""

import msgspec
import pytest

import headrace.artifacts
import headrace.gpu
import megakernel.gpu_build
from cluster.config import config_from_mapping
from headrace.artifacts import executable
from headrace.build import _gpu_executor
from headrace.execution import ExecutionError
from headrace.gpu import GpuUnusableError, gpu_machine, gpu_obstacle
from megakernel.build import BuildError
from megakernel.cuda_build import find_nvcc
from megakernel.cuda_device import CudaError, CudaUnavailableError, DeviceFacts, ResidencyError
from megakernel.cuda_toolkit import ToolMissingError
from megakernel.gpu_build import gpu_recipe
from megakernel.model.load import open_model
from tests.megakernel.cuda_models import small_gpu
from tests.megakernel.fake_cuda import FakeDriver
from tests.megakernel.model.model_files import random_tensors, tiny_shape, write_gguf

L4 = DeviceFacts(
    name="NVIDIA L4", architecture="sm_89", num_sms=58, shared_bytes=101_376, memory_bytes=22 << 30
)
CUDA_CONFIG = config_from_mapping({"decode": {"executor": "megakernel-cuda"}, "prefill": {"num_replicas": 0}})


class Gpu(FakeDriver):
    def __init__(self, facts: DeviceFacts = L4) -> None:
        super().__init__()
        self._facts = facts

    @property
    def facts(self) -> DeviceFacts:
        return self._facts


def raising(error):
    def call(*_args, **_options):
        raise error

    return call


@pytest.fixture
def device(monkeypatch):
    """A machine with an L4 and everything that is needed."""
    driver = Gpu()
    monkeypatch.setattr(headrace.gpu, "has_nvidia_device", lambda: True)
    monkeypatch.setattr(headrace.gpu, "find_nvcc", lambda: None)
    monkeypatch.setattr(headrace.gpu, "open_driver", lambda: driver)
    return driver


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    shape = tiny_shape(
        "llama",
        num_layers=1,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_context_tokens=1024,
    )
    write_gguf(path, shape, random_tensors(shape))
    return open_model(str(path))


def test_a_known_gpu_is_compiled_for(device):
    assert gpu_machine().name == "l4"
    assert gpu_obstacle() is None
    assert device.is_closed, "others of this machine need its memory"


@pytest.mark.parametrize(
    ("what", "found", "reason", "fix"),
    [
        ("has_nvidia_device", lambda: False, "there is no NVIDIA GPU", "none on this machine"),
        ("find_nvcc", raising(ToolMissingError("no nvcc: nowhere")), "no nvcc: nowhere", "cuda-tools"),
        ("open_driver", raising(CudaUnavailableError("no bindings")), "no bindings", "pip install"),
        ("open_driver", raising(CudaError("cuInit", "CUDA_ERROR_BAD")), "cuInit: CUDA_ERROR_BAD", "install"),
    ],
)
def test_what_is_missing_is_named(device, monkeypatch, what, found, reason, fix):
    monkeypatch.setattr(headrace.gpu, what, found)
    obstacle = gpu_obstacle()
    assert obstacle.reason == reason
    assert fix in obstacle.fix
    with pytest.raises(GpuUnusableError, match=reason):
        gpu_machine()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": "NVIDIA T4"}, "no description is packaged of NVIDIA T4"),
        ({"num_sms": 20}, "NVIDIA L4 is no l4: it has 20 SMs, l4 58"),
    ],
)
def test_an_unknown_gpu_is_named(device, monkeypatch, changes, reason):
    other = Gpu(msgspec.structs.replace(L4, **changes))
    monkeypatch.setattr(headrace.gpu, "open_driver", lambda: other)
    assert gpu_obstacle().reason.startswith(reason)
    assert "--machine" not in gpu_obstacle().reason
    assert other.is_closed


def test_auto_decodes_on_a_gpu_that_it_compiles_for(device, model, monkeypatch):
    built = []
    monkeypatch.setattr(megakernel.gpu_build, "build_for_gpu", lambda *asked: built.append(asked[1].name))
    for config in (config_from_mapping({"prefill": {"num_replicas": 0}}), CUDA_CONFIG):
        made = executable(config, model)
        assert made.execution.config.decode.executor == "megakernel-cuda"
        assert made.artifacts.decode is None
    assert built == ["l4", "l4"]


def test_kernels_that_do_not_compile_are_no_kernels(device, model, monkeypatch):
    monkeypatch.setattr(megakernel.gpu_build, "build_for_gpu", raising(BuildError("it spills")))
    monkeypatch.setattr(headrace.artifacts, "has_cuda", lambda: True)
    made = executable(config_from_mapping({}), model)
    assert made.execution.config.decode.executor == "torch"
    assert made.execution.obstacle.reason == "it spills"
    with pytest.raises(ExecutionError, match="megakernel-cuda, which cannot run here: it spills"):
        executable(CUDA_CONFIG, model)


def test_who_names_another_executor_opens_no_gpu(model, monkeypatch):
    monkeypatch.setattr(headrace.artifacts, "gpu_obstacle", raising(AssertionError("opened")))
    executable(config_from_mapping({"decode": {"executor": "torch"}}), model)


@pytest.mark.parametrize(
    "error",
    [
        ResidencyError("132 blocks are wanted at once"),
        CudaError("cuMemAlloc", "CUDA_ERROR_OUT_OF_MEMORY"),
        CudaUnavailableError("no CUDA device 0"),
        BuildError("no nvcc"),
    ],
)
def test_a_worker_says_why_its_gpu_does_not_do(device, model, monkeypatch, error):
    monkeypatch.setattr(megakernel.gpu_build, "build_for_gpu", raising(error))
    with pytest.raises(ExecutionError, match=f"cannot run on this worker's GPU: {error}"):
        _gpu_executor(model, num_blocks=8, block_size_tokens=16)


def test_every_bucket_of_decode_is_compiled(model):
    recipe = gpu_recipe(model, small_gpu())
    assert recipe.buckets == (1, 2, 4, 8, 16, 32, 64)
    assert (recipe.kv_format, recipe.machine.num_workers) == ("float16", small_gpu().num_workers)


def test_an_executor_is_opened_from_what_was_compiled(device, model, monkeypatch):
    """nvcc and all, but for a GPU."""
    try:
        find_nvcc()
    except ToolMissingError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(megakernel.gpu_build, "MAX_DECODE_ROWS", 2)
    monkeypatch.setattr("headrace.build.gpu_machine", small_gpu)
    monkeypatch.setattr("megakernel.cuda_runtime.open_driver", lambda: device)
    executor = _gpu_executor(model, num_blocks=8, block_size_tokens=24)
    assert executor.buckets == (1, 2)
    assert (executor.layout.dtype, executor.layout.block_size_tokens) == ("float16", 24)
    executor.close()
    assert device.is_closed
