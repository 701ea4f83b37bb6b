"""Text to tokens and back: specials, concurrency, incremental release of characters."""

import json
import threading
from collections.abc import Sequence
from functools import cache

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.text import (
    MAX_BATCH_TEXTS,
    IncrementalDetokenizer,
    InvalidTextError,
    Tokenizer,
    UnsupportedTokenizerError,
)

SPECIALS = ["<|im_start|>", "<|im_end|>"]
SPACE = "▁"
SENTENCEPIECE_WORDS = ["▁", "▁▁", "h", "i", "hi", "▁hi", "é", "語", "▁語"]


@cache
def byte_level_json() -> bytes:
    """Specials 0 and 1, a plain added token 2, the byte alphabet, and a few merges that cut characters."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "i"), ("Ġ", "hi"), ("Ã", "©"), ("Ð", "Ĺ"), ("ð", "Ł"), ("ðŁ", "ĺ")]
    texts = [*SPECIALS, "<tool>", *alphabet, *(left + right for left, right in merges)]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=merges)
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.add_tokens(["<tool>"])
    return tokenizer.to_str().encode()


@cache
def sentencepiece_json() -> bytes:
    """Laid out as Llama 2's: unknown, BOS, EOS, bytes, then pieces."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SENTENCEPIECE_WORDS]
    merges = [("h", "i"), (SPACE, SPACE), (SPACE, "hi"), (SPACE, "語")]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={text: i for i, text in enumerate(texts)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend(SPACE), tokenizers.normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace(SPACE, " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer.to_str().encode()


@cache
def byte_level() -> Tokenizer:
    return Tokenizer(byte_level_json(), bos_token_id=0)


@cache
def sentencepiece() -> Tokenizer:
    return Tokenizer(sentencepiece_json(), bos_token_id=1)


def library(tokenizer_json: bytes) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(tokenizer_json.decode())


def released(tokenizer: Tokenizer, token_ids: Sequence[int], *, is_text_start: bool = False) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, is_text_start=is_text_start)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


texts = st.text(
    st.one_of(st.sampled_from("hi é語З😀👩‍\n\t <|im_start|>"), st.characters(exclude_categories=["Cs"])),
    max_size=40,
)
byte_level_ids = st.lists(st.integers(0, byte_level().num_tokens - 1), max_size=60)


def test_specials_become_ids_only_where_allowed() -> None:
    text = "<|im_start|>hi<|im_end|>"
    assert byte_level().encode(text, allow_special=True) == [
        0,
        byte_level().encode("hi", allow_special=False)[0],
        1,
    ]
    literal = byte_level().encode(text, allow_special=False)
    assert not set(literal) & byte_level().special_ids
    assert byte_level().decode(literal) == text


def test_added_tokens_that_are_not_special_are_always_whole() -> None:
    for allow_special in (True, False):
        assert byte_level().encode("<tool>", allow_special=allow_special) == [2]
    assert byte_level().decode([2]) == "<tool>"


@given(text=texts, add_bos=st.booleans())
def test_no_special_comes_out_unless_allowed(text: str, add_bos: bool) -> None:
    for tokenizer, bos in ((byte_level(), 0), (sentencepiece(), 1)):
        ids = tokenizer.encode(text, allow_special=False, add_bos=add_bos)
        assert ids[:1] == [bos] or not add_bos
        assert not set(ids[int(add_bos) :]) & tokenizer.special_ids


@given(text=texts)
def test_decoding_gives_the_text_back(text: str) -> None:
    for tokenizer in (byte_level(), sentencepiece()):
        assert tokenizer.decode(tokenizer.encode(text, allow_special=False)) == text


@given(ids=byte_level_ids)
def test_incremental_equals_the_library_at_once(ids: list[int]) -> None:
    """Any ids, whole characters or not."""
    assert "".join(released(byte_level(), ids)) == library(byte_level_json()).decode(
        ids, skip_special_tokens=True
    )


@given(parts=st.lists(st.one_of(texts, st.sampled_from(["<s>", "</s>"])), max_size=6))
def test_incremental_equals_the_library_for_sentencepiece(parts: list[str]) -> None:
    ids: list[int] = []
    for part in parts:
        ids += sentencepiece().encode(part, allow_special=part in ("<s>", "</s>"))
    expected = library(sentencepiece_json()).decode(ids, skip_special_tokens=True)
    assert "".join(released(sentencepiece(), ids, is_text_start=True)) == expected
    assert sentencepiece().decode(ids) == expected


@given(ids=byte_level_ids)
def test_only_whole_characters_are_released_and_none_is_held_back(ids: list[int]) -> None:
    pushed = b""
    text = ""
    detokenizer = IncrementalDetokenizer(byte_level())
    for token_id in ids:
        pushed += byte_level().released_bytes[token_id]
        text += detokenizer.push(token_id)
        whole = pushed.decode("utf-8", errors="replace")
        # What is held back is at most the start of one character.
        assert whole.startswith(text.removesuffix("�") if text.endswith("�") else text)
        assert len(whole) - len(text) <= 1
    assert text + detokenizer.flush() == pushed.decode("utf-8", errors="replace")


def test_a_character_is_released_by_its_last_token() -> None:
    ids = byte_level().encode("З😀!", allow_special=False)
    pieces = released(byte_level(), ids)
    assert [piece for piece in pieces if piece] == ["З", "😀", "!"]
    cut = byte_level().encode("😀", allow_special=False)[:-1]
    assert released(byte_level(), cut) == [""] * len(cut) + ["�"]


def test_a_generation_keeps_the_space_of_its_first_token_and_a_text_does_not() -> None:
    ids = sentencepiece().encode("hi hi", allow_special=False)
    assert "".join(released(sentencepiece(), ids)) == " hi hi"
    assert "".join(released(sentencepiece(), ids, is_text_start=True)) == "hi hi"
    lone_space = sentencepiece().encode(" hi", allow_special=False)
    assert "".join(released(sentencepiece(), lone_space, is_text_start=True)) == " hi"


def test_specials_and_unknown_ids_release_nothing() -> None:
    assert released(byte_level(), [0, 1, 1_000_000]) == ["", "", "", ""]


def test_token_bytes_and_text_for_display() -> None:
    first = byte_level().encode("😀", allow_special=False)[0]
    assert byte_level().token_text(first).startswith("�")
    assert b"\xf0" in byte_level().token_bytes(first)
    assert byte_level().token_text(1) == "<|im_end|>"
    assert byte_level().token_bytes(1_000_000) == byte_level().token_bytes(-1) == b""
    hi = sentencepiece().encode("hi", allow_special=False)[0]
    assert sentencepiece().token_bytes(hi) == b" hi"
    assert sentencepiece().token_bytes(3 + 0x41) == b"A"


@given(text=texts)
def test_token_bytes_concatenate_to_the_text(text: str) -> None:
    ids = byte_level().encode(text, allow_special=False)
    assert b"".join(byte_level().token_bytes(token_id) for token_id in ids) == text.encode()


@pytest.mark.parametrize("allow_special", [True, False])
def test_lone_surrogate_is_named_by_position(allow_special: bool) -> None:
    with pytest.raises(InvalidTextError, match="lone surrogate at character 2"):
        byte_level().encode("ab\ud800c", allow_special=allow_special)


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"model": {"type": "Unigram", "vocab": []}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "decoder": null}',
        b'{"model": {"type": "BPE", "vocab": {"a": 4000000000}, "merges": []}, '
        b'"decoder": {"type": "ByteFallback"}}',
        b"[" * 100_000,
    ],
)
def test_unusable_tokenizers_are_refused(broken: bytes) -> None:
    with pytest.raises(UnsupportedTokenizerError):
        Tokenizer(broken)


