"""`campaign` and `speculation`: from HTTP and gRPC to the decode worker."""

from cluster.ids import RequestId
from cluster.messages import GenerateRequest, SamplingParams
from cluster.wire import conversions
from tests.router.test_failover import body


async def test_both_reach_the_worker(cluster):
    await cluster.http.post("/v1/completions", json=body(campaign="spring", speculation=False))
    headers = {"x-headrace-campaign": "autumn"}
    await cluster.http.post("/v1/completions", json=body(), headers=headers)
    await cluster.http.post("/v1/completions", json=body())
    seen = [(one.campaign, one.speculate) for one in cluster.decode.seen.generates]
    assert seen == [("spring", False), ("autumn", True), ("", True)]


async def test_bad_ones_are_refused_by_name(cluster):
    for fields, headers, named in (
        ({"campaign": "x" * 129}, {}, "campaign"),
        ({"speculation": "no"}, {}, "speculation"),
        ({}, {"x-headrace-campaign": "two words"}, "x-headrace-campaign"),
        ({"campaign": "a"}, {"x-headrace-campaign": "b"}, "campaign"),
    ):
        response = await cluster.http.post("/v1/completions", json=body(**fields), headers=headers)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == named


def test_a_request_crosses_the_wire_with_them():
    request = GenerateRequest(
        request_id=RequestId("r"),
        prompt_token_ids=(1,),
        sampling=SamplingParams(max_tokens=1, seed=0),
        campaign="spring",
        speculate=False,
    )
    message = conversions.generate_request_to_proto(request)
    assert conversions.generate_request_from_proto(message) == request
    message.ClearField("speculate")
    assert conversions.generate_request_from_proto(message).speculate, "absent: true"
