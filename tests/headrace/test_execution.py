import pytest

from cluster.config import config_from_mapping
from headrace.execution import ExecutionError, Facts, Obstacle, choose, summary

NO_COMPILER = Obstacle("no C++ compiler", "install g++")
NO_TENSORRT = Obstacle("tensorrt_llm is not installed", "install it")
NO_GPU = Obstacle("there is no NVIDIA GPU", "none on this machine")
TENSORRT = {"tensorrt_obstacle": None}
A_GPU = {"has_cuda": True, "gpu_obstacle": None}


def chosen(config=None, *, has_cuda=False, obstacle=None, gpu_obstacle=NO_GPU, tensorrt_obstacle=NO_TENSORRT):
    facts = Facts(
        has_cuda=has_cuda,
        obstacle=obstacle,
        gpu_obstacle=gpu_obstacle,
        tensorrt_obstacle=tensorrt_obstacle,
    )
    return choose(config_from_mapping(config or {}), facts)


@pytest.mark.parametrize(
    ("config", "facts", "expected"),
    [
        ({}, {}, "decode megakernel, prefill megakernel, KV float16"),
        ({}, {"has_cuda": True}, "decode torch, prefill torch, KV float32"),
        ({}, {"obstacle": NO_COMPILER}, "decode torch, prefill torch, KV float32"),
        ({"prefill": {"num_replicas": 0}}, {}, "decode megakernel, prefill none, KV float16"),
        ({"prefill": {"engine": "torch"}}, {}, "decode megakernel, prefill torch, KV float16"),
        ({"decode": {"executor": "torch"}}, {}, "decode torch, prefill torch, KV float32"),
        ({"decode": {"executor": "noop"}}, {}, "decode noop, prefill torch, KV float32"),
        (
            {"decode": {"executor": "torch"}, "prefill": {"engine": "megakernel"}},
            {},
            "decode torch, prefill megakernel, KV float32",
        ),
        ({"model": {"kv_dtype": "float32"}}, {}, "decode megakernel, prefill megakernel, KV float32"),
        (
            {"model": {"kv_dtype": "float16"}, "decode": {"executor": "torch"}},
            {},
            "decode torch, prefill torch, KV float16",
        ),
        (
            {"decode": {"executor": "megakernel"}},
            {"has_cuda": True},
            "decode megakernel, prefill megakernel, KV float16",
        ),
        (
            {"decode": {"block_size_tokens": 8}},
            {},
            "decode torch, prefill torch, KV float32",
        ),
        ({}, A_GPU, "decode megakernel-cuda, prefill torch, KV float16"),
        ({}, A_GPU | {"obstacle": NO_COMPILER}, "decode megakernel-cuda, prefill torch, KV float16"),
        ({}, A_GPU | {"has_cuda": False}, "decode megakernel-cuda, prefill torch, KV float16"),
        (
            {"decode": {"block_size_tokens": 8}},
            A_GPU,
            "decode megakernel-cuda, prefill torch, KV float16",
        ),
        (
            {"decode": {"executor": "megakernel-cuda"}, "prefill": {"engine": "megakernel"}},
            A_GPU,
            "decode megakernel-cuda, prefill megakernel, KV float16",
        ),
        ({"decode": {"executor": "megakernel"}}, A_GPU, "decode megakernel, prefill megakernel, KV float16"),
        ({"decode": {"executor": "torch"}}, A_GPU, "decode torch, prefill torch, KV float32"),
        ({"model": {"kv_dtype": "float32"}}, A_GPU, "decode torch, prefill torch, KV float32"),
        ({}, A_GPU | TENSORRT, "decode megakernel-cuda, prefill tensorrt, KV float16"),
        (
            {"prefill": {"engine": "torch"}},
            A_GPU | TENSORRT,
            "decode megakernel-cuda, prefill torch, KV float16",
        ),
        ({}, TENSORRT, "decode megakernel, prefill megakernel, KV float16"),
        ({"prefill": {"engine": "tensorrt"}}, TENSORRT, "decode megakernel, prefill tensorrt, KV float16"),
        ({"model": {"artifact": "/a"}}, A_GPU, "decode torch, prefill torch, KV float32"),
        (
            {"model": {"artifact": "/a"}},
            A_GPU | {"has_cuda": False},
            "decode megakernel, prefill megakernel, KV float16",
        ),
    ],
)
def test_choices(config, facts, expected):
    assert summary(chosen(config, **facts).config) == expected


