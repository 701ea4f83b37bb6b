"""The engine over a real, tiny model: the oracle's tokens, whatever the company, the drafts or the cache."""

import random

import pytest

from cluster.config import DecodeConfig
from cluster.messages import SamplingParams
from decode_workers.draft_tree import DraftTree
from decode_workers.sequence import Sequence
from decode_workers.step_batch import NO_PARENT
from decode_workers.torch_executor import TorchExecutor
from megakernel.reference import reference_generate
from tests.decode_workers.draft_support import EqualShares
from tests.decode_workers.support import EngineRig, drawn, greedy, request_of
from tests.tiny_model import TinyWeights, tiny_weights

GREEDY, DRAWN = greedy(10, ignore_eos=True), drawn(10, ignore_eos=True, top_p=0.95)


@pytest.fixture(scope="module")
def weights() -> TinyWeights:
    return tiny_weights(3)


@pytest.fixture(scope="module")
def alone(weights: TinyWeights) -> dict[str, list[int]]:
    """Each request's tokens when nobody else is there."""
    tokens: dict[str, list[int]] = {}
    for request_id, (prompt, sampling) in asked().items():
        rig = rig_of(weights)
        rig.submit(request_of(request_id, prompt, sampling))
        tokens[request_id] = rig.run().tokens(request_id)
    return tokens


def asked() -> dict[str, tuple[list[int], SamplingParams]]:
    rng = random.Random(4)
    return {
        f"{name}{i}": ([rng.randrange(160) for _ in range(length)], sampling)
        for i, length in enumerate((1, 5, 17, 40))
        for name, sampling in (("greedy", GREEDY), ("drawn", DRAWN))
    }


def rig_of(weights: TinyWeights, config: DecodeConfig | None = None, **changes: object) -> EngineRig:
    executor = TorchExecutor(weights, "tiny", num_blocks=80, block_size_tokens=8, num_threads=1)
    return EngineRig(executor, config, **changes)  # type: ignore[arg-type]


def test_greedy_is_the_oracles(weights: TinyWeights, alone: dict[str, list[int]]) -> None:
    for request_id, (prompt, sampling) in asked().items():
        if sampling is GREEDY:
            assert alone[request_id] == list(reference_generate(weights, prompt, 10)), request_id


@pytest.mark.parametrize("max_rows", [5, 64])
def test_company_changes_no_token(weights: TinyWeights, alone: dict[str, list[int]], max_rows: int) -> None:
    rig = rig_of(weights, DecodeConfig(max_rows_per_step=max_rows))
    for request_id, (prompt, sampling) in asked().items():
        rig.submit(request_of(request_id, prompt, sampling))
    rig.run()
    assert {request_id: rig.tokens(request_id) for request_id in alone} == alone


def test_drafts_change_no_token(weights: TinyWeights, alone: dict[str, list[int]]) -> None:
    rng = random.Random(5)

    def draft(sequence: Sequence, max_nodes: int) -> DraftTree:
        truth = alone[sequence.request.request_id][sequence.next_index :]
        token_ids, parents, right = [], [], [NO_PARENT]
        for _ in range(min(max_nodes, 7)):
            is_right = rng.random() < 0.6 and len(right) <= len(truth)
            parents.append(right[-1] if is_right else rng.choice(right))
            token_ids.append(truth[len(right) - 1] if is_right else rng.randrange(160))
            if is_right:
                right.append(len(token_ids) - 1)
        return DraftTree(token_ids=tuple(token_ids), parents=tuple(parents))

    rig = rig_of(weights, drafter=EqualShares(draft))
    for request_id, (prompt, sampling) in asked().items():
        rig.submit(request_of(request_id, prompt, sampling))
        rig.run()
    assert {request_id: rig.tokens(request_id) for request_id in alone} == alone
    steps = rig.engine.metrics.registry.get_sample_value("headrace_decode_steps_total")
    assert steps is not None
    assert steps < 10 * len(alone), "drafts were accepted"


def test_a_cached_prefix_and_a_replay_change_no_token(
    weights: TinyWeights, alone: dict[str, list[int]]
) -> None:
    rig = rig_of(weights)
    for request_id, (prompt, sampling) in asked().items():
        rig.submit(request_of(f"{request_id}-first", prompt, sampling))
        rig.run()
        rig.submit(request_of(request_id, prompt, sampling))
        rig.run()
        assert rig.tokens(request_id) == alone[request_id]
        assert rig.finished(request_id).usage.cached_tokens == len(prompt) - 1
        fresh = rig_of(weights)
        fresh.submit(request_of("replay", prompt, sampling, emitted_token_ids=tuple(alone[request_id][:6])))
        assert fresh.run().tokens("replay") == alone[request_id][6:]
