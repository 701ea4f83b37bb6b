"""Compiled catalogues of the byte tokenizer, as routers name them."""

import json
from collections.abc import Iterable
from pathlib import Path

from cluster.catalogue.compile import CompileTarget, compile_upload
from cluster.messages import CatalogueRef
from cluster.text import Tokenizer
from tests.decode_workers.support import CARD, EOS, TOKENIZER


def compiled_ref(
    folder: Path, name: str, texts: Iterable[str], tokenizer: Tokenizer = TOKENIZER, end_token: int = EOS
) -> CatalogueRef:
    """Its file lies at `folder / name`, and is seen there."""
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    target = CompileTarget(tokenizer=tokenizer, end_token=end_token, fingerprint=CARD.fingerprint)
    done = compile_upload(
        [lines.encode()], folder / name, upload_format="jsonl", name=name, version=1, target=target
    )
    return CatalogueRef(
        name=name,
        version=1,
        checksum=done.preamble.checksum,
        num_bytes=done.preamble.file_bytes,
        path=str(folder / name),
    )
