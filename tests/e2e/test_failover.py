"""Workers killed while they serve: the client sees time pass, and nothing else."""

import openai
import pytest

from tests.e2e.failures import kill_replica, wait_for_workers

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture
def client(cluster):
    with openai.OpenAI(base_url=f"{cluster.http_url}/v1", api_key="failover", max_retries=0) as client:
        yield client


def _request(cluster, prompt, **more):
    return {
        "model": cluster.model,
        "prompt": prompt,
        "max_tokens": 80,
        "temperature": 0.8,
        "seed": 11,
        "extra_body": {"ignore_eos": True},
        **more,
    }


def test_a_killed_decode_worker_leaves_no_gap_and_no_duplicate(cluster, client):
    # Long enough that it is not over when its worker has been found, and without the drafts of its first run.
    request = _request(cluster, "Once upon a time in a harbour", max_tokens=500)
    request["extra_body"]["speculation"] = False
    undisturbed = client.completions.create(**request).choices[0].text
    text = ""
    for index, chunk in enumerate(client.completions.create(**request, stream=True)):
        text += chunk.choices[0].text
        if index == 5:
            kill_replica(cluster, "DecodeWorker")
    assert text == undisturbed
    assert cluster.metrics().total("headrace_retries_total", what="decode") >= 1
    wait_for_workers(cluster, "decode")


def test_a_killed_prefill_worker_costs_nothing_but_time(cluster, client):
    prompt = "The council counted the boats again this spring. " * 60
    request = _request(cluster, prompt, extra_headers={"x-headrace-prefill-hop": "always"})
    undisturbed = client.completions.create(**request).choices[0].text
    kill_replica(cluster, "PrefillWorker")
    with openai.OpenAI(base_url=f"{cluster.http_url}/v1", api_key="another", max_retries=0) as other:
        assert other.completions.create(**request).choices[0].text == undisturbed
    wait_for_workers(cluster, "prefill")