def test_truncation_and_padding_in_the_file_are_ignored() -> None:
    document = json.loads(byte_level_json())
    document["truncation"] = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    tokenizer = Tokenizer(json.dumps(document).encode())
    assert len(tokenizer.encode("hi hi", allow_special=False)) == 2


@settings(max_examples=5, deadline=None)
@given(text=texts)
def test_threads_share_a_tokenizer(text: str) -> None:
    tokenizer = Tokenizer(byte_level_json())
    prompt = SPECIALS[0] + text
    expected = {flag: byte_level().encode(prompt, allow_special=flag) for flag in (True, False)}
    wrong: list[bool] = []

    def work(flag: bool) -> None:
        for _ in range(30):
            if tokenizer.encode(prompt, allow_special=flag) != expected[flag]:
                wrong.append(flag)

    threads = [threading.Thread(target=work, args=(flag,)) for flag in (True, False, True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@given(batch=st.lists(st.one_of(texts, st.sampled_from(SPECIALS)), max_size=8))
def test_a_batch_is_each_text_by_itself(batch: list[str]) -> None:
    for tokenizer in (byte_level(), sentencepiece()):
        expected = [tokenizer.encode(text, allow_special=False) for text in batch]
        assert tokenizer.encode_batch(batch) == expected


def test_a_batch_is_bounded_and_names_a_bad_text() -> None:
    with pytest.raises(ValueError, match=f"at most {MAX_BATCH_TEXTS}"):
        byte_level().encode_batch([""] * (MAX_BATCH_TEXTS + 1))
    with pytest.raises(InvalidTextError, match=r"text 1 of the batch: .*lone surrogate at character 2"):
        byte_level().encode_batch(["fine", "hi\ud800"])
