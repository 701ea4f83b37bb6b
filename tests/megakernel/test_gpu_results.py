"""Tables of figures that decode runs on a GPU left."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from benchmarks.gpu_results import Figures, ResultsError, markdown, read_figures
from benchmarks.harness import write_figures

ROOT = Path(__file__).resolve().parents[2]
H100 = {"gpu": "NVIDIA H100", "sms": 132, "driver": "580.1", "date": "2030-01-02T03:04:05+00:00"}
BATCH1 = {
    "read_gb_s": 3000.0,
    "ours_Q4_0_ms_qwen3-1.7b_batch1_ctx512": 0.6,
    "share_of_bound_Q4_0_qwen3-1.7b_batch1_ctx512": 0.614,
    "ours_BF16_ms_qwen3-1.7b_batch1_ctx512": 1.5,
    "compiled_ms_qwen3-1.7b_batch1_ctx512": 1.8004,
    "compiled_over_ours_Q4_0_qwen3-1.7b_batch1_ctx512": 3.0,
    "compiled_over_ours_BF16_qwen3-1.7b_batch1_ctx512": 1.196,
    "ours_Q4_0_ms_qwen3-1.7b_batch1_ctx64": 0.5,
}
BATCH16 = {
    "ours_Q4_0_ms_qwen3-1.7b_batch16_ctx64": 0.9,
    "ours_Q4_0_ms_llama-3.2-1b_batch16_ctx64": 0.4,
    "int4_ms_llama-3.2-1b_batch16_ctx64": 1.0,
    "int4_over_ours_Q4_0_llama-3.2-1b_batch16_ctx64": 2.5,
}


def files(*figures, **machine):
    return [Figures(figures=each, machine=H100 | machine, runs=7) for each in figures]


def test_parts_of_a_run_are_one_table_a_shape():
    shown = markdown(files(BATCH1, BATCH16)).splitlines()
    assert "| GPU | NVIDIA H100 |" in shown
    assert "| date | 2030-01-02T03:04:05+00:00 |" in shown
    assert "| rounds | 7 |" in shown
    qwen, llama = shown.index("## qwen3-1.7b"), shown.index("## llama-3.2-1b")
    assert shown[qwen + 2 : llama - 1] == [
        "| batch | context | ours Q4_0 | ours BF16 | compiled | compiled / BF16 | compiled / Q4_0 |",
        "|---:|---:|---:|---:|---:|---:|---:|",
        "| 1 | 64 | 0.500 | - | - | - | - |",
        "| 1 | 512 | 0.600 (61%) | 1.500 | 1.800 | 1.20 | 3.00 |",
        "| 16 | 64 | 0.900 | - | - | - | - |",
    ]
    assert shown[llama + 2 :] == [
        "| batch | context | ours Q4_0 | int4 | int4 / Q4_0 |",
        "|---:|---:|---:|---:|---:|",
        "| 16 | 64 | 0.400 | 1.000 | 2.50 |",
    ]


def test_the_last_file_that_has_a_figure_counts():
    again = {"ours_Q4_0_ms_qwen3-1.7b_batch1_ctx64": 0.25}
    shown = markdown(files(BATCH1, again))
    assert "| 1 | 64 | 0.250 |" in shown


def test_what_differs_between_parts_is_told_of_each():
    both = files(BATCH1) + files(BATCH16, date="2030-01-02T04:00:00+00:00")
    assert "| date | 2030-01-02T03:04:05+00:00; 2030-01-02T04:00:00+00:00 |" in markdown(both)


def test_figures_of_different_gpus_make_no_table():
    with pytest.raises(ResultsError, match="gpu is NVIDIA H100, NVIDIA L4"):
        markdown(files(BATCH1) + files(BATCH16, gpu="NVIDIA L4"))
    with pytest.raises(ResultsError, match="no figure of decode"):
        markdown(files({"read_gb_s": 1.0}))


def test_files_are_those_that_benchmarks_write(tmp_path):
    write_figures(tmp_path / "a.json", BATCH1, 7, H100)
    assert read_figures(tmp_path / "a.json") == files(BATCH1)[0]
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_results.py"), str(tmp_path / "a.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == markdown(files(BATCH1)), done.stderr
    command[-1] = str(tmp_path / "none.json")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "none.json" in done.stderr


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "other.json").write_bytes(msgspec.json.encode({"parts": []}))
    with pytest.raises(ResultsError, match=r"other\.json"):
        read_figures(tmp_path / "other.json")
