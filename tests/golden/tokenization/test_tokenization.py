"""Our tokenization equals llama.cpp's on every recorded string (see record.py)."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.text import Tokenizer
from megakernel.model.gguf_tokenizer import tokenizer_from_gguf
from tests.golden.tokenization.vocabularies import OTHER_PRES, PACKAGED_PRE, SENTENCEPIECE, tokenizer_metadata


@pytest.fixture(scope="module")
def expectations() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(Path(__file__).with_name("expectations.json").read_text())
    return document


@pytest.mark.parametrize("vocabulary", [PACKAGED_PRE, *OTHER_PRES, SENTENCEPIECE])
def test_ids_equal_llama_cpp(expectations: dict[str, Any], vocabulary: str) -> None:
    spec = tokenizer_from_gguf(Path(vocabulary), tokenizer_metadata(vocabulary))
    tokenizer = Tokenizer(spec.tokenizer_json, bos_token_id=spec.bos_token_id)
    stride = 1 if vocabulary == PACKAGED_PRE else expectations["stride_of_others"]
    mismatches = []
    for kind, allow_special in (("plain", False), ("prompts", True)):
        expected = expectations["ids"][vocabulary][kind]
        texts = expectations[kind][::stride]
        assert len(texts) == len(expected)
        for text, ids in zip(texts, expected, strict=True):
            ours = tokenizer.encode(text, allow_special=allow_special, add_bos=spec.add_bos)
            if ours != ids:
                mismatches.append((text, ours, ids))
    assert not mismatches, f"{len(mismatches)} differ, the first: {mismatches[0]}"


def test_enough_strings_are_recorded(expectations: dict[str, Any]) -> None:
    assert len(expectations["plain"]) >= 1_200
    assert len(expectations["prompts"]) >= 100
