"""Reductions of logits rows, native on every back end and by definition, against a sorted list."""

import ctypes
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megakernel.build import INCLUDE_FOLDER
from megakernel.head import Reductions, reduce_rows
from tests.megakernel.test_cpu_kernels import BACKENDS, COMPILER, cpu_flags

SOURCE = Path(__file__).with_name("native") / "reduce_rows.cpp"


def native_reductions(library, logits: np.ndarray, top_k: int, needs_log_sums: bool = True) -> Reductions:
    values = np.empty((len(logits), 2 + top_k), dtype=np.float32)
    tokens = np.empty((len(logits), 1 + top_k), dtype=np.int32)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (logits, values, tokens)]
    library.reduce_rows(
        pointers[0], len(logits), logits.shape[1], top_k, int(needs_log_sums), pointers[1], pointers[2]
    )
    return Reductions(
        token_ids=tokens[:, 0],
        maxima=values[:, 0],
        log_sums=values[:, 1],
        top_token_ids=tokens[:, 1:],
        top_logits=values[:, 2:],
    )


@pytest.fixture(scope="module", params=BACKENDS)
def library(request, tmp_path_factory):
    flags, needed = BACKENDS[request.param]
    if COMPILER is None or not cpu_flags().issuperset(needed):
        pytest.skip(f"this machine cannot make or run {request.param}")
    path = tmp_path_factory.mktemp("reduce") / "reduce_rows.so"
    command = [COMPILER, "-std=c++20", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-w", *flags]
    subprocess.run([*command, f"-I{INCLUDE_FOLDER}", str(SOURCE), "-o", str(path)], check=True, timeout=180)
    return ctypes.CDLL(str(path))


VALUES = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 7.5, -math.inf]),  # many equals
    st.floats(-60, 60, width=32),
)
ROWS = st.integers(1, 200).flatmap(
    lambda vocab: st.lists(st.lists(VALUES, min_size=vocab, max_size=vocab), min_size=1, max_size=3)
)


def check_sound(reductions: Reductions, logits: np.ndarray, top_k: int) -> None:
    for row, values in enumerate(logits):
        order = sorted(range(len(values)), key=lambda token: (-values[token], token))
        assert reductions.token_ids[row] == order[0]
        assert reductions.maxima[row] == values[order[0]]
        assert reductions.top_token_ids[row].tolist() == order[:top_k]
        assert np.array_equal(reductions.top_logits[row], values[order[:top_k]])
        exact = np.logaddexp.reduce(values.astype(np.float64))
        assert reductions.log_sums[row] == pytest.approx(exact, abs=2e-5, rel=1e-6)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS, st.integers(0, 64))
def test_any_row(library, rows, top_k):
    logits = np.array(rows, dtype=np.float32)
    top_k = min(top_k, logits.shape[1])
    check_sound(native_reductions(library, logits, top_k), logits, top_k)
    check_sound(reduce_rows(logits, top_k), logits, top_k)


@pytest.mark.parametrize("top_k", [0, 1, 5, 64])
def test_a_whole_vocabulary(library, top_k):
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal((3, 49_157)) * 4).astype(np.float32)
    logits[1] = logits[1].round()  # ties in every span
    logits[2] = 0.5
    check_sound(native_reductions(library, logits, top_k), logits, top_k)
    check_sound(reduce_rows(logits, top_k), logits, top_k)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.integers(0, 299), min_size=1, max_size=5), st.sampled_from([0, 3, 64]), st.booleans())
def test_a_nan_anywhere_is_the_maximum_and_all_else(library, places, top_k, has_infinities):
    logits = np.random.default_rng(1).standard_normal((2, 300)).astype(np.float32)
    if has_infinities:
        logits[0, ::7] = np.inf
    logits[0, sorted(places)] = np.nan
    for found in (native_reductions(library, logits, top_k), reduce_rows(logits, top_k)):
        assert np.isnan(found.maxima[0])
        assert found.token_ids[0] == min(places)
        assert np.isnan(found.log_sums[0])
        assert np.isnan(found.top_logits[0]).all()
        assert (found.top_token_ids[0] == min(places)).all()
        assert found.token_ids[1] == logits[1].argmax()
        assert np.isfinite(found.top_logits[1]).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinite_maxima_are_told(library, value):
    logits = np.full((1, 130), -np.inf, dtype=np.float32)
    logits[0, 70:] = value
    first = 70 if value > 0 else 0
    for found in (native_reductions(library, logits, 2), reduce_rows(logits, 2)):
        assert (found.maxima[0], found.token_ids[0], found.log_sums[0]) == (value, first, value)
        assert found.top_token_ids[0].tolist() == [first, first + 1]


def test_log_sums_that_nobody_asked_for_are_nan(library):
    logits = np.ones((1, 100), dtype=np.float32)
    for found in (
        native_reductions(library, logits, 1, needs_log_sums=False),
        reduce_rows(logits, 1, needs_log_sums=False),
    ):
        assert np.isnan(found.log_sums[0])
        assert (found.maxima[0], found.top_token_ids[0, 0]) == (1, 0)
