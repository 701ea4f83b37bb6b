"""Our oracle against llama.cpp, on the same GGUF and text: top-1 agreement and perplexity.

`python benchmarks/oracle_vs_llama_cpp.py [--quick] [--json FILE] [--model FILE.gguf]`, with llama-cpp-python
installed. The two cannot agree exactly: llama.cpp rounds activations to 8 bits and KV to float16, the
oracle keeps float32. On the same values stored as F32 they agree on 99.9% of the positions.
"""

import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "kernels"))

from benchmarks.harness import parser, write_figures
from cluster.text import Tokenizer
from megakernel.model.gguf import GgufWeights
from megakernel.model.load import PACKAGED_MODEL, open_model
from megakernel.reference import reference_logits

TEXT = Path(__file__).parent / "texts" / "english.txt"
NUM_TOKENS, NUM_TOKENS_QUICK = 1_000, 200
MIN_TOP1_AGREEMENT = 0.95
MAX_PERPLEXITY_DIFFERENCE = 0.01

Logits = npt.NDArray[np.float32]


def llama_cpp_logits(path: Path, token_ids: list[int]) -> Logits:
    """`[tokens, vocab]` at every position."""
    try:
        import llama_cpp
    except ImportError:
        sys.exit("this comparison needs llama.cpp: pip install 'headrace[bench]'")
    model = llama_cpp.Llama(
        str(path), n_ctx=len(token_ids), logits_all=True, verbose=False, n_threads=os.cpu_count()
    )
    model.eval(token_ids)
    logits: Logits = np.array(model.scores[: len(token_ids)], dtype=np.float32)
    model.close()
    return logits


def perplexity(logits: Logits, token_ids: list[int]) -> float:
    """Of each token given those before it; the first has none."""
    total = 0.0
    for row, target in zip(logits[:-1], token_ids[1:], strict=True):
        row64 = row.astype(np.float64)
        highest = row64.max()
        total += highest + math.log(np.exp(row64 - highest).sum()) - row64[target]
    return math.exp(total / (len(token_ids) - 1))


def compare(ours: Logits, theirs: Logits, token_ids: list[int]) -> dict[str, float]:
    mine, other = perplexity(ours, token_ids), perplexity(theirs, token_ids)
    return {
        "num_tokens": len(token_ids),
        "top1_agreement": float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()),
        "perplexity_oracle": mine,
        "perplexity_llama_cpp": other,
        "perplexity_ratio": mine / other,
        "mean_abs_logit_difference": float(np.abs(ours - theirs).mean()),
    }


def meets_bars(figures: dict[str, float]) -> bool:
    return (
        figures["top1_agreement"] >= MIN_TOP1_AGREEMENT
        and abs(figures["perplexity_ratio"] - 1) <= MAX_PERPLEXITY_DIFFERENCE
    )


def main() -> int:
    options = parser("Our oracle against llama.cpp on the same GGUF: top-1 agreement and perplexity.")
    options.add_argument("--model", default=PACKAGED_MODEL, help="a GGUF file or the packaged model's name")
    arguments = options.parse_args()

    opened = open_model(arguments.model)
    if not isinstance(opened.weights, GgufWeights):
        sys.exit(f"{arguments.model} is no GGUF file, and llama.cpp reads nothing else")
    tokenizer = Tokenizer(opened.tokenizer.tokenizer_json, bos_token_id=opened.tokenizer.bos_token_id)
    num_tokens = NUM_TOKENS_QUICK if arguments.quick else NUM_TOKENS
    token_ids = tokenizer.encode(
        TEXT.read_text(encoding="utf-8"), allow_special=False, add_bos=opened.tokenizer.add_bos
    )[:num_tokens]
    assert len(token_ids) == num_tokens, f"{TEXT} has only {len(token_ids)} tokens"

    started = time.perf_counter()
    theirs = llama_cpp_logits(opened.weights.path, token_ids)
    llama_done = time.perf_counter()
    ours = reference_logits(opened.weights, token_ids)
    figures = compare(ours, theirs, token_ids)
    figures["seconds_llama_cpp"] = llama_done - started
    figures["seconds_oracle"] = time.perf_counter() - llama_done
    for name, value in figures.items():
        print(f"{name:28} {value:.6g}")
    write_figures(arguments.json, figures, runs=1)
    if arguments.quick:
        print(f"the bars are for {NUM_TOKENS} tokens; {NUM_TOKENS_QUICK} are too few to tell")
        return 0
    is_met = meets_bars(figures)
    print("bars met" if is_met else "bars MISSED", "(top-1 >= 95%, perplexity within 1%)")
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
