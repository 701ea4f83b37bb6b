"""A cluster whose prefill worker runs the TensorRT-LLM engine, against the double: the oracle's tokens."""

import json
import os
from collections.abc import Iterator

import numpy as np
import pytest

from cluster.block_hash import chain_hashes, chain_salt
from cluster.placement.redis_store import RedisPlacementStore, connect
from megakernel.model.load import open_model
from megakernel.reference import reference_generate
from router.admission import tenant_of
from tests.cluster.test_membership import eventually
from tests.e2e.inference import generate_all, greedy
from tests.e2e.local_cluster import LocalCluster
from tests.megakernel.model.model_files import random_tensors, tiny_shape, write_hf_folder
from tests.tensorrt import DOUBLE, has_real_tensorrt

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(has_real_tensorrt(), reason="a real TensorRT-LLM is installed"),
]
LENGTHS = (5, 33, 64, 200, 300, 301, 302, 400)
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def tensorrt_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalCluster, str]]:
    folder = tmp_path_factory.mktemp("tensorrt")
    shape = tiny_shape("llama", max_context_tokens=512)
    write_hf_folder(folder / "tiny", shape, random_tensors(shape))
    config = folder / "headrace.toml"
    config.write_text(
        f"[model]\nsource = {json.dumps(str(folder / 'tiny'))}\n"
        "[decode]\nexecutor = 'torch'\nkv_pool_tokens = 16384\n"
        "[prefill]\nengine = 'tensorrt'\ntensor_parallel_size = 2\nkv_pool_tokens = 16384\nstaging_mb = 8\n"
    )
    path = os.pathsep.join([str(DOUBLE), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    cluster = LocalCluster.at(folder / "home")
    cluster.more_env = {"PYTHONPATH": path}
    cluster.model = "tiny"
    cluster.up("--config", str(config))
    yield cluster, str(folder / "tiny")
    cluster.down()
    cluster.assert_nothing_left()


def test_tokens_are_the_oracles_by_the_hop_and_without(tensorrt_cluster) -> None:
    cluster, source = tensorrt_cluster
    assert "prefill tensorrt" in cluster.state()["execution"]
    weights = open_model(source).weights
    dice = np.random.default_rng(0)
    prompts = [dice.integers(0, weights.shape.vocab_size, length).tolist() for length in LENGTHS]
    expected = [reference_generate(weights, prompt, NUM_TOKENS) for prompt in prompts]
    requests = [greedy(cluster.model, prompt, NUM_TOKENS) for prompt in prompts]
    before = handed_over(cluster)
    for hop in ("never", "always"):
        metadata = (("authorization", f"Bearer {hop}"), ("x-headrace-prefill-hop", hop))
        answers = generate_all(cluster.grpc_address, requests, 8, metadata)
        assert [answer.token_ids for answer in answers] == expected, f"hop {hop}"
    assert handed_over(cluster) - before == len(prompts)


def handed_over(cluster: LocalCluster) -> float:
    return cluster.metrics().total("headrace_handoffs_sent_total", outcome="acknowledged")


async def test_its_prefix_cache_is_in_the_placement_index(tensorrt_cluster) -> None:
    cluster, source = tensorrt_cluster
    vocab_size = open_model(source).weights.shape.vocab_size
    prompt = np.random.default_rng(1).integers(0, vocab_size, 300).tolist()
    metadata = (("authorization", "Bearer index"), ("x-headrace-prefill-hop", "always"))
    generate_all(cluster.grpc_address, [greedy(cluster.model, prompt, 1)], 1, metadata)
    url = str(cluster.state()["redis_url"])
    store = RedisPlacementStore(connect(url), cluster.model, block_ttl_s=60.0, op_timeout_s=5.0)
    prefill = next(record for record in await store.workers() if record.role == "prefill")
    size = prefill.block_size_tokens
    salt = chain_salt(prefill.layout_fingerprint, tenant_of("Bearer index"))

    async def is_held() -> bool:
        hits = await store.lookup(chain_hashes(prompt, size, salt), None)
        return hits.cached_blocks.get(prefill.address.worker_id) == 288 // size

    await eventually(is_held)
    await store.close()
