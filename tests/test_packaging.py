"""An installed package has all the files that are no Python: a wheel must be able to compile a model."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from megakernel.build import INCLUDE_FOLDER, BuildError, find_compiler

ROOT = Path(__file__).resolve().parent.parent
HEADERS = sorted(
    path.relative_to(ROOT / "kernels").as_posix()
    for path in (ROOT / "kernels" / "include").rglob("*")
    if path.is_file()
)
DATA = sorted(
    path.as_posix()
    for path in (
        *(Path("megakernel") / header for header in HEADERS),
        *(path.relative_to(ROOT / "kernels") for path in (ROOT / "kernels/megakernel/machines").iterdir()),
        Path("megakernel/probe.c"),
        Path("megakernel/probe_kernels.cpp"),
        *(path.relative_to(ROOT) for path in (ROOT / "cluster/placement/lua").glob("*.lua")),
        *(path.relative_to(ROOT) for path in (ROOT / "cluster/wire").glob("*.proto")),
    )
)


def test_every_header_and_data_file_is_declared_as_package_data():
    """Each is matched by a pattern of its top package; this is what setuptools copies."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folders = {"megakernel": ROOT / "kernels" / "megakernel"}
    found = {
        f"{package}/{path.relative_to(folders.get(package, ROOT / package)).as_posix()}"
        for package, patterns in declared.items()
        for pattern in patterns
        for path in folders.get(package, ROOT / package).glob(pattern)
    }
    assert len(HEADERS) > 10
    assert set(DATA) <= found


def test_the_compiler_finds_the_repository_s_headers():
    assert INCLUDE_FOLDER.resolve() == ROOT / "kernels" / "include"


COMPILE = """
import sys, megakernel.build
from pathlib import Path
assert megakernel.build.__file__.startswith(sys.argv[1]), megakernel.build.__file__
from megakernel.machine import load_machine
from megakernel.pipeline import compile_program
from megakernel.codegen_cpu import generate
from megakernel.graph import usual_formats
from megakernel.shapes import SHAPES
import msgspec
shape = msgspec.structs.replace(SHAPES["smollm2-135m"], num_layers=1)
machine = msgspec.structs.replace(load_machine("l20"), name="cpu", kind="cpu", num_workers=1)
formats = usual_formats(shape)
source = generate([compile_program(shape, "f", machine, 1, formats=formats)], formats).source
print(megakernel.build.build(source, folder=Path(sys.argv[2]), extra_flags=["-O0"]))
"""


@pytest.mark.slow
def test_a_wheel_can_compile_a_model(tmp_path: Path):
    source, wheels, site = tmp_path / "source", tmp_path / "wheels", tmp_path / "site"
    skipped = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests", "docs")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skipped)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-index", "--no-deps"]
    built = subprocess.run(
        [*pip, "--no-build-isolation", "-w", str(wheels), str(source)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-3000:]
    (wheel,) = wheels.glob("headrace-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert set(DATA) <= set(archive.namelist())
        archive.extractall(site)
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    made = subprocess.run(
        [sys.executable, "-c", COMPILE, str(site), str(tmp_path / "libraries")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
    )
    assert made.returncode == 0, made.stderr[-3000:]
    assert Path(made.stdout.strip()).exists()
