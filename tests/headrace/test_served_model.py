"""A model source becomes a card and a tokenizer."""

import json
from pathlib import Path

import pytest

from cluster.text import Tokenizer
from headrace.served_model import served_model
from megakernel.model.load import PACKAGED_MODEL, open_model
from megakernel.model.weights import ModelFormatError
from tests.megakernel.model.model_files import random_tensors, tiny_shape, write_gguf, write_hf_folder


def test_packaged_model() -> None:
    served = served_model(PACKAGED_MODEL)
    opened = open_model(PACKAGED_MODEL)
    assert served.card.name == PACKAGED_MODEL
    assert served.card.fingerprint == opened.fingerprint
    assert served.card.max_context_tokens == opened.weights.shape.max_context_tokens == 8192
    assert served.card.chat_template == opened.tokenizer.chat_template
    tokenizer = Tokenizer.of(served)
    assert tokenizer.encode(served.card.eos_token, allow_special=True) == [2]
    assert tokenizer.decode(tokenizer.encode("Grüße, 世界!", allow_special=False)) == "Grüße, 世界!"


def test_chosen_name_and_context(tmp_path: Path) -> None:
    shape = tiny_shape("llama")
    write_gguf(tmp_path / "m.gguf", shape, random_tensors(shape))
    card = served_model(str(tmp_path / "m.gguf"), "ads", 64).card
    assert (card.name, card.max_context_tokens, card.vocab_size) == ("ads", 64, 300)


@pytest.mark.parametrize("context", [129, 0, -1])
def test_context_beyond_the_model_names_both(tmp_path: Path, context: int) -> None:
    shape = tiny_shape("llama")
    write_gguf(tmp_path / "m.gguf", shape, random_tensors(shape))
    with pytest.raises(ModelFormatError, match=f"max_context_tokens is {context}.*trained for 128"):
        served_model(str(tmp_path / "m.gguf"), None, context)


def test_tokenizer_that_cannot_decode_is_a_model_format_error(tmp_path: Path) -> None:
    shape = tiny_shape("llama")
    write_hf_folder(tmp_path / "m", shape, random_tensors(shape))
    path = tmp_path / "m" / "tokenizer.json"
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), "decoder": decoder}))
    with pytest.raises(ModelFormatError, match=r"WordPiece.*byte-level BPE"):
        served_model(str(tmp_path / "m"))
