"""Token ids through the cluster's gRPC API, alone or several at a time."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import grpc

from cluster.wire import headrace_pb2 as pb
from cluster.wire.headrace_pb2_grpc import InferenceStub


@dataclass(frozen=True)
class Completion:
    token_ids: list[int]
    text: str
    finish_reason: str
    cached_tokens: int


def generate(
    address: str, request: pb.InferenceRequest, metadata: Sequence[tuple[str, str]] = ()
) -> Completion:
    """One request over a channel of its own; asserts that tokens arrive without gap or duplicate."""
    with grpc.insecure_channel(address) as channel:
        token_ids: list[int] = []
        text = ""
        last = None
        for response in InferenceStub(channel).Generate(request, metadata=tuple(metadata), timeout=240):
            if response.tokens:
                assert response.first_index == len(token_ids)
                token_ids += [token.token_id for token in response.tokens]
            text += response.text
            last = response
    assert last is not None
    return Completion(token_ids, text, last.finish_reason, last.usage.cached_tokens)


def generate_all(
    address: str,
    requests: Sequence[pb.InferenceRequest],
    concurrency: int,
    metadata: Sequence[tuple[str, str]] = (),
) -> list[Completion]:
    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(lambda request: generate(address, request, metadata), requests))


def greedy(model: str, prompt: Sequence[int], max_tokens: int) -> pb.InferenceRequest:
    return pb.InferenceRequest(
        model=model, token_ids=pb.TokenIds(ids=prompt), max_tokens=max_tokens, temperature=0, ignore_eos=True
    )


def generate_and_leave(
    address: str,
    request: pb.InferenceRequest,
    metadata: Sequence[tuple[str, str]] = (),
    *,
    after_s: float | None = None,
    at_token: int | None = None,
) -> Completion:
    """As `generate`, by a client that cancels its call then. `finish_reason`: empty where the call was not
    over by then."""
    with grpc.insecure_channel(address) as channel:
        call = InferenceStub(channel).Generate(request, metadata=tuple(metadata), timeout=240)
        timer = threading.Timer(after_s or 0.0, call.cancel)
        if after_s is not None:
            timer.start()
        answer = Completion([], "", "", 0)
        try:
            for response in call:
                assert response.first_index == len(answer.token_ids)
                answer.token_ids.extend([token.token_id for token in response.tokens])
                if response.finish_reason:
                    answer = replace(answer, finish_reason=response.finish_reason)
                elif at_token is not None and len(answer.token_ids) >= at_token:
                    call.cancel()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.CANCELLED:
                raise
        finally:
            timer.cancel()
    return answer
