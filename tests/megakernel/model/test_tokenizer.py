"""TokenizerSpec from GGUF metadata and from Hugging Face folders."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from megakernel.model.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_from_gguf
from megakernel.model.tokenizer import TokenizerSpec, tokenizer_from_folder
from megakernel.model.weights import ModelFormatError
from tests.megakernel.model.model_files import (
    CHAT_TEMPLATE,
    VOCAB_SIZE,
    byte_level_vocabulary,
    gguf_metadata,
    tiny_shape,
    write_tokenizer,
)

PATH = Path("m.gguf")


def _metadata(**changes: Any) -> dict[str, Any]:
    metadata = gguf_metadata(tiny_shape("llama"))
    metadata["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"], dtype=np.int32)
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


def _encode(spec: TokenizerSpec, text: str) -> list[int]:
    ids: list[int] = tokenizers.Tokenizer.from_str(spec.tokenizer_json.decode()).encode(text).ids
    return ids


def test_byte_level_spec() -> None:
    spec = tokenizer_from_gguf(PATH, _metadata())
    tokens = byte_level_vocabulary()
    assert (spec.bos_token_id, spec.eos_token_id, spec.eot_token_id) == (0, 1, None)
    assert (spec.bos_token, spec.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert spec.eos_token_ids == (1,)
    assert spec.num_tokens == VOCAB_SIZE
    assert spec.chat_template == CHAT_TEMPLATE
    assert not spec.add_bos
    hello = tokens.index("hello")
    assert _encode(spec, "<|im_start|>hello<|im_end|>") == [0, hello, 1]


def test_end_of_turn_tokens_end_a_generation_even_if_marked_as_text() -> None:
    tokens = byte_level_vocabulary()
    tokens[-2:] = ["<|eot_id|>", "<|endoftext|>"]
    spec = tokenizer_from_gguf(PATH, _metadata(tokens=tokens, eot_token_id=VOCAB_SIZE - 2))
    assert spec.eos_token_ids == (1, VOCAB_SIZE - 2, VOCAB_SIZE - 1)
    assert spec.eot_token_id == VOCAB_SIZE - 2
    assert _encode(spec, "<|endoftext|>") == [VOCAB_SIZE - 1]


@pytest.mark.parametrize(
    ("pre", "flag", "expected"),
    [("llama-bpe", None, True), ("qwen2", None, False), ("llama-bpe", False, False), ("qwen2", True, True)],
)
def test_bos_is_added_as_the_file_or_else_the_pre_tokenizer_says(
    pre: str, flag: bool | None, expected: bool
) -> None:
    assert tokenizer_from_gguf(PATH, _metadata(pre=pre, add_bos_token=flag)).add_bos is expected


def test_no_bos_is_added_where_there_is_none() -> None:
    assert not tokenizer_from_gguf(PATH, _metadata(pre="llama-bpe", bos_token_id=None)).add_bos


def test_user_defined_tokens_are_whole_but_not_special() -> None:
    types = np.array(_metadata()["tokenizer.ggml.token_type"])
    types[-1] = 4
    spec = tokenizer_from_gguf(PATH, _metadata(token_type=types))
    added = {token["id"]: token["special"] for token in json.loads(spec.tokenizer_json)["added_tokens"]}
    assert added == {0: True, 1: True, VOCAB_SIZE - 1: False}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "bert"}, "bert'; supported: gpt2 .* llama"),
        ({"model": None}, "model"),
        ({"pre": "tekken"}, "tekken.*supported: " + ", ".join(PRE_TOKENIZERS)),
        ({"tokens": None}, "tokens"),
        ({"tokens": []}, "tokens"),
        ({"tokens": np.array([1, 2])}, "array of strings"),
        ({"merges": None}, "merges"),
        ({"merges": ["a"]}, "merges"),
        ({"merges": ["h z"]}, "join two tokens into a third"),
        ({"token_type": np.array([1, 2])}, f"array of {VOCAB_SIZE}"),
        ({"bos_token_id": VOCAB_SIZE}, f"0 to {VOCAB_SIZE - 1}"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"model": "llama"}, "scores"),
        ({"model": "llama", "scores": np.full(VOCAB_SIZE, np.nan)}, "scores"),
    ],
)
def test_refused_gguf_tokenizers(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelFormatError, match=named):
        tokenizer_from_gguf(PATH, _metadata(**changes))


def test_folder_spec(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    spec = tokenizer_from_folder(tmp_path)
    assert (spec.bos_token_id, spec.eos_token_id) == (0, 1)
    assert (spec.bos_token, spec.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert spec.eos_token_ids == (1, 5)  # tokenizer_config.json's and generation_config.json's
    assert spec.num_tokens == VOCAB_SIZE
    assert spec.chat_template == CHAT_TEMPLATE
    assert not spec.add_bos
    assert _encode(spec, "hello") == [byte_level_vocabulary().index("hello")]


def _update(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


@pytest.mark.parametrize("wraps", [False, True])
def test_post_processor_that_writes_bos_means_add_bos(tmp_path: Path, wraps: bool) -> None:
    write_tokenizer(tmp_path)
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [0], "tokens": ["<|im_start|>"]}},
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    sequence = {"type": "Sequence", "processors": [byte_level, template]}
    _update(tmp_path / "tokenizer.json", post_processor=sequence if wraps else template)
    assert tokenizer_from_folder(tmp_path).add_bos
    _update(tmp_path / "tokenizer_config.json", add_bos_token=False)
    assert not tokenizer_from_folder(tmp_path).add_bos


def test_chat_template_sources(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    _update(tmp_path / "tokenizer_config.json", chat_template=named)
    assert tokenizer_from_folder(tmp_path).chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("j")
    assert tokenizer_from_folder(tmp_path).chat_template == "j"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    bare = tokenizer_from_folder(tmp_path)
    assert (bare.chat_template, bare.bos_token_id, bare.eos_token_ids) == (None, None, (1, 5))


def test_folder_without_tokenizer_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"no tokenizer\.json"):
        tokenizer_from_folder(tmp_path)


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "Unigram.*BPE is"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}}}, "non-negative"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}}, "added_tokens": ["x"]}, "added_tokens"),
    ],
)
def test_refused_folder_tokenizers(tmp_path: Path, document: dict[str, Any], named: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ModelFormatError, match=named):
        tokenizer_from_folder(tmp_path)
