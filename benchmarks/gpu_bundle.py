"""All that the hardware run needs, in one folder, for a GPU machine without a network.

`python -m benchmarks.gpu_bundle DIR`. That machine has Python 3.11 or newer (as `megakernel` and xDSL want
it), torch, numpy, nvcc and cuda-bindings; there, `python3 DIR/run.py` runs all parts, and takes what `python
-m tests.hardware --help` says. `python3 DIR/run.py --module benchmarks.gpu_decode ...` runs another module,
with its own options. Wheels come from the package index, in the versions of requirements.lock.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("msgspec", "xdsl", "immutabledict", "ordered-set", "typing_extensions")
"""That `megakernel`'s CUDA side imports, beside numpy and torch: a test holds this to what it does."""
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64")
LARGEST_BYTES = 60_000_000
FOLDERS = ("kernels", "benchmarks", "tests/hardware")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "texts", "*.egg-info")

RUN = '''"""Runs the hardware run's parts with the wheels beside this file: `python3 run.py --help`.

`python3 run.py --module benchmarks.NAME ...` runs a benchmark instead.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
OLDEST = (3, 11)


def suits(wheel: Path) -> bool:
    """Its Python tag is this one's, or any."""
    tag = wheel.stem.split("-")[-3]
    return tag in ("py3", "py2.py3") or tag == f"cp{sys.version_info[0]}{sys.version_info[1]}"


def module_and_options(arguments: list[str]) -> list[str]:
    if arguments[:1] != ["--module"]:
        return ["tests.hardware", *arguments]
    if len(arguments) < 2:
        sys.exit("error: --module wants a name, such as benchmarks.gpu_decode")
    return arguments[1:]


def main() -> int:
    if sys.version_info < OLDEST:
        print(f"error: this is Python {sys.version.split()[0]}; 3.11 or newer is wanted", file=sys.stderr)
        return 2
    wheels = sorted(path for path in (HERE / "wheels").glob("*.whl") if suits(path))
    if not any(path.name.startswith("msgspec-") for path in wheels):
        print(f"error: no wheels are here for Python {sys.version.split()[0]}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as site:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as packed:
                packed.extractall(site)
        paths = [str(HERE), str(HERE / "kernels"), site, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", *module_and_options(sys.argv[1:])]
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
'''


class BundleError(RuntimeError):
    """A bundle that cannot be made; the message says what would help."""


Download = Callable[[Path], None]
"""Puts wheels into a folder."""


def make_bundle(folder: Path, download: Download | None = None) -> int:
    """Bytes of it. What `folder` had is gone first, unless that was no bundle. Raises BundleError."""
    _clear(folder)
    copy_sources(folder)
    (folder / "wheels").mkdir()
    (download or download_wheels)(folder / "wheels")
    (folder / "run.py").write_text(RUN, encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LARGEST_BYTES:
        raise BundleError(f"{folder} has {size / 1e6:.1f} MB; it may have {LARGEST_BYTES / 1e6:.0f}")
    return size


def copy_sources(folder: Path) -> None:
    """Links become what they lead to: the kernels' headers lie under both names."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=_LEFT_OUT)
    # A package of its own: some other package of this name may be installed over there.
    (folder / "tests" / "__init__.py").touch()


def download_wheels(folder: Path, pythons: Iterable[str] = PYTHONS) -> None:
    """Raises BundleError."""
    wanted = locked_versions((ROOT / "requirements.lock").read_text(encoding="utf-8"), PACKAGES)
    for python in pythons:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python]
        command += [part for platform in PLATFORMS for part in ("--platform", platform)]
        done = subprocess.run([*command, "--dest", str(folder), *wanted], capture_output=True, text=True)
        if done.returncode:
            raise BundleError(f"no wheels for Python {python}: {done.stderr.strip()[-1000:]}")


def locked_versions(lock: str, packages: Sequence[str]) -> list[str]:
    """`name==version` of each. Raises BundleError for one that is not locked."""
    pins = {_normal(line.partition("==")[0]): line.strip() for line in lock.splitlines() if "==" in line}
    missing = [name for name in packages if _normal(name) not in pins]
    if missing:
        raise BundleError(f"requirements.lock does not pin {', '.join(missing)}: run `make lock`")
    return [pins[_normal(name)] for name in packages]


def _normal(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(".", "-")


def _clear(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "run.py").exists():
            raise BundleError(f"{folder} is neither empty nor a bundle; name another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def main() -> int:
    options = argparse.ArgumentParser(description="what the hardware run needs, in one folder")
    options.add_argument("folder", type=Path, metavar="DIR")
    folder: Path = options.parse_args().folder
    try:
        size = make_bundle(folder)
    except BundleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: {size / 1e6:.1f} MB; there: python3 {folder.name}/run.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
