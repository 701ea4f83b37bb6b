"""The hardware run as tests, where there is an NVIDIA GPU."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.hardware.__main__ import PARTS

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 400

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(LIMIT_S + 60),
    pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="no NVIDIA GPU in this machine"),
    pytest.mark.skipif(find_spec("cuda") is None, reason="no cuda-bindings: pip install 'headrace[cuda]'"),
]


@pytest.mark.parametrize("part", PARTS)
def test_part_passes(part, tmp_path):
    command = [
        sys.executable,
        "-m",
        "tests.hardware",
        "--part",
        part,
        "--quick",
        "--budget",
        str(LIMIT_S - 60),
    ]
    command += ["--results", str(tmp_path / "results.json"), "--folder", str(tmp_path / "models")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
