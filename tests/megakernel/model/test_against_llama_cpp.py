"""Tiny models of every architecture, read by us and by llama.cpp: the same logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megakernel.model.gguf import GgufWeights
from megakernel.model.rope import llama3_divisors, rope_frequencies
from megakernel.model.shape import RopeScaling
from megakernel.reference import reference_logits
from tests.megakernel.model.model_files import random_tensors, tiny_shape, write_gguf

llama_cpp = pytest.importorskip("llama_cpp", reason="needs the extra `bench`")

TOKEN_IDS = [5, 17, 250, 3, 3, 99, 140, 7, 201, 64, 31, 8, 120, 45, 5, 17]
LLAMA3 = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)


@pytest.mark.parametrize("variant", ["plain", "untied", "llama3_rope", "other_rope", "linear_rope"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_logits_are_the_same(tmp_path: Path, architecture: str, variant: str) -> None:
    shape = tiny_shape(architecture, has_tied_head=variant != "untied")
    # Small projections: an untrained softmax over large scores would turn rounding into differences.
    tensors = {
        name: values * (0.3 if values.ndim > 1 else 1) for name, values in random_tensors(shape).items()
    }
    extra: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    if variant == "llama3_rope":
        extra["rope_freqs.weight"] = llama3_divisors(LLAMA3, rope_frequencies(shape)).astype(np.float32)
    elif variant == "other_rope":
        extra["rope_freqs.weight"] = np.linspace(1, 4, shape.head_dim // 2, dtype=np.float32)
    elif variant == "linear_rope":
        metadata = {f"{architecture}.rope.scaling.type": "linear", f"{architecture}.rope.scaling.factor": 4.0}
    if extra and architecture != "llama":
        pytest.skip("llama.cpp reads rope_freqs.weight for Llama only")
    path = tmp_path / "m.gguf"
    write_gguf(path, shape, tensors, extra=extra, metadata=metadata)
    model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    model.eval(TOKEN_IDS)
    theirs = np.array(model.scores[: len(TOKEN_IDS)], dtype=np.float32)
    model.close()
    ours = reference_logits(GgufWeights(path), TOKEN_IDS)
    # llama.cpp keeps KV in float16.
    np.testing.assert_allclose(ours, theirs, rtol=0.02, atol=0.02 * float(np.abs(theirs).std()))
