"""The CPU kernels, compiled for every back end this CPU can run, against float64 and against each other."""

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megakernel.float_formats import float_tensor
from megakernel.model.weights import RawTensor
from megakernel.pack import PACKED_FORMATS, QUANTIZED_FORMATS, pack_linear, unpack
from megakernel.packing import PackedLinear

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("native") / "cpu_kernels.cpp"
COMPILER = shutil.which("c++") or shutil.which("g++")
FORMAT_NUMBERS = {"Q4_1": 0, "Q4_0": 1, "Q8_0": 2, "F16": 3, "BF16": 4, "F32": 5}
SIZES = (32, 96, 576)

AVX2 = ("-mavx2", "-mfma", "-mf16c")
BACKENDS = {
    "scalar": (("-DMK_FORCE_SCALAR",), ()),
    "avx2": (AVX2, ("avx2", "fma", "f16c")),
    "avx2_vnni": ((*AVX2, "-mavxvnni"), ("avx2", "fma", "f16c", "avx_vnni")),
    "avx512": (
        (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vnni"),
        ("fma", "f16c", "avx512f", "avx512bw", "avx512_vnni"),
    ),
}
"""Compiler flags, and the CPU flags it takes to run what they make."""

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="flags and CPU features are x86-64's"),
]


def cpu_flags() -> frozenset[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return frozenset(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), ()))


