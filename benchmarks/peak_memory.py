"""Peak memory of a process that decodes in the megakernel, beside what its weights and KV take.

Run by decode.py in a process of its own; prints one JSON object of megabytes. The pool holds one context of
the model's length, and every bucket up to 64 rows has run over it.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "kernels"))

from benchmarks.decode_ours import BLOCK_TOKENS, Cell, OurDecode, OurModel
from benchmarks.harness import parser
from megakernel.model.load import PACKAGED_MODEL

ROWS = (1, 2, 4, 8, 16, 32, 64)
_MB = 1e6


def peak_bytes() -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, "this system does not tell its processes' peak memory"
    return 1024 * int(found[1])


def main() -> int:
    options = parser("Peak memory of decoding.")
    options.add_argument("--model", default=PACKAGED_MODEL)
    options.add_argument("--threads", type=int, default=2)
    arguments = options.parse_args()
    model = OurModel(arguments.model, arguments.threads)
    context = model.weights.shape.max_context_tokens - 1
    decode = OurDecode(model, context, max(ROWS))
    for rows in ROWS:
        cell = Cell(rows, context)
        decode.prepare(cell)
        decode.step(cell)
    weights = model.artifact.load().layout.num_bytes
    pool_tokens = decode.executor.num_blocks * BLOCK_TOKENS
    kv = pool_tokens * decode.executor.layout.num_layers * decode.executor.layout.bytes_per_token_layer
    peak = peak_bytes()
    decode.close()
    figures = {
        "peak_memory_mb": peak / _MB,
        "weights_mb": weights / _MB,
        "kv_mb": kv / _MB,
        "peak_memory_above_weights_and_kv_mb": (peak - weights - kv) / _MB,
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
