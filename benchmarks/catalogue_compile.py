"""How long a catalogue of a million items takes to compile, and how much memory.

    python benchmarks/catalogue_compile.py [--quick] [--json FILE]

The sample's items as JSON lines, from a file, through the packaged model's tokenizer: parsed, tokenized,
sorted into a trie, written and synced. Memory is this process's peak above what it had
before, tokenizer loaded. The CPU's seconds, of all threads, tell a busy machine from a slow compilation.
--quick compiles 100,000.
"""

import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "kernels"))

from benchmarks.harness import parser, write_figures
from cluster.catalogue.compile import Compiled, CompileTarget, compile_upload
from cluster.catalogue.file import Catalogue
from cluster.catalogue.sample import sample_jsonl
from cluster.messages import Condition
from cluster.text import Tokenizer
from megakernel.model.load import PACKAGED_MODEL, open_model

_READ_BYTES = 1 << 16
_MB = 1e6
_CONDITIONS = (
    Condition(attribute="category", any_of=("shoes", "bags")),
    Condition(attribute="bid", at_least=0.5),
)


def memory_bytes(kind: str) -> int:
    found = re.search(rf"^{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, "this system does not tell its processes' memory"
    return 1024 * int(found[1])


def chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            yield chunk


def compile_once(upload: Path, target: CompileTarget) -> tuple[Compiled, dict[str, float]]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, began, cpu_began = memory_bytes("VmRSS"), time.perf_counter(), time.process_time()
    compiled = compile_upload(
        chunks(upload),
        upload.with_name("compiled"),
        upload_format="jsonl",
        name="sample",
        version=1,
        target=target,
        content_length=upload.stat().st_size,
    )
    return compiled, {
        "s": time.perf_counter() - began,
        "cpu_s": time.process_time() - cpu_began,
        "mb": (memory_bytes("VmHWM") - before) / _MB,
    }


def use(path: Path, target: CompileTarget) -> dict[str, float]:
    """What a worker does with it, in milliseconds."""
    began = time.perf_counter()
    catalogue = Catalogue.open(path)
    opened = time.perf_counter()
    catalogue.passing(_CONDITIONS)
    masked = time.perf_counter()
    catalogue.passing(_CONDITIONS)
    kept = time.perf_counter()
    tokens = target.tokenizer.encode(catalogue.text(0), allow_special=False)
    assert catalogue.find(tokens) == 0
    return {
        "open_verified_ms": (opened - began) * 1e3,
        "mask_ms": (masked - opened) * 1e3,
        "mask_again_ms": (kept - masked) * 1e3,
    }


def main() -> int:
    options = parser("Time and memory of compiling a catalogue.")
    options.add_argument("--runs", type=int, default=3)
    arguments = options.parse_args()
    num_items, size = (100_000, "100k") if arguments.quick else (1_000_000, "1m")
    model = open_model(PACKAGED_MODEL)
    tokenizer = Tokenizer(model.tokenizer.tokenizer_json)
    target = CompileTarget(
        tokenizer=tokenizer, end_token=min(tokenizer.special_ids), fingerprint=model.fingerprint
    )
    tokenizer.encode_batch(["warm"])
    with tempfile.TemporaryDirectory(prefix="headrace-catalogue-") as folder:
        upload = Path(folder) / "upload.jsonl"
        with upload.open("wb") as file:
            file.writelines(sample_jsonl(num_items))
        runs = [compile_once(upload, target) for _ in range(arguments.runs)]
        figures = {
            f"compile_{size}_{unit}": statistics.median(run[unit] for _, run in runs)
            for unit in ("s", "cpu_s")
        }
        figures[f"compile_{size}_mb"] = max(run["mb"] for _, run in runs)
        figures |= {
            f"catalogue_{size}_{what}": ms for what, ms in use(Path(folder) / "compiled", target).items()
        }
    header, file_bytes = runs[0][0].header, runs[0][0].preamble.file_bytes
    path_tokens = header.num_path_tokens / header.num_items
    print(
        f"{header.num_items} items, {path_tokens:.1f} tokens each with the end, "
        f"{header.num_nodes} nodes, {file_bytes / _MB:.0f} MB"
    )
    for name, value in figures.items():
        print(f"{name:36} {value:10.2f}")
    write_figures(arguments.json, figures, arguments.runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
