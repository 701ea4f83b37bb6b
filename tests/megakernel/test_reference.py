import numpy as np
import pytest
import torch

from megakernel.model.rope import rope_frequencies
from megakernel.reference import frequency, reference_generate, reference_logits, rotate
from tests.tiny_model import LLAMA3_SCALING, Architecture, tiny_weights

ARCHITECTURES: tuple[Architecture, ...] = ("llama", "qwen2", "qwen3")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_later_tokens_never_change_earlier_logits(architecture):
    weights = tiny_weights(3, architecture)
    tokens = list(range(10, 30))
    whole, part = reference_logits(weights, tokens), reference_logits(weights, tokens[:12])
    assert whole.shape == (20, weights.shape.vocab_size)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole[:12], part, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_is_the_argmax_of_logits_over_what_was_generated(architecture):
    weights = tiny_weights(4, architecture)
    prompt = [5, 6, 7, 8]
    generated = reference_generate(weights, prompt, 10)
    expected = reference_logits(weights, prompt + generated).argmax(-1)
    assert generated == expected[3:-1].tolist()


def test_untied_head_and_biases_and_norms_all_matter():
    tokens = [1, 2, 3]
    for architecture, name in (
        ("llama", "head"),
        ("qwen2", "layers.0.q_bias"),
        ("qwen3", "layers.1.k_norm"),
    ):
        weights = tiny_weights(5, architecture, has_tied_head=False)
        before = reference_logits(weights, tokens)
        weights._tensors[name] += np.random.default_rng(0).standard_normal(weights._tensors[name].shape)
        assert np.abs(reference_logits(weights, tokens) - before).max() > 1e-3, name


@pytest.mark.parametrize("scaling", [None, LLAMA3_SCALING])
def test_frequencies_agree_with_the_vectorized_ones(scaling):
    shape = tiny_weights(0, head_dim=64, rope_scaling=scaling).shape
    mine = [frequency(shape, pair) for pair in range(32)]
    np.testing.assert_allclose(mine, rope_frequencies(shape), rtol=1e-12)


def test_rotation_keeps_length_and_depends_on_distance_alone():
    shape = tiny_weights(0).shape
    x = torch.randn(1, 1, shape.head_dim, generator=torch.Generator().manual_seed(0))
    y = torch.randn(1, 1, shape.head_dim, generator=torch.Generator().manual_seed(1))

    def product(at_x: int, at_y: int) -> float:
        rotated = rotate(x, torch.tensor([at_x]), shape) * rotate(y, torch.tensor([at_y]), shape)
        return float(rotated.sum())

    assert torch.equal(rotate(x, torch.tensor([0]), shape), x)
    assert product(3, 10) == pytest.approx(product(103, 110), abs=1e-4)
    assert product(3, 10) != pytest.approx(product(3, 11), abs=1e-3)
