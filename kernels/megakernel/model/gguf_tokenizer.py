"""Builds a TokenizerSpec from a GGUF's metadata: byte-level BPE and SentencePiece BPE."""

import json
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from megakernel.model.gguf_file import Metadata
from megakernel.model.tokenizer import END_OF_TURN_TEXTS, TokenizerSpec
from megakernel.model.weights import ModelFormatError, shown

SPACE = "▁"
"""SentencePiece's stand-in for a space."""


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class PreTokenizer(msgspec.Struct, frozen=True, kw_only=True):
    """How a byte-level vocabulary splits text into words before merging.

    Each pattern splits the pieces that the one before it left; what no match covers is a piece too.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """A word that is a token as it stands is not merged up from its bytes."""
    add_bos: bool = False
    """What holds where the file does not say."""


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_LLAMA3 = PreTokenizer(patterns=(_CL100K % 3,), ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizer(patterns=(_CL100K.replace("{1,%d}", ""),))
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer(patterns=(_GPT2,)),
    "smollm": PreTokenizer(patterns=(r"\p{N}", _GPT2)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


class _Vocabulary:
    """The token arrays of a GGUF, checked against each other."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        self.path = path
        self._metadata = metadata
        self.texts: list[str] = self.strings("tokens")
        if not self.texts:
            raise self.fail("tokens", "is missing or empty")
        self.ids = {text: number for number, text in enumerate(self.texts)}
        types = self.numbers("token_type", TokenType.NORMAL)
        self.types = [int(kind) for kind in types]
        for text in END_OF_TURN_TEXTS:
            # Some converters leave these as ordinary text; a chat template needs them whole.
            if text in self.ids:
                self.types[self.ids[text]] = TokenType.CONTROL

    def fail(self, key: str, problem: str) -> ModelFormatError:
        return ModelFormatError(f"{self.path}: metadata `tokenizer.ggml.{key}` {problem}")

    def get(self, key: str) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}")

    def strings(self, key: str) -> list[str]:
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.fail(key, "must be an array of strings")
        return value

    def numbers(self, key: str, default: float | None = None) -> list[float]:
        """One number a token."""
        value = self.get(key)
        if value is None and default is not None:
            return [default] * len(self.texts)
        if not isinstance(value, np.ndarray) or len(value) != len(self.texts) or not np.isfinite(value).all():
            raise self.fail(key, f"must be an array of {len(self.texts)} numbers")
        return [float(number) for number in value.tolist()]

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(key, f"is {shown(value)}; it must be true or false")
        return default if value is None else value

    def token_id(self, key: str) -> int | None:
        value = self.get(key)
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < len(self.texts):
            raise self.fail(key, f"is {shown(value)}; the vocabulary has ids 0 to {len(self.texts) - 1}")
        return value

    def added_tokens(self) -> list[dict[str, Any]]:
        """Control tokens are special (parsed only where asked); user-defined ones are always parsed."""
        always = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
        special = {TokenType.CONTROL: True, TokenType.UNKNOWN: True, TokenType.USER_DEFINED: False}
        return [
            {"id": self.ids[text], "content": text, "special": special[TokenType(kind)], **always}
            for number, (text, kind) in enumerate(zip(self.texts, self.types, strict=True))
            if kind in special and text and self.ids[text] == number
        ]


