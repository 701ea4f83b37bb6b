"""What goes to a GPU machine without a network: enough, not too much, and it starts there."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu_bundle
from benchmarks.gpu_bundle import PACKAGES, BundleError, locked_versions, make_bundle

ROOT = Path(__file__).resolve().parents[2]
PYTHON_TAG = f"cp{sys.version_info[0]}{sys.version_info[1]}"
IMPORTED = {"numpy", "msgspec", "xdsl", "immutabledict", "ordered_set", "typing_extensions"}


def wheel(folder: Path, name: str, module: str, source: str = "") -> None:
    with zipfile.ZipFile(folder / name, "w") as file:
        file.writestr(f"{module}.py", source)


def fake_download(folder: Path) -> None:
    wheel(folder, f"msgspec-1-{PYTHON_TAG}-{PYTHON_TAG}-manylinux2014_x86_64.whl", "msgspec_here")
    wheel(folder, "msgspec-1-cp27-cp27-manylinux2014_x86_64.whl", "msgspec_there")
    wheel(folder, "pure-1-py3-none-any.whl", "pure_here")


def test_a_bundle_has_sources_wheels_and_what_runs_it(tmp_path):
    size = make_bundle(tmp_path / "bundle", fake_download)
    assert 500_000 < size < 10_000_000
    for path in (
        "run.py",
        "kernels/include/cuda/engine.h",
        "kernels/megakernel/include/cuda/engine.h",
        "kernels/megakernel/machines/h100.json",
        "benchmarks/gpu_decode.py",
        "benchmarks/gpu_primitives.cu",
        "tests/__init__.py",
        "tests/hardware/__main__.py",
    ):
        assert (tmp_path / "bundle" / path).is_file(), path
    assert not [
        path for path in (tmp_path / "bundle").rglob("*") if path.is_symlink() or path.suffix == ".pyc"
    ]


def test_a_bundle_is_made_again_over_a_bundle_alone(tmp_path):
    make_bundle(tmp_path, fake_download)
    (tmp_path / "stale").touch()
    make_bundle(tmp_path, fake_download)
    assert not (tmp_path / "stale").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").touch()
    with pytest.raises(BundleError, match="neither empty nor a bundle"):
        make_bundle(other, fake_download)
    assert (other / "thesis.txt").exists()


def test_too_large_a_bundle_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_bundle, "LARGEST_BYTES", 100_000)
    with pytest.raises(BundleError, match=r"has \d.\d MB; it may have 0"):
        make_bundle(tmp_path, fake_download)


def test_versions_are_those_of_the_lock():
    assert locked_versions(
        "# all\nMsgspec==1.2\ntyping_extensions==4\n", ["msgspec", "typing-extensions"]
    ) == [
        "Msgspec==1.2",
        "typing_extensions==4",
    ]
    with pytest.raises(BundleError, match="does not pin xdsl: run `make lock`"):
        locked_versions("msgspec==1", ["xdsl"])
    assert len(locked_versions((ROOT / "requirements.lock").read_text(), PACKAGES)) == len(PACKAGES)


IMPORT_ALL = """
import sys
import numpy, torch, torch._dynamo
before = set(sys.modules)
import benchmarks.gpu_decode, benchmarks.gpu_primitives, benchmarks.gpu_trace, benchmarks.gpu_results
import tests.hardware.__main__
for name in tests.hardware.__main__.PARTS:
    tests.hardware.__main__.part_named(name)
import megakernel.cuda_driver, megakernel.search
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
"""


def test_nothing_else_is_imported_than_what_the_bundle_brings(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-c", IMPORT_ALL]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) - {"megakernel", "benchmarks", "tests"} <= IMPORTED


def test_the_bundle_starts_with_its_own_wheels(tmp_path):
    make_bundle(tmp_path / "bundle", fake_download)
    module = tmp_path / "bundle" / "tests" / "hardware" / "__main__.py"
    module.write_text(
        "import sys, importlib.util as found, megakernel, tests\n"
        "names = ('msgspec_here', 'pure_here', 'msgspec_there')\n"
        "has = [bool(found.find_spec(name)) for name in names]\n"
        "print(megakernel.__file__, tests.__file__, *has, *sys.argv[1:])\n"
        "sys.exit(3)\n"
    )
    command = [sys.executable, str(tmp_path / "bundle" / "run.py"), "--part", "soak"]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    bundle = tmp_path / "bundle"
    files = [f"{bundle}/kernels/megakernel/__init__.py", f"{bundle}/tests/__init__.py"]
    assert done.stdout.split() == [*files, "True", "True", "False", "--part", "soak"]


def test_the_bundle_runs_another_module(tmp_path):
    make_bundle(tmp_path / "bundle", fake_download)
    said = "import sys; print(__name__, __spec__.name, *sys.argv[1:])\n"
    (tmp_path / "bundle" / "benchmarks" / "told.py").write_text(said)
    command = [sys.executable, str(tmp_path / "bundle" / "run.py"), "--module"]
    done = subprocess.run(
        [*command, "benchmarks.told", "--quick", "--module", "x"],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["__main__", "benchmarks.told", "--quick", "--module", "x"], done.stderr
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "--module wants a name" in done.stderr


def test_without_wheels_for_its_python_it_says_so(tmp_path):
    make_bundle(tmp_path, lambda folder: wheel(folder, "msgspec-1-cp27-cp27-any.whl", "msgspec"))
    command = [sys.executable, str(tmp_path / "run.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no wheels are here for Python 3." in done.stderr