def build(folder: Path, flags: tuple[str, ...], *more: str) -> Path:
    library = folder / "kernels.so"
    # GCC 12 takes its own headers' undefined vectors for mistakes of ours.
    warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized", "-Wno-uninitialized")
    command = [COMPILER, "-std=c++17", "-O1", "-fPIC", "-shared", *warnings, *flags, *more]
    command += [f"-I{ROOT / 'kernels' / 'include'}", str(SOURCE), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return library


class Kernels:
    """The compiled test library."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.backend.restype = ctypes.c_char_p

    def linear(self, packed: PackedLinear, x: np.ndarray, *, width=16, k=None, columns=None) -> np.ndarray:
        k0, k1 = k or (0, packed.in_features)
        n0, n1 = columns or (0, packed.out_features)
        y = np.full((len(x), packed.out_features), np.nan, np.float32)
        found = self.library.linear(
            FORMAT_NUMBERS[packed.format],
            *(packed.in_features, width, k0, k1),
            _pointer(packed.data),
            *(n0, n1),
            _pointer(x),
            ctypes.c_int64(x.strides[0] // 4),
            len(x),
            _pointer(y),
            ctypes.c_int64(packed.out_features),
        )
        assert found, "this size is not compiled into the test library"
        return y

    def quantize(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        blocks = (len(x), x.shape[1] // 32)
        out = (np.zeros(x.shape, np.int8), np.zeros(blocks, np.float32), np.zeros(blocks, np.float32))
        sums = np.zeros(blocks, np.int32)
        self.library.quantize(_pointer(x), len(x), *map(_pointer, (*out, sums)))
        return (*out, sums)


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@pytest.fixture(scope="module")
def kernels_of(tmp_path_factory) -> Callable[[str], Kernels]:
    built: dict[str, Kernels] = {}

    def get(backend: str) -> Kernels:
        flags, needs = BACKENDS[backend]
        if not cpu_flags().issuperset(needs):
            pytest.skip(f"this CPU lacks {sorted(set(needs) - cpu_flags())}")
        if backend not in built:
            built[backend] = Kernels(build(tmp_path_factory.mktemp(backend), flags))
        return built[backend]

    return get


@pytest.fixture(params=BACKENDS)
def kernels(request, kernels_of) -> Kernels:
    return kernels_of(request.param)


def random_tensor(format: str, rows: int, columns: int, seed: int, scale: float = 0.02) -> RawTensor:
    rng = np.random.default_rng(seed)
    if format not in QUANTIZED_FORMATS:
        return float_tensor(rng.normal(0, scale, (rows, columns)).astype(np.float32), format)
    blocks = columns // 32
    num_scales, num_bytes = {"Q4_1": (2, 16), "Q4_0": (1, 16), "Q8_0": (1, 32)}[format]
    scales = rng.normal(0, scale, (rows, blocks, num_scales)).astype(np.float16)
    quants = rng.integers(0, 256, (rows, blocks, num_bytes), dtype=np.uint8)
    data = np.concatenate([scales.view(np.uint8).reshape(rows, blocks, -1), quants], axis=-1)
    return RawTensor(format=format, shape=(rows, columns), data=data.reshape(rows, -1))


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """q and d by definition, in float32."""
    blocks = x.reshape(len(x), -1, 32)
    amax = np.abs(blocks).max(axis=-1)
    with np.errstate(all="ignore"):
        inverse = np.float32(127) / amax
        q = np.where(np.isfinite(inverse)[..., None], np.rint(blocks * inverse[..., None]), np.float32(0))
    return q, np.where(np.isfinite(inverse), amax / np.float32(127), np.float32(0))


def expected(packed: PackedLinear, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64, and the size of its terms, which float32 errors are relative to."""
    weights = unpack(packed).astype(np.float64)
    if packed.format in QUANTIZED_FORMATS:
        q, d = quantized(x)
        rows = (q.astype(np.float64) * d[..., None]).reshape(x.shape)
    else:
        rows = x.astype(np.float64)
    return rows @ weights.T, np.linalg.norm(rows, axis=1)[:, None] * np.linalg.norm(weights, axis=1)


def activations(rows: int, columns: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(0, 1, (rows, columns)) * np.exp(rng.normal(0, 1, (rows, 1)))).astype(np.float32)


@pytest.mark.parametrize("format", PACKED_FORMATS)
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize(("outputs", "rows"), [(16, 1), (40, 7), (64, 64)])
def test_the_product_is_that_of_float64(kernels, format, columns, outputs, rows):
    packed = pack_linear([random_tensor(format, outputs, columns, 1)])
    x = activations(rows, columns, 2)
    want, size = expected(packed, x)
    assert np.all(np.abs(kernels.linear(packed, x) - want) <= 1e-5 * size)


@pytest.mark.parametrize("format", PACKED_FORMATS)
def test_a_row_is_the_same_bits_in_any_company(kernels, format):
    packed = pack_linear([random_tensor(format, 64, 576, 3)])
    x = activations(33, 576, 4)
    alone = np.concatenate([kernels.linear(packed, x[r : r + 1]) for r in range(len(x))])
    for rows in (*range(2, 18), 33):
        assert np.array_equal(kernels.linear(packed, x[:rows]).view(np.uint32), alone[:rows].view(np.uint32))
    assert np.array_equal(kernels.linear(packed, x[::-1].copy())[::-1].view(np.uint32), alone.view(np.uint32))


@pytest.mark.parametrize("format", PACKED_FORMATS)
def test_every_back_end_gives_the_same_bits(kernels_of, kernels, format):
    x = activations(11, 576, 5)
    for columns in SIZES:
        packed = pack_linear([random_tensor(format, 48, columns, 6)])
        rows = np.ascontiguousarray(x[:, :columns])
        scalar = kernels_of("scalar").linear(packed, rows)
        assert np.array_equal(kernels.linear(packed, rows).view(np.uint32), scalar.view(np.uint32))


@pytest.mark.parametrize("format", PACKED_FORMATS)
def test_tiles_and_widths_change_nothing(kernels, format):
    packed = pack_linear([random_tensor(format, 192, 576, 7)])
    x = activations(9, 576, 8)
    whole = kernels.linear(packed, x)
    for width in (32, 64):
        assert np.array_equal(kernels.linear(packed, x, width=width), whole)
    tile = kernels.linear(packed, x, columns=(48, 112))
    assert np.array_equal(tile[:, 48:112], whole[:, 48:112])
    assert np.isnan(tile[:, :48]).all()
    assert np.isnan(tile[:, 112:]).all()
    strided = np.zeros((9, 600), np.float32)
    strided[:, :576] = x
    assert np.array_equal(kernels.linear(packed, strided[:, :576]), whole)


@pytest.mark.parametrize("format", PACKED_FORMATS)
def test_k_tiles_sum_to_the_whole(kernels, format):
    packed = pack_linear([random_tensor(format, 32, 576, 9)])
    x = activations(5, 576, 10)
    parts = sum(kernels.linear(packed, x, k=(k0, k0 + 288)).astype(np.float64) for k0 in (0, 288))
    want, size = expected(packed, x)
    assert np.all(np.abs(parts - want) <= 1e-5 * size)


def test_quantizing_is_exactly_the_definition(kernels):
    x = activations(200, 96, 11)
    x[1] = 0
    x[2, :32] = 1e-40  # 127 / amax would be infinite: taken for zero
    x[3] *= np.float32(1e37)
    x[4, :32] = np.float32(3.4e38)
    x[5] = np.linspace(-127, 127, 96, dtype=np.float32).round() + np.float32(0.5)  # halves go to even
    x[6, 40] = -50.0
    x[7] *= np.float32(1e-36)
    q, d = quantized(x)
    got_q, got_d, got_scaled, got_minus = kernels.quantize(x)
    sums = q.sum(axis=-1)
    assert np.array_equal(got_q.reshape(q.shape), q)
    assert np.array_equal(got_d, d)
    assert np.array_equal(got_minus, -sums)
    with np.errstate(over="ignore"):
        assert np.array_equal(got_scaled, d * sums.astype(np.float32))


@pytest.mark.parametrize("format", PACKED_FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_and_stays_in_its_row(kernels, format, bad):
    packed = pack_linear([random_tensor(format, 16, 96, 12)])
    x = activations(4, 96, 13)
    clean = kernels.linear(packed, x)
    x[2, 45] = bad
    dirty = kernels.linear(packed, x)
    assert not np.isfinite(dirty[2]).any()
    assert np.array_equal(dirty[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("format", QUANTIZED_FORMATS)
@pytest.mark.parametrize("scale", [0.0, 6e-8, 3e-5, 6e4])
def test_extreme_scales(kernels, format, scale):
    """Zero, subnormal halves, and near the largest half; all quants at their largest magnitude."""
    tensor = random_tensor(format, 16, 96, 14)
    scales = 2 * (2 if format == "Q4_1" else 1)
    data = tensor.data.reshape(16, 3, -1).copy()
    data[..., scales:] = 0x80 if format == "Q8_0" else 0xFF
    data[..., :scales].view(np.float16)[...] = scale
    packed = pack_linear([RawTensor(format=format, shape=(16, 96), data=data.reshape(16, -1))])
    for x in (
        np.full((3, 96), 1, np.float32),
        np.full((3, 96), -1e28, np.float32),
        np.zeros((3, 96), np.float32),
    ):
        want, size = expected(packed, x)
        assert np.all(np.abs(kernels.linear(packed, x) - want) <= 1e-5 * size)


@pytest.mark.parametrize("backend", ["scalar", "avx512" if "avx512_vnni" in cpu_flags() else "avx2"])
def test_sanitizers_find_nothing(tmp_path, backend):
    flags, needs = BACKENDS[backend]
    if not cpu_flags().issuperset(needs):
        pytest.skip(f"this CPU lacks {sorted(set(needs) - cpu_flags())}")
    program = tmp_path / "sanitized"
    sanitize = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    command = [COMPILER, "-std=c++17", "-O1", *flags, *sanitize, f"-I{ROOT / 'kernels' / 'include'}"]
    command += [str(SOURCE.with_name("sanitize.cpp")), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    if "cannot find" in done.stderr and "asan" in done.stderr:
        pytest.skip("this compiler has no sanitizer libraries")
    assert done.returncode == 0, done.stderr[-4000:]
    ran = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout.split()[-1] == "clean"
