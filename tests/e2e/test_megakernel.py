"""The default cluster runs in the megakernel, from one artifact in the user's cache."""

import os
from pathlib import Path

import pytest

from tests.e2e.inference import generate_all, greedy
from tests.e2e.prompts import prompt_token_ids

pytestmark = pytest.mark.e2e

PROMPT_LENGTHS = (5, 16, 33, 150, 320)
NUM_TOKENS = 24


def test_the_megakernel_serves(cluster):
    assert str(cluster.state()["execution"]).startswith("decode megakernel, prefill megakernel, ")
    assert cluster.state()["note"] == ""
    artifacts = Path(os.environ["XDG_CACHE_HOME"]) / "headrace" / "artifacts"
    assert list(artifacts.glob("*/report.txt"))


def test_with_and_without_a_hop_the_tokens_are_the_same(cluster, tokenizer):
    """Prefill keeps and sends float16 KV, in which decode goes on as in its own."""
    prompts = [prompt_token_ids(tokenizer, length, index) for index, length in enumerate(PROMPT_LENGTHS)]
    requests = [greedy(cluster.model, prompt, NUM_TOKENS) for prompt in prompts]
    before = cluster.metrics().total("headrace_handoffs_sent_total", outcome="acknowledged")
    tokens = {}
    for hop in ("never", "always"):
        # A tenant of its own for each pass, or the prefix cache would skip the path under test.
        metadata = (("authorization", f"Bearer megakernel-{hop}"), ("x-headrace-prefill-hop", hop))
        answers = generate_all(cluster.grpc_address, requests, 4, metadata)
        tokens[hop] = [answer.token_ids for answer in answers]
    handoffs = cluster.metrics().total("headrace_handoffs_sent_total", outcome="acknowledged")
    assert handoffs - before == len(prompts)
    assert tokens["always"] == tokens["never"]
