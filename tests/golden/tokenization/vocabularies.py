"""Vocabularies to compare on: the packaged model's, the same one under other pre-tokenizers, and a
SentencePiece one derived from it."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from megakernel.model.gguf_file import GgufFile
from megakernel.model.gguf_tokenizer import TokenType
from megakernel.model.load import packaged_gguf

PACKAGED_PRE = "smollm"
OTHER_PRES = ("gpt-2", "llama-bpe", "qwen2", "default")
SENTENCEPIECE = "sentencepiece"
NUM_PIECES = 12_000
_PREFIX = "tokenizer."


def packaged_metadata() -> dict[str, Any]:
    """The tokenizer's keys of the packaged model."""
    metadata = GgufFile(packaged_gguf()).metadata
    return {key: value for key, value in metadata.items() if key.startswith(_PREFIX)}


def tokenizer_metadata(vocabulary: str) -> dict[str, Any]:
    """GGUF tokenizer metadata of one of the vocabularies here, by its pre-tokenizer or SENTENCEPIECE."""
    metadata = packaged_metadata()
    if vocabulary == SENTENCEPIECE:
        return _sentencepiece_metadata(metadata)
    if vocabulary != PACKAGED_PRE:
        # Each pre-tokenizer's own default decides on BOS.
        del metadata["tokenizer.ggml.add_bos_token"]
    return metadata | {"tokenizer.ggml.pre": vocabulary}


def write_vocabulary(path: Path, metadata: dict[str, Any]) -> None:
    """A GGUF file without tensors, enough for a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, np.ndarray):
            writer.add_array(key, value.tolist())
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _sentencepiece_metadata(packaged: dict[str, Any]) -> dict[str, Any]:
    """Pieces are the packaged merges that are whole characters, scored by rank; laid out as Llama 2's."""
    pieces = list(dict.fromkeys(_pieces(packaged["tokenizer.ggml.merges"])))[:NUM_PIECES]
    characters = sorted({character for piece in pieces for character in piece} | {"▁"})
    merged = [piece for piece in pieces if len(piece) > 1]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    controls = ["<unk>", "<s>", "</s>"]
    normal = [*merged, *characters, "<tool>"]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    kinds += [TokenType.NORMAL] * (len(normal) - 1) + [TokenType.USER_DEFINED]
    scores = [0.0] * (len(controls) + 256) + [-float(rank) for rank in range(len(normal))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*controls, *byte_pieces, *normal],
        "tokenizer.ggml.scores": np.array(scores, dtype=np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, dtype=np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def _pieces(merges: list[str]) -> list[str]:
    """Byte-level merges as text: `Ġ` is the stand-in for a space; what is not ASCII is left out."""
    texts = [merge.replace(" ", "").replace("Ġ", "▁") for merge in merges]
    return [text for text in texts if text.replace("▁", "").isascii() and not text.startswith("<")]