def test_why_prefill_is_not_in_tensorrt_is_said_where_there_is_a_gpu():
    assert chosen(**A_GPU).prefill_obstacle == NO_TENSORRT
    assert chosen().prefill_obstacle is None
    assert chosen(**A_GPU, **TENSORRT).prefill_obstacle is None
    assert chosen({"prefill": {"engine": "torch"}}, **A_GPU).prefill_obstacle is None
    with pytest.raises(
        ExecutionError, match="tensorrt, which cannot run here: tensorrt_llm is not installed"
    ):
        chosen({"prefill": {"engine": "tensorrt"}})


def test_nixl_by_name_is_an_error_where_it_is_not_installed():
    facts = Facts(
        has_cuda=False,
        obstacle=None,
        gpu_obstacle=NO_GPU,
        tensorrt_obstacle=NO_TENSORRT,
        nixl_obstacle=Obstacle("it is not installed", "install it"),
    )
    choose(config_from_mapping({}), facts)
    with pytest.raises(
        ExecutionError, match=r"is nixl, .*not installed\. Fix: install it, or set .* to auto"
    ):
        choose(config_from_mapping({"transfer": {"transport": "nixl"}}), facts)
    chosen({"transfer": {"transport": "nixl"}})


def test_tensor_parallel_prefill_is_tensorrts_alone():
    config = {"prefill": {"tensor_parallel_size": 2}}
    with pytest.raises(ExecutionError, match="runs in megakernel, on one device"):
        chosen(config)
    assert chosen(config, **A_GPU, **TENSORRT).config.prefill.tensor_parallel_size == 2


def test_nothing_is_left_to_be_chosen():
    config = chosen().config
    assert "auto" not in (config.decode.executor, config.prefill.engine, config.model.kv_dtype)


def test_what_nobody_asked_for_is_explained():
    assert chosen(obstacle=NO_COMPILER).obstacle == NO_COMPILER
    assert chosen(has_cuda=True).obstacle == NO_GPU
    assert "float16" in chosen({"model": {"kv_dtype": "float32"}}, **A_GPU).obstacle.reason
    assert "for a CPU" in chosen({"model": {"artifact": "/a"}}, **A_GPU).obstacle.reason
    assert "multiple of 16" in chosen({"decode": {"block_size_tokens": 24}}).obstacle.reason
    assert chosen({"decode": {"block_size_tokens": 24}}).obstacle.fix.endswith("32")


@pytest.mark.parametrize("config", [{}, {"decode": {"executor": "torch"}}, {"decode": {"executor": "noop"}}])
def test_what_was_asked_for_needs_no_explanation(config):
    assert chosen(config).obstacle is None
    if config:
        assert chosen(config, obstacle=NO_COMPILER).obstacle is None


@pytest.mark.parametrize(
    "config", [{"decode": {"executor": "megakernel"}}, {"prefill": {"engine": "megakernel"}}]
)
def test_the_megakernel_by_name_is_an_error_where_it_cannot_be(config):
    with pytest.raises(ExecutionError, match=r"is megakernel, .*no C\+\+ compiler\. Fix: install g\+\+"):
        chosen(config, obstacle=NO_COMPILER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "is megakernel-cuda, which cannot run here: there is no NVIDIA GPU. Fix: none on this machine"),
        ({"model": {"kv_dtype": "float32"}}, 'float16 on a GPU. Fix: set `model.kv_dtype` to "float16"'),
    ],
)
def test_a_gpu_by_name_is_an_error_where_there_is_none_of_use(changes, message):
    with pytest.raises(ExecutionError, match=message):
        chosen({"decode": {"executor": "megakernel-cuda"}} | changes)
