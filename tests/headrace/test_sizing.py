import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import HeadraceConfig, config_from_mapping
from headrace.sizing import Machine, SizingError, gpus_per_worker, resolve

MIB = 2**20


def resolved(config=None, *, memory_bytes=8192 * MIB, cores=2, bytes_per_token=46080, trained=8192):
    return resolve(
        config_from_mapping(config or {}),
        machine=Machine(num_cores=cores, available_memory_bytes=memory_bytes),
        bytes_per_token=bytes_per_token,
        trained_context_tokens=trained,
    )


def test_a_roomy_machine_gets_the_defaults():
    config = resolved()
    assert config.model.max_context_tokens == 8192
    assert config.prefill.kv_pool_tokens == config.decode.kv_pool_tokens == 16384
    assert config.prefill.num_threads == config.decode.num_threads == 2


def test_what_is_configured_stands():
    config = resolved(
        {
            "model": {"max_context_tokens": 512},
            "prefill": {"kv_pool_tokens": 600, "num_threads": 3},
            "decode": {"kv_pool_tokens": 1000, "num_threads": 1},
        }
    )
    assert config.model.max_context_tokens == 512
    assert (config.prefill.kv_pool_tokens, config.prefill.num_threads) == (600, 3)
    assert (config.decode.kv_pool_tokens, config.decode.num_threads) == (1000, 1)


def test_little_memory_shortens_a_context_that_nobody_chose():
    config = resolved(memory_bytes=1024 * MIB, bytes_per_token=65536, trained=131072)
    assert config.model.max_context_tokens == 4096
    assert config.decode.kv_pool_tokens == 4096


@pytest.mark.parametrize(
    ("engine", "changes", "expected"),
    [
        ("megakernel", {}, 256),
        ("torch", {"kv_pool_tokens": 16384}, 256),
        ("torch", {"max_tokens_per_step": 5000}, 5000),
        ("tensorrt", {"staging_mb": 1024}, 8192),
        ("tensorrt", {"staging_mb": 1024, "kv_pool_tokens": 3000}, 3000),
        ("tensorrt", {"max_tokens_per_step": 100}, 100),
        # 45 KiB a token.
        ("tensorrt", {}, 5825),
        ("tensorrt", {"staging_mb": 1}, 22),
    ],
)
def test_a_step_is_as_long_as_suits_the_engine(engine, changes, expected):
    config = resolved({"prefill": {"engine": engine, **changes}})
    assert config.prefill.max_tokens_per_step == expected


def test_a_step_of_tensorrt_is_no_longer_than_the_context():
    prefill = {"engine": "tensorrt", "staging_mb": 1024}
    config = resolved({"model": {"max_context_tokens": 2000}, "prefill": prefill})
    assert config.prefill.max_tokens_per_step == 2000


def test_a_chosen_step_of_tensorrt_must_fit_into_its_staging_memory():
    prefill = {"engine": "tensorrt", "staging_mb": 1, "max_tokens_per_step": 100}
    with pytest.raises(SizingError, match=r"`prefill.staging_mb` 1 holds KV of 22 tokens, and .* is 100"):
        resolved({"prefill": prefill})
    assert resolved({"prefill": {**prefill, "max_tokens_per_step": 22}}).prefill.max_tokens_per_step == 22
    assert resolved({"prefill": {**prefill, "engine": "torch"}}).prefill.max_tokens_per_step == 100


def test_replicas_share_the_memory():
    one = resolved(memory_bytes=1024 * MIB, bytes_per_token=65536, trained=131072)
    two = resolved(
        {"decode": {"num_replicas": 2}}, memory_bytes=1024 * MIB, bytes_per_token=65536, trained=131072
    )
    assert two.decode.kv_pool_tokens == one.decode.kv_pool_tokens // 2


def test_a_small_pool_bounds_the_context():
    assert resolved({"decode": {"kv_pool_tokens": 1000}}).model.max_context_tokens == 1000


def test_too_little_memory_is_an_error_that_says_how_much_there_is():
    with pytest.raises(SizingError, match="100 MiB of available memory"):
        resolved(memory_bytes=100 * MIB, bytes_per_token=2**20)


def test_without_prefill_workers_nothing_divides_by_zero():
    assert resolved({"prefill": {"num_replicas": 0}}).decode.kv_pool_tokens == 16384


@pytest.mark.parametrize(
    ("num_gpus", "replicas", "expected"), [(0, 1, 0.0), (1, 1, 0.5), (1, 2, 0.333), (8, 2, 1.0)]
)
def test_gpus_are_shared_evenly(num_gpus, replicas, expected):
    config = config_from_mapping({"decode": {"num_replicas": replicas}})
    assert gpus_per_worker(num_gpus, config) == expected
    assert gpus_per_worker(num_gpus, config) * (replicas + 1) <= num_gpus


def test_every_rank_has_a_gpu_of_its_own():
    config = config_from_mapping({"prefill": {"tensor_parallel_size": 2}})
    assert gpus_per_worker(3, config) == 1.0
    with pytest.raises(SizingError, match="need 3 GPUs, and there are 2"):
        gpus_per_worker(2, config)


@given(
    memory_mib=st.integers(256, 2**20),
    bytes_per_token=st.integers(1024, 2**20),
    trained=st.integers(128, 2**18),
    replicas=st.integers(1, 8),
)
def test_every_pool_holds_a_context_and_the_share_is_kept(memory_mib, bytes_per_token, trained, replicas):
    memory = memory_mib * MIB
    try:
        config = resolved(
            {"decode": {"num_replicas": replicas}, "prefill": {"num_replicas": replicas}},
            memory_bytes=memory,
            bytes_per_token=bytes_per_token,
            trained=trained,
        )
    except SizingError:
        assert memory * 0.25 / (bytes_per_token * replicas) < 128
        return
    context = config.model.max_context_tokens
    for pool in (config.prefill.kv_pool_tokens, config.decode.kv_pool_tokens):
        assert context <= pool
        assert pool * bytes_per_token * replicas <= memory * 0.25
    assert context <= trained
    assert isinstance(config, HeadraceConfig)
