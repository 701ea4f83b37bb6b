"""Text to tokens and back, without the model: what routers and decode workers share.

Both directions follow the model's own tokenizer: byte-level BPE or SentencePiece BPE in the serialised
form of the `tokenizers` library. A `Tokenizer` is safe to share between threads; an
`IncrementalDetokenizer` belongs to one sequence.
"""

import codecs
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import tokenizers

from cluster.model_card import ServedModel

MAX_TOKENS = 1 << 22
MAX_BATCH_TEXTS = 1 << 14
"""Of one `encode_batch`: the library takes about 1 KB for a short text until the batch is done."""
SENTENCEPIECE_SPACE = "▁"
_UTF8_DECODER = codecs.getincrementaldecoder("utf-8")


class UnsupportedTokenizerError(ValueError):
    """A serialised tokenizer that cannot be read, or of a kind not handled here."""


class InvalidTextError(ValueError):
    """Text that has no UTF-8 form (a lone surrogate). Handled as a bad request by the router."""


class Tokenizer:
    """Encodes text and knows the bytes of every token."""

    def __init__(self, tokenizer_json: bytes, *, bos_token_id: int | None = None) -> None:
        """Takes about 0.1 s for 50,000 tokens. Raises UnsupportedTokenizerError."""
        document = _parsed(tokenizer_json)
        self._json = tokenizer_json.decode()
        self._parsing_specials = _library_tokenizer(self._json)
        self._ignoring_specials: tokenizers.Tokenizer | None = None
        self._lock = threading.Lock()
        self._bos_token_id = bos_token_id
        self._token_bytes = _token_bytes(document)
        self.special_ids = _special_ids(document)
        self.strips_leading_space = _strips_leading_space(document)
        """Whether a text's first token carries a space that is not part of the text (SentencePiece)."""
        self.released_bytes = [
            b"" if token_id in self.special_ids else raw for token_id, raw in enumerate(self._token_bytes)
        ]
        """What each token adds to a generated text, by id; specials add nothing."""

    @classmethod
    def of(cls, model: ServedModel) -> "Tokenizer":
        return cls(model.tokenizer_json, bos_token_id=model.card.bos_token_id)

    @property
    def num_tokens(self) -> int:
        """One more than the highest id."""
        return len(self._token_bytes)

    def encode(self, text: str, *, allow_special: bool, add_bos: bool = False) -> list[int]:
        """`allow_special`: control tokens written out in `text` become their ids, as in a rendered chat
        template; otherwise they are ordinary text, and no special id comes out but BOS where asked for.

        About 15 us for a sentence, 0.5 s a megabyte; other threads run meanwhile. Raises InvalidTextError.
        """
        tokenizer = self._parsing_specials if allow_special else self._without_specials()
        try:
            # The batch call, even for one text: the plain one holds the GIL, and takes twice as long.
            ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except (UnicodeEncodeError, TypeError):
            raise InvalidTextError(_surrogate_message(text)) from None
        if add_bos and self._bos_token_id is not None:
            return [self._bos_token_id, *ids]
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text by itself, specials as ordinary text, no BOS; on all cores, other threads run meanwhile.

        At most MAX_BATCH_TEXTS texts. Raises InvalidTextError, which says the place of the text in the batch.
        """
        if len(texts) > MAX_BATCH_TEXTS:
            raise ValueError(f"a batch of {len(texts)} texts; at most {MAX_BATCH_TEXTS}")
        try:
            encodings = self._without_specials().encode_batch_fast(list(texts), add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):
            index = next((i for i, text in enumerate(texts) if _has_surrogate(text)), None)
            message = "" if index is None else _surrogate_message(texts[index])
            raise InvalidTextError(f"text {index} of the batch: {message}") from None
        return [encoding.ids for encoding in encodings]

    def token_bytes(self, token_id: int) -> bytes:
        """The token's own bytes, a special's name included; empty for an id without a token."""
        return self._token_bytes[token_id] if 0 <= token_id < len(self._token_bytes) else b""

    def token_text(self, token_id: int) -> str:
        """For display: bytes that are no UTF-8 by themselves show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of a whole sequence, specials left out."""
        detokenizer = IncrementalDetokenizer(self, is_text_start=True)
        return "".join([detokenizer.push(token_id) for token_id in token_ids]) + detokenizer.flush()

    def _without_specials(self) -> tokenizers.Tokenizer:
        """A second library object: the setting is its state, and flipping it would race between threads."""
        with self._lock:
            if self._ignoring_specials is None:
                self._ignoring_specials = _library_tokenizer(self._json)
                self._ignoring_specials.encode_special_tokens = True
            return self._ignoring_specials


class IncrementalDetokenizer:
    """Releases text as tokens come, whole characters only; bytes that can never be one become U+FFFD."""

    __slots__ = ("_decode", "_released_bytes", "_strip")

    def __init__(self, tokenizer: Tokenizer, *, is_text_start: bool = False) -> None:
        """`is_text_start`: the tokens are a text of their own, so SentencePiece's leading space goes.
        A generation is not one: it continues its prompt, and that space is real."""
        self._decode = _UTF8_DECODER("replace").decode
        self._released_bytes = tokenizer.released_bytes
        self._strip = is_text_start and tokenizer.strips_leading_space

    def push(self, token_id: int) -> str:
        """The characters that this token completes; empty for a special or an unknown id."""
        try:
            text = self._decode(self._released_bytes[token_id])
        except IndexError:
            return ""
        return self._stripped(text) if self._strip and text else text

    def flush(self) -> str:
        """What a cut-off character leaves; the detokenizer starts afresh after it."""
        return self._stripped(self._decode(b"", True)) if self._strip else self._decode(b"", True)

    def _stripped(self, text: str) -> str:
        self._strip = self._strip and not text
        return text.removeprefix(" ")


def _parsed(tokenizer_json: bytes) -> dict[str, Any]:
    try:
        document = msgspec.json.decode(tokenizer_json)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UnsupportedTokenizerError(f"the serialised tokenizer is not valid JSON: {error}") from None
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise UnsupportedTokenizerError("the serialised tokenizer has no BPE model with a vocabulary")
    return dict(document)


def _library_tokenizer(tokenizer_json: str) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # noqa: BLE001 - it raises no narrower type
        raise UnsupportedTokenizerError(f"the tokenizers library refuses this tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _steps(component: Any) -> list[dict[str, Any]]:
    """A decoder as its flat list of steps, whether it is one step or a sequence."""
    if not isinstance(component, dict):
        return []
    nested = component.get("decoders")
    return [step for part in nested for step in _steps(part)] if isinstance(nested, list) else [component]


def _token_bytes(document: dict[str, Any]) -> list[bytes]:
    """Bytes by id; holes are empty."""
    kinds = {step.get("type") for step in _steps(document.get("decoder"))}
    if "ByteLevel" in kinds:
        to_bytes = _byte_level_bytes
    elif "ByteFallback" in kinds:
        to_bytes = _sentencepiece_bytes
    else:
        raise UnsupportedTokenizerError(
            f"decoder {sorted(map(str, kinds))} is not supported; supported: byte-level BPE, and "
            "SentencePiece BPE with byte fallback"
        )
    vocab: dict[str, int] = document["model"]["vocab"]
    added: list[dict[str, Any]] = document.get("added_tokens") or []
    size = max([*vocab.values(), *(token["id"] for token in added)], default=-1) + 1
    if size > MAX_TOKENS:
        raise UnsupportedTokenizerError(f"the tokenizer has ids up to {size - 1}; the limit is {MAX_TOKENS}")
    table = [b""] * size
    for text, token_id in vocab.items():
        table[token_id] = to_bytes(text)
    for token in added:
        table[token["id"]] = token["content"].encode()
    return table


def _special_ids(document: dict[str, Any]) -> frozenset[int]:
    return frozenset(token["id"] for token in document.get("added_tokens") or [] if token.get("special"))


def _strips_leading_space(document: dict[str, Any]) -> bool:
    return any(
        step.get("type") == "Strip" and step.get("content") == " " and step.get("start", 0) > 0
        for step in _steps(document.get("decoder"))
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte: itself where printable, else the next code from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF_CHARACTER = _byte_alphabet()


def _byte_level_bytes(text: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in text])
    except KeyError:
        return text.encode()


def _sentencepiece_bytes(text: str) -> bytes:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes([int(text[3:5], 16)])
        except ValueError:
            pass
    return text.replace(SENTENCEPIECE_SPACE, " ").encode()


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _surrogate_message(text: str) -> str:
    position = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
    return f"text is not valid Unicode: lone surrogate at character {position}"
