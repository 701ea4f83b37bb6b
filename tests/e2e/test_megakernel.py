"""The default cluster decodes in the megakernel, from one artifact in the user's cache."""

import os
from pathlib import Path

import pytest

from cluster.wire import headrace_pb2 as pb
from tests.e2e.inference import generate_all

pytestmark = pytest.mark.e2e

PROMPTS = (
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,",
    "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, Monday, Tuesday, Wednesday,",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z a b c d e f g h",
    "January, February, March, April, May, June, July, August, September, October, November, December,",
)
"""With one likely continuation each: PyTorch prefill rounds otherwise than the megakernel, and may tip a
balance between two tokens."""


def greedy_text(model: str, prompt: str, num_tokens: int) -> pb.InferenceRequest:
    return pb.InferenceRequest(
        model=model, prompt=prompt, max_tokens=num_tokens, temperature=0, ignore_eos=True
    )


def test_the_megakernel_serves(cluster):
    assert str(cluster.state()["execution"]).startswith("decode megakernel, ")
    assert cluster.state()["note"] == ""
    artifacts = Path(os.environ["XDG_CACHE_HOME"]) / "headrace" / "artifacts"
    assert list(artifacts.glob("*/report.txt"))


def test_with_and_without_a_hop_the_tokens_are_the_same(cluster):
    """Prefill keeps and sends float16 KV, in which decode goes on."""
    answers = {}
    requests = [greedy_text(cluster.model, prompt) for prompt in PROMPTS]
    before = cluster.metrics().total("headrace_handoffs_sent_total", outcome="acknowledged")
    for hop in ("never", "always"):
        # A tenant of its own for each pass, or the prefix cache would skip the path under test.
        metadata = (("authorization", f"Bearer megakernel-{hop}"), ("x-headrace-prefill-hop", hop))
        answers[hop] = [answer.text for answer in generate_all(cluster.grpc_address, requests, 4, metadata)]
    handoffs = cluster.metrics().total("headrace_handoffs_sent_total", outcome="acknowledged")
    assert handoffs - before == len(PROMPTS)
    assert answers["always"] == answers["never"]
