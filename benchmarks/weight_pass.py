"""What one pass over a model's weights costs for 1 to 256 rows: the floor under a decode or prefill step.

Uses the product's own kernels and packing on a GGUF file, without norms, attention or barriers:
`python benchmarks/weight_pass.py MODEL.gguf`. The table gives the best and the median pass, rows a second,
and the fraction of the read bandwidth this program measures over the same bytes in the same run. `--no-head`
leaves the output head out, as all rows but the last of a prefill do.
"""

import argparse
import ctypes
import json
import mmap
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np

from megakernel.model.gguf import GgufWeights
from megakernel.pack import PackedLinear, pack_linear

ROOT = Path(__file__).resolve().parent.parent
FORMATS = ("Q4_1", "Q4_0", "Q8_0", "F16", "BF16", "F32")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Matrix(ctypes.Structure):
    _fields_ = (
        ("format", ctypes.c_int32),
        ("in_features", ctypes.c_int32),
        ("out_features", ctypes.c_int32),
        ("data", ctypes.c_void_p),
    )


def packed_model(weights: GgufWeights, *, has_head: bool) -> list[PackedLinear]:
    """Every linear op of a step, in order."""
    ops = []
    for layer in range(weights.shape.num_layers):
        q, k, v, o, gate, up, down = (
            weights.raw(f"layers.{layer}.{name}") for name in ("q", "k", "v", "o", "gate", "up", "down")
        )
        ops += [pack_linear([q, k, v]), pack_linear([o])]
        ops += [pack_linear([gate, up], swiglu_group=16), pack_linear([down])]
    if has_head:
        ops.append(pack_linear([weights.raw("embed" if weights.shape.has_tied_head else "head")]))
    return ops


def in_one_arena(ops: list[PackedLinear]) -> list[PackedLinear]:
    """The same in one allocation in order of use, which the system backs with huge pages where it can."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory gets no large pages
    arena = mmap.mmap(-1, sum(op.data.nbytes for op in ops), flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        arena.madvise(mmap.MADV_HUGEPAGE)
    room, start, moved = np.frombuffer(arena, np.uint8), 0, []
    for op in ops:
        data = room[start : start + op.data.nbytes]
        data[...] = op.data
        moved.append(msgspec.structs.replace(op, data=data))
        start += op.data.nbytes
    return moved


def build(ops: list[PackedLinear], folder: Path, compiler: str, flags: list[str]) -> ctypes.CDLL:
    shapes = sorted({(op.format, op.in_features) for op in ops})
    listed = " ".join(f"X(k{format},{size})" for format, size in shapes)
    library = folder / "weight_pass.so"
    command = [compiler, "-std=c++17", "-O2", "-pthread", "-shared", "-fPIC", *flags, f"-DSHAPES={listed}"]
    command += [f"-I{ROOT / 'kernels' / 'include'}", str(ROOT / "benchmarks" / "weight_pass.cpp")]
    subprocess.run([*command, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.backend.restype = ctypes.c_char_p
    loaded.weight_pass.restype = ctypes.c_float
    return loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, choices=range(1, 257), metavar="N")
    parser.add_argument("--no-head", action="store_true")
    parser.add_argument("--compiler", default="c++")
    parser.add_argument("--flags", default="-march=native", help="-march=x86-64-v3: AVX2")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    weights = GgufWeights(arguments.model)
    started = time.perf_counter()
    packed = packed_model(weights, has_head=not arguments.no_head)
    pack_s = time.perf_counter() - started
    ops = in_one_arena(packed)
    num_bytes = sum(op.data.nbytes for op in ops)
    with tempfile.TemporaryDirectory() as folder:
        library = build(ops, Path(folder), arguments.compiler, arguments.flags.split())
    matrices = (Matrix * len(ops))(
        *(
            Matrix(FORMATS.index(op.format), op.in_features, op.out_features, op.data.ctypes.data)
            for op in ops
        )
    )
    sizes = (ctypes.c_int64 * len(ops))(*(op.data.nbytes for op in ops))
    times = (ctypes.c_double * arguments.repeats)()
    print(f"{num_bytes / 1e6:.1f} MB packed in {pack_s:.2f} s, {library.backend().decode()}")

    library.read_pass(matrices, len(ops), sizes, arguments.workers, arguments.repeats, times)
    read_ms = min(times)
    bandwidth = num_bytes / read_ms / 1e6
    print(
        f"plain read: best {read_ms:.2f} ms ({bandwidth:.1f} GB/s), median {statistics.median(times):.2f} ms"
    )
    results = {}
    for rows in arguments.rows:
        library.weight_pass(matrices, len(ops), rows, arguments.workers, arguments.repeats, times)
        best, median = min(times), statistics.median(times)
        results[rows] = {"best_ms": best, "median_ms": median, "bandwidth_fraction": read_ms / best}
        print(
            f"rows {rows:3d}: best {best:6.2f} ms, median {median:6.2f} ms, "
            f"{1e3 * rows / best:6.0f} rows/s, {read_ms / best:4.0%} of read bandwidth"
        )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"bandwidth_gb_s": bandwidth, "num_bytes": num_bytes, "rows": results}, indent=2)
        )


if __name__ == "__main__":
    main()
