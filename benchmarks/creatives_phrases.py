"""A house's phrases for `benchmarks/creatives.py`, as a catalogue that a worker sees."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from cluster.catalogue.compile import CompileTarget, compile_upload
from cluster.messages import CatalogueRef
from cluster.model_card import ModelCard
from cluster.text import Tokenizer

LEAST_WORDS = 3


def phrases_in(texts: Iterable[str]) -> list[str]:
    """What stands between their punctuation."""
    phrases = (phrase.strip(" '") for text in texts for phrase in re.split(r"[.,:;!?\"\n]+", text))
    return list(dict.fromkeys(phrase for phrase in phrases if len(phrase.split()) >= LEAST_WORDS))


def compiled_phrases(
    phrases: Iterable[str], path: Path, tokenizer: Tokenizer, card: ModelCard
) -> CatalogueRef:
    """Onto `path`; those that are too long are left out."""
    preamble = compile_upload(
        ["\n".join(json.dumps({"text": phrase}) for phrase in phrases).encode()],
        path,
        upload_format="jsonl",
        name="phrases",
        version=1,
        target=CompileTarget(
            tokenizer=tokenizer, end_token=card.eos_token_ids[0], fingerprint=card.fingerprint
        ),
        skip_bad=True,
    ).preamble
    return CatalogueRef(
        name="phrases",
        version=1,
        checksum=preamble.checksum,
        num_bytes=preamble.file_bytes,
        path=str(path),
    )
