"""Greedy output of the cluster is the single-process oracle's, token by token, by every path."""

import pytest
import torch

from megakernel.model.load import open_model
from megakernel.reference import reference_generate
from tests.e2e.inference import generate_all, greedy
from tests.e2e.prompts import LENGTHS, prompt_token_ids

pytestmark = pytest.mark.e2e


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


def test_a_few_prompts(cluster, tokenizer):
    _check(cluster, tokenizer, (5, 16, 33, 150), 12)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_prompts_of_5_to_600_tokens(cluster, tokenizer):
    _check(cluster, tokenizer, LENGTHS, 64)
