"""Greedy output of the PyTorch executors is the single-process oracle's, token by token, by every path.

The megakernel multiplies quantized activations, as llama.cpp does: `tests/megakernel` compares it with a
model of its own arithmetic.
"""

from collections.abc import Iterator

import pytest
import torch

from megakernel.model.load import open_model
from megakernel.reference import reference_generate
from tests.e2e.inference import generate_all, greedy
from tests.e2e.local_cluster import LocalCluster
from tests.e2e.prompts import LENGTHS, prompt_token_ids

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def torch_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """The packaged model in PyTorch, in float32 throughout."""
    cluster = LocalCluster.at(tmp_path_factory.mktemp("torch") / "home")
    cluster.up("--executor", "torch")
    yield cluster
    cluster.down()
    cluster.assert_nothing_left()


def _oracle(prompts, num_tokens):
    torch.set_num_threads(2)
    weights = open_model("smollm2-135m-instruct").weights
    return [reference_generate(weights, prompt, num_tokens) for prompt in prompts]


def _check(cluster, tokenizer, lengths, num_tokens):
    prompts = [prompt_token_ids(tokenizer, length, index) for index, length in enumerate(lengths)]
    expected = _oracle(prompts, num_tokens)
    requests = [greedy(cluster.model, prompt, num_tokens) for prompt in prompts]
    handoffs_before = cluster.metrics().total("headrace_handoffs_sent_total", outcome="acknowledged")
    for hop in ("never", "always"):
        for concurrency in (1, 8):
            # A tenant of its own for each pass, or the prefix cache would skip the path under test.
            tenant = f"Bearer {hop}-{concurrency}-{num_tokens}"
            metadata = (("authorization", tenant), ("x-headrace-prefill-hop", hop))
            answers = generate_all(cluster.grpc_address, requests, concurrency, metadata)
            for length, answer, tokens in zip(lengths, answers, expected, strict=True):
                where = f"prompt of {length}, hop {hop}, {concurrency} at a time"
                assert answer.token_ids == tokens, where
                # A few first tokens may be shared with another prompt of this pass; no block is.
                assert answer.cached_tokens < 16, where
    handoffs = cluster.metrics().total("headrace_handoffs_sent_total", outcome="acknowledged")
    assert handoffs - handoffs_before == 2 * len(prompts)


@pytest.mark.slow
def test_a_few_prompts(torch_cluster, tokenizer):
    assert torch_cluster.state()["execution"] == "decode torch, prefill torch, KV float32"
    _check(torch_cluster, tokenizer, (5, 16, 33, 150), 12)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_prompts_of_5_to_600_tokens(torch_cluster, tokenizer):
    _check(torch_cluster, tokenizer, LENGTHS, 64)
