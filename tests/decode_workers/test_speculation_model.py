"""Real models with drafts and without: the same tokens, texts, endings and logprobs, bit for bit."""

import random

import msgspec
import pytest

from cluster.config import DecodeConfig
from cluster.ids import RequestId
from cluster.messages import (
    EmittedToken,
    GenerateRequest,
    SamplingParams,
    SequenceFinished,
    TokensEmitted,
)
from cluster.model_card import ModelCard
from cluster.text import Tokenizer
from decode_workers.engine import DecodeEngine, Drafter
from decode_workers.executor import StepExecutor
from decode_workers.inbox import Inbox
from decode_workers.torch_executor import TorchExecutor
from tests.decode_workers.draft_support import HeldPhrases, RandomRows, Serving, phrases_of, ref_of
from tests.decode_workers.support import CARD, TOKENIZER, NoHandoffs, drawn, greedy
from tests.tiny_model import tiny_weights

Asked = list[GenerateRequest]
Outcomes = dict[str, tuple[list[EmittedToken], str, str]]


class Model(msgspec.Struct, frozen=True):
    executor: StepExecutor
    tokenizer: Tokenizer
    card: ModelCard

    def outcomes(self, asked: Asked, at_once: int, drafter: Drafter | None) -> Outcomes:
        """Tokens with their logprobs, text and finish reason of every request."""
        config = DecodeConfig(max_running_sequences=at_once)
        engine = DecodeEngine(
            self.executor,
            self.tokenizer,
            self.card,
            config,
            handoffs=NoHandoffs(),
            inbox=Inbox(),
            drafter=drafter,
        )
        outcomes: Outcomes = {}
        for request in asked:
            engine.roster.submit(request)
            outcomes[request.request_id] = ([], "", "")
        while engine.has_work:
            for event in engine.step():
                assert isinstance(event, TokensEmitted | SequenceFinished), event
                tokens, text, _ = outcomes[event.request_id]
                if isinstance(event, TokensEmitted):
                    assert event.first_index == len(tokens)
                    outcomes[event.request_id] = ([*tokens, *event.tokens], text + event.text, "")
                else:
                    outcomes[event.request_id] = (tokens, text + event.text, event.reason)
        return outcomes


def drafters(seed: int, said: Outcomes, tokenizer: Tokenizer) -> list[Serving]:
    """All sources with the real budget, and with random ones; some phrases are parts of what will be said."""
    rng = random.Random(seed)
    texts = [[token.token_id for token in tokens] for tokens, _, _ in said.values()]
    parts = [text[at : at + 6] for text in texts for at in (rng.randrange(1 + len(text)),)]
    phrases = HeldPhrases(tokenizer=tokenizer, some=phrases_of(parts, end_token=1 << 20))
    return [Serving(phrases, table=None), RandomRows(seed, phrases)]


def check(model: Model, asked: Asked, at_once: tuple[int, int, int, int]) -> None:
    """`at_once`: requests in company, two runs by drafter; 0: not run."""
    plain = model.outcomes(asked, 1, None)
    for drafter, companies in zip(
        drafters(3, plain, model.tokenizer), (at_once[:2], at_once[2:]), strict=True
    ):
        for together in filter(None, companies):
            # The second time the history has it all: as much is accepted as can be.
            assert model.outcomes(asked, together, drafter) == plain
        assert drafter.num_drafted > len(asked)


def requests(prompts: list[list[int]], samplings: list[SamplingParams]) -> Asked:
    return [
        GenerateRequest(
            request_id=RequestId(f"r{i}"),
            prompt_token_ids=tuple(prompt),
            sampling=msgspec.structs.replace(samplings[i % len(samplings)], seed=i),
            campaign=f"c{i % 3}",
            phrases=ref_of("some"),
        )
        for i, prompt in enumerate(prompts)
    ]


def test_a_tiny_model_says_the_same() -> None:
    executor = TorchExecutor(tiny_weights(3), "tiny", num_blocks=120, block_size_tokens=8, num_threads=1)
    rng = random.Random(1)
    prompts = [[rng.randrange(160) for _ in range(rng.randrange(1, 40))] for _ in range(8)]
    samplings = [
        greedy(24, ignore_eos=True, num_logprobs=2),
        greedy(24, ignore_eos=True),
        drawn(24, ignore_eos=True, num_logprobs=1, temperature=0.4),
        drawn(24, ignore_eos=True),
    ]
    check(Model(executor, TOKENIZER, CARD), requests(prompts, samplings), at_once=(1, 5, 1, 5))


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "num_prompts", [pytest.param(10, marks=pytest.mark.slow), pytest.param(200, marks=pytest.mark.exhaustive)]
)
def test_the_packaged_model_says_the_same(num_prompts: int) -> None:
    """Prompts of 128 tokens, alone and sixteen at once, under every drafter."""
    from benchmarks.creatives_texts import AUDIENCES, rewrite_prompts, template_prompts
    from decode_workers.megakernel_executor import MegaKernelExecutor
    from headrace.served_model import served_model
    from megakernel.artifact_cache import ArtifactCache
    from megakernel.machine import load_machine
    from megakernel.model.load import PACKAGED_MODEL, open_model
    from megakernel.recipe import recipe_for

    opened, served = open_model(PACKAGED_MODEL), served_model(PACKAGED_MODEL)
    recipe = recipe_for(opened, load_machine("cpu"), 2, "float16")
    compiled = ArtifactCache().find_or_build(recipe, opened.weights).artifact.load()
    executor = MegaKernelExecutor(compiled, opened.fingerprint, num_blocks=512, block_size_tokens=16)
    tokenizer = Tokenizer.of(served)
    texts = [*rewrite_prompts(), *template_prompts()]
    texts += [f"{text} {audience}" for text in texts for audience in AUDIENCES]
    chosen = texts[:: len(texts) // num_prompts][:num_prompts]
    prompts = [tokenizer.encode(text, allow_special=True) for text in chosen]
    assert len(prompts) == num_prompts
    samplings = [
        greedy(128, ignore_eos=True),
        drawn(128, ignore_eos=True, temperature=0.7, num_logprobs=0),
        greedy(128, ignore_eos=True, num_logprobs=3),
        drawn(128, ignore_eos=True, temperature=1.0, top_p=0.9),
        greedy(128, stop=("\n\n", "house")),
    ]
    check(Model(executor, tokenizer, served.card), requests(prompts, samplings), at_once=(1, 0, 16, 0))
    executor.close()
