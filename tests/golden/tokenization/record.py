"""Records what llama.cpp makes of the strings in `corpus`: `python -m tests.golden.tokenization.record`.

Needs llama-cpp-python and the packages this project depends on, with `.` and `kernels` on PYTHONPATH.
Writes `expectations.json` beside this file: strings, and ids by vocabulary in the same order.
"""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.golden.tokenization.corpus import plain_strings, prompts_with_specials
from tests.golden.tokenization.vocabularies import (
    OTHER_PRES,
    PACKAGED_PRE,
    SENTENCEPIECE,
    tokenizer_metadata,
    write_vocabulary,
)

SEED = 20_240_607
NUM_MIXED, NUM_PROMPTS = 900, 200
STRIDE_OF_OTHERS = 5
"""Vocabularies beside the packaged one are checked on every fifth string: the file stays small."""
EXPECTATIONS = Path(__file__).with_name("expectations.json")


def main() -> None:
    try:
        import llama_cpp
    except ImportError:
        sys.exit("recording needs llama.cpp: pip install llama-cpp-python")
    plain, prompts = plain_strings(SEED, NUM_MIXED), prompts_with_specials(SEED, NUM_PROMPTS)
    recorded: dict[str, dict[str, list[list[int]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for vocabulary in (PACKAGED_PRE, *OTHER_PRES, SENTENCEPIECE):
            path = Path(folder) / f"{vocabulary}.gguf"
            write_vocabulary(path, tokenizer_metadata(vocabulary))
            model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
            stride = 1 if vocabulary == PACKAGED_PRE else STRIDE_OF_OTHERS
            recorded[vocabulary] = {
                "plain": [model.tokenize(text.encode(), True, False) for text in plain[::stride]],
                "prompts": [model.tokenize(text.encode(), True, True) for text in prompts[::stride]],
            }
            model.close()
    ids = ",\n".join(f'"{name}":{{{_lists(by_kind)}}}' for name, by_kind in recorded.items())
    source = json.dumps(f"llama-cpp-python {version('llama-cpp-python')}")
    EXPECTATIONS.write_text(
        f'{{"recorded_with":{source},"stride_of_others":{STRIDE_OF_OTHERS},\n'
        f'{_lists({"plain": plain, "prompts": prompts})},\n"ids":{{\n{ids}}}}}\n'
    )
    print(f"{len(plain)} plain strings and {len(prompts)} prompts, {EXPECTATIONS.stat().st_size} bytes")


def _lists(values: Mapping[str, Sequence[Any]]) -> str:
    """Members of a JSON object, one list item a line: differences stay readable."""
    return ",\n".join(
        f"{json.dumps(key)}:[\n" + ",\n".join(json.dumps(item, separators=(",", ":")) for item in items) + "]"
        for key, items in values.items()
    )


if __name__ == "__main__":
    main()