def tokenizer_from_gguf(path: Path, metadata: Metadata) -> TokenizerSpec:
    """Raises ModelFormatError for a tokenizer that is missing, broken or of another kind."""
    vocabulary = _Vocabulary(path, metadata)
    kind = vocabulary.get("model")
    if not isinstance(kind, str):
        raise vocabulary.fail("model", "is missing or not text")
    if kind == "gpt2":
        pre = _pre_tokenizer(vocabulary)
        document, add_bos = _byte_level(vocabulary, pre), pre.add_bos
    elif kind == "llama":
        document, add_bos = _sentencepiece(vocabulary), True
    else:
        raise vocabulary.fail(
            "model", f"is {shown(kind)}; supported: gpt2 (byte-level BPE), llama (SentencePiece BPE)"
        )
    bos, eos = vocabulary.token_id("bos_token_id"), vocabulary.token_id("eos_token_id")
    eot = vocabulary.token_id("eot_token_id")
    ends = {vocabulary.ids[text] for text in END_OF_TURN_TEXTS if text in vocabulary.ids}
    ends |= {token for token in (eos, eot, vocabulary.token_id("eom_token_id")) if token is not None}
    template = metadata.get("tokenizer.chat_template")
    return TokenizerSpec(
        tokenizer_json=json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode(),
        num_tokens=len(vocabulary.texts),
        chat_template=template if isinstance(template, str) else None,
        bos_token_id=bos,
        eos_token_id=eos,
        eot_token_id=eot,
        eos_token_ids=tuple(sorted(ends)),
        add_bos=bos is not None and vocabulary.flag("add_bos_token", add_bos),
        bos_token="" if bos is None else vocabulary.texts[bos],
        eos_token="" if eos is None else vocabulary.texts[eos],
    )


def _pre_tokenizer(vocabulary: _Vocabulary) -> PreTokenizer:
    name = vocabulary.get("pre")
    name = "default" if name is None else name
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise vocabulary.fail(
            "pre", f"is {shown(name)}, which is not supported; supported: {', '.join(PRE_TOKENIZERS)}"
        )
    return PRE_TOKENIZERS[name]


def _document(vocabulary: _Vocabulary, **parts: Any) -> dict[str, Any]:
    """The serialised form of the `tokenizers` library, version 1.0."""
    nothing = {
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
    }
    return {"version": "1.0", **nothing, "added_tokens": vocabulary.added_tokens(), **parts}


def _bpe(vocabulary: _Vocabulary, merges: Sequence[tuple[str, str]], **options: Any) -> dict[str, Any]:
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {**model, **options, "vocab": vocabulary.ids, "merges": merges}


def _byte_level(vocabulary: _Vocabulary, pre: PreTokenizer) -> dict[str, Any]:
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in pre.patterns
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return _document(
        vocabulary,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        decoder=byte_level,
        model=_bpe(vocabulary, _listed_merges(vocabulary), ignore_merges=pre.ignore_merges),
    )


def _listed_merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for merge in vocabulary.strings("merges"):
        # From the second character: the left part may itself start with a space.
        middle = merge.find(" ", 1)
        left, right = merge[:middle], merge[middle + 1 :]
        if middle < 0 or not {left, right, left + right} <= vocabulary.ids.keys():
            raise vocabulary.fail(
                "merges", f"holds {shown(merge)}, which does not join two tokens into a third"
            )
        merges.append((left, right))
    if not merges:
        raise vocabulary.fail("merges", "is missing or empty")
    return merges


def _sentencepiece(vocabulary: _Vocabulary) -> dict[str, Any]:
    has_prefix = vocabulary.flag("add_space_prefix", True)
    prepend = [{"type": "Prepend", "prepend": SPACE}] if has_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_prefix else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    unspace = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    unknown = vocabulary.token_id("unknown_token_id") or 0
    return _document(
        vocabulary,
        normalizer={"type": "Sequence", "normalizers": [*prepend, spaces]},
        decoder={
            "type": "Sequence",
            "decoders": [unspace, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        model=_bpe(
            vocabulary,
            _scored_merges(vocabulary),
            unk_token=vocabulary.texts[unknown],
            fuse_unk=True,
            byte_fallback=True,
        ),
    )


def _scored_merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores highest: every split of every piece, by score."""
    scores = vocabulary.numbers("scores")
    ids = vocabulary.ids
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    mergeable = (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
    for text, kind, score in zip(vocabulary.texts, vocabulary.types, scores, strict=True):
        if kind not in mergeable:
            continue
        for middle in range(1, len(text)):
            left, right = text[:middle], text[middle:]
            if left in ids and right in ids:
                ranked.append((-score, ids[left], ids[right], (left, right)))
    ranked.sort()
    return [merge for _, _, _, merge in ranked]
