"""A seeded sample is a function of the request alone: not of its company, nor of the process."""

import pytest

from cluster.wire import headrace_pb2 as pb
from tests.e2e.inference import generate, generate_all

pytestmark = pytest.mark.e2e


def _sampled(model, prompt, seed):
    return pb.InferenceRequest(
        model=model, prompt=prompt, max_tokens=32, temperature=0.8, seed=seed, ignore_eos=True
    )


@pytest.mark.slow
def test_same_text_alone_in_a_batch_of_eight_and_after_a_restart(cluster, restarted_cluster):
    prompt = "The best thing about autumn in the mountains is"
    request = _sampled(cluster.model, prompt, 1234)
    alone = generate(cluster.grpc_address, request)
    company = [request] + [_sampled(cluster.model, f"{prompt} number {i}:", i) for i in range(7)]
    batched = generate_all(cluster.grpc_address, company, concurrency=8)
    assert batched[0].token_ids == alone.token_ids
    assert batched[0].text == alone.text
    assert len({answer.text for answer in batched}) == 8

    restarted = restarted_cluster()
    assert generate(restarted.grpc_address, request).text == alone.text
