"""gRPC: the same requests, checks and answers."""

import asyncio

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.wire import headrace_pb2 as pb
from cluster.wire.headrace_pb2_grpc import InferenceStub
from router.grpc_server import RouterStartError
from tests.router.conftest import MODEL, eventually
from tests.router.scripted_workers import completion_ids


@pytest.fixture
async def channel(cluster):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{cluster.router.grpc_port}") as channel:
        yield channel


def ids_of(*token_ids):
    return pb.TokenIds(ids=token_ids)


async def ask(channel, metadata=(), **fields):
    request = pb.InferenceRequest(**({"model": MODEL} | fields))
    return [r async for r in InferenceStub(channel).Generate(request, metadata=metadata, timeout=10)]


async def test_tokens_stream_in_order_and_end_with_usage(channel, cluster, tokenizer):
    responses = await ask(channel, token_ids=ids_of(5, 6, 7), max_tokens=6, seed=2**64 - 1, temperature=0.8)
    tokens = [token.token_id for response in responses for token in response.tokens]
    assert tokens == completion_ids(tokenizer, (5, 6, 7), 2**64 - 1, 6)
    assert [r.first_index for r in responses] == list(range(7))
    *rest, last = responses
    assert not any(r.finish_reason for r in rest)
    assert last.finish_reason == "length"
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 6)
    sampling = cluster.decode.seen.generates[0].sampling
    assert sampling.temperature == 0.8, "the decimal that was meant, not its float32"


async def test_text_and_chat_prompts(channel, cluster, tokenizer):
    await ask(channel, prompt="hello", max_tokens=1)
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hello<|im_end|>")])
    await ask(channel, chat=chat, max_tokens=1, logprobs=2)
    text, conversation = cluster.decode.seen.generates
    assert list(text.prompt_token_ids) == tokenizer.encode("hello", allow_special=True)
    specials = [i for i in conversation.prompt_token_ids if i in tokenizer.special_ids]
    assert [tokenizer.token_text(i) for i in specials] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert conversation.sampling.num_logprobs == 2


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"model": "other", "prompt": "x"}, grpc.StatusCode.NOT_FOUND, "model"),
        ({}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        ({"prompt": ""}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        ({"token_ids": ids_of()}, grpc.StatusCode.INVALID_ARGUMENT, "token_ids"),
        ({"token_ids": ids_of(10**6)}, grpc.StatusCode.INVALID_ARGUMENT, "token_ids"),
        ({"chat": pb.ChatMessages()}, grpc.StatusCode.INVALID_ARGUMENT, "chat"),
        (
            {"chat": pb.ChatMessages(messages=[pb.ChatMessage(role="robot")])},
            grpc.StatusCode.INVALID_ARGUMENT,
            "role",
        ),
        ({"prompt": "x", "max_tokens": 0}, grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
        ({"prompt": "x", "max_tokens": 2**32 - 1}, grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
        ({"prompt": "x", "temperature": -1}, grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        ({"prompt": "x", "temperature": float("nan")}, grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        ({"prompt": "x", "top_p": float("inf")}, grpc.StatusCode.INVALID_ARGUMENT, "top_p"),
        ({"prompt": "x", "top_p": 0}, grpc.StatusCode.INVALID_ARGUMENT, "top_p"),
        ({"prompt": "x", "min_p": 2}, grpc.StatusCode.INVALID_ARGUMENT, "min_p"),
        ({"prompt": "x", "stop": ["x"] * 17}, grpc.StatusCode.INVALID_ARGUMENT, "stop"),
        ({"prompt": "x", "logprobs": 21}, grpc.StatusCode.INVALID_ARGUMENT, "logprobs"),
        ({"prompt": "x", "deadline_ms": 0}, grpc.StatusCode.INVALID_ARGUMENT, "deadline_ms"),
        ({"prompt": "x", "session_id": "a b"}, grpc.StatusCode.INVALID_ARGUMENT, "session_id"),
        ({"prompt": "mill " * 300}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
    ],
    ids=str,
)
async def test_bad_requests_name_their_field(channel, fields, code, param):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await ask(channel, **fields)
    assert error.value.code() is code
    trailers = dict(error.value.trailing_metadata())
    assert trailers["headrace-error-param"] == param
    assert param in error.value.details()


async def test_unavailable_says_when_to_try_again(make_cluster):
    cluster = await make_cluster(decodes=0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{cluster.router.grpc_port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await ask(channel, prompt="x")
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert dict(error.value.trailing_metadata())["retry-after-ms"] == "1000"


async def test_deadline_tenant_and_hop_come_as_metadata(channel, cluster):
    cluster.decode.behaviour.hang_at = 2
    metadata = (
        ("authorization", "Bearer k"),
        ("x-headrace-deadline-ms", "100"),
        ("x-headrace-prefill-hop", "never"),
    )
    *_, last = await ask(channel, metadata, prompt="x", max_tokens=9, session_id="s")
    assert last.finish_reason == "deadline"
    (generate,) = cluster.decode.seen.generates
    assert generate.tenant
    assert generate.session_id == f"{generate.tenant}:s"


async def test_a_cancelled_call_cancels_the_sequence(channel, cluster):
    cluster.decode.behaviour.step_delay_s = 0.01
    request = pb.InferenceRequest(model=MODEL, prompt="x", max_tokens=200)
    call = InferenceStub(channel).Generate(request)
    await call.read()
    call.cancel()
    await eventually(lambda: len(cluster.decode.seen.cancels) == 1)
    await eventually(
        lambda: cluster.metric("headrace_requests_total", route="grpc", outcome="cancelled") == 1
    )


async def test_health_follows_readiness(cluster, channel):
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service="headrace.v1.Inference")
    assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
    cluster.directory.workers.clear()
    watch = stub.Watch(request)
    async with asyncio.timeout(5):
        while (await watch.read()).status != health_pb2.HealthCheckResponse.NOT_SERVING:
            pass
    watch.cancel()


async def test_reflection_lists_the_service(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    response = await call.read()
    names = {service.name for service in response.list_services_response.service}
    assert {"headrace.v1.Inference", "grpc.health.v1.Health"} <= names
    call.cancel()


async def test_replicas_share_the_port_and_others_are_named(cluster, make_cluster):
    port = cluster.router.grpc_port
    second = await make_cluster(grpc_port=port)
    assert second.router.grpc_port == port
    listener = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    taken = listener.sockets[0].getsockname()[1]
    async with listener:
        with pytest.raises(RouterStartError, match=r"router\.grpc_port"):
            await make_cluster(grpc_port=taken)


async def test_stop_is_safe_to_repeat(make_cluster):
    cluster = await make_cluster()
    await cluster.router.stop()
    await cluster.router.stop()
