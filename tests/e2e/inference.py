"""Token ids through the cluster's gRPC API, alone or several at a time."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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
