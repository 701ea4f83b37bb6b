"""The same beam search in the transformers library, held to the catalogue by `prefix_allowed_tokens_fn`."""

import random
from collections.abc import Sequence
from pathlib import Path as FilePath

import numpy as np
import pytest
import torch

from benchmarks.decode_peers import Transformers
from cluster.catalogue.sample import sample_briefs, sample_items
from cluster.text import Tokenizer
from decode_workers.torch_executor import TorchExecutor
from headrace.served_model import served_model
from megakernel.build import BuildError, find_compiler
from megakernel.model.load import open_model
from megakernel.model.weights import Weights
from tests.decode_workers.brute_force import TOLERANCE, Path, PrefixSets, Scored, is_same
from tests.decode_workers.random_catalogues import SHAPES, random_texts
from tests.decode_workers.support import EOS
from tests.decode_workers.targeting_rig import TargetingRig, toy_executor, toy_weights

pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

K = BEAMS = 20
MODEL = "smollm2-135m-instruct"
_NEVER_REACHED = -1e6
"""Sequences below are no items: what fills the beams where the catalogue has too few."""


class TheirTargeting:
    def __init__(self, weights: Weights, end_token: int) -> None:
        self.model = Transformers(weights, 1, np.zeros(1, dtype=np.int64), "float32").model
        self.end_token = end_token

    def ask(self, context: Sequence[int], items: PrefixSets) -> list[Scored]:
        """All finished beams, best first."""

        def allowed(_batch: int, ids: torch.Tensor) -> list[int]:
            # Of a beam that is none, they ask too.
            prefix = tuple(ids[len(context) :].tolist())
            return sorted(items.following.get(prefix, {self.end_token}))

        with torch.inference_mode():
            answer = self.model.generate(
                torch.tensor([list(context)]),
                attention_mask=torch.ones(1, len(context), dtype=torch.long),
                prefix_allowed_tokens_fn=allowed,
                num_beams=BEAMS,
                num_return_sequences=BEAMS,
                length_penalty=0.0,
                early_stopping=False,
                do_sample=False,
                max_new_tokens=max(len(path) for path in items.paths) + 1,
                eos_token_id=self.end_token,
                pad_token_id=self.end_token,
                return_dict_in_generate=True,
                output_scores=True,
            )
        found = zip(
            answer.sequences_scores.tolist(), answer.sequences[:, len(context) :].tolist(), strict=True
        )
        return [(score, self._path(ids)) for score, ids in found if score > _NEVER_REACHED]

    def _path(self, ids: list[int]) -> Path:
        """Padding is the end's token too."""
        return tuple(ids[: ids.index(self.end_token) + 1])


def test_a_toy_model_chooses_the_same_in_both(tmp_path: FilePath, record_figure) -> None:
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    executor = toy_executor(tmp_path)
    theirs = TheirTargeting(toy_weights(), EOS)
    dice = random.Random(3)
    num_same = 0
    for place, shape in enumerate([*SHAPES, *SHAPES]):
        folder = tmp_path / str(place)
        folder.mkdir()
        rig = TargetingRig(random_texts(dice, shape, dice.choice((8, 30, 300, 2_000))), folder, executor)
        for _ in range(4):
            context = [dice.randrange(EOS) for _ in range(dice.randint(1, 16))]
            found = rig.found(rig.ask(context, None, k=K, beams=BEAMS))
            assert is_same(found, theirs.ask(context, rig.sets), K), (shape, context)
            num_same += 1
    record_figure(f"targeting beside transformers, toy: {num_same} of {num_same} the same")
    executor.close()


def test_the_packaged_model_chooses_the_same_in_both(tmp_path: FilePath, record_figure) -> None:
    """In float32 on both sides."""
    served = served_model(MODEL)
    tokenizer = Tokenizer.of(served)
    weights = open_model(MODEL).weights
    executor = TorchExecutor(weights, served.card.fingerprint, 512, 16, num_threads=1)
    rig = TargetingRig(
        [item.text for item in sample_items(2_000)], tmp_path, executor, served.card, tokenizer
    )
    theirs = TheirTargeting(weights, rig.end_token)
    briefs = sample_briefs(3)
    for brief in briefs:
        context = tokenizer.encode(brief, allow_special=True)
        found = rig.found(rig.ask(context, None, k=K, beams=BEAMS))
        assert len(found) == K
        expected = theirs.ask(context, rig.sets)
        assert is_same(found, expected, K, 5 * TOLERANCE), (brief, found, expected)
    record_figure(f"targeting beside transformers, {MODEL}: {len(briefs)} of {len(briefs)} the same")
    executor.close()
