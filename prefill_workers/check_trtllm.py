"""Whether the installed TensorRT-LLM is one that Headrace was written for.

`python -m prefill_workers.check_trtllm` ends with 0 where it is, with 1 where its interface differs, each
difference on a line, and with 2 where none is installed or its version must not, or is not known to, do.
"""

import importlib
import importlib.util
import sys
from importlib import metadata

from prefill_workers.trtllm_pins import Pins, differences, load_pins

PACKAGE = "tensorrt_llm"


class UnusableError(Exception):
    """There is none, or of a version that must not be used. The message names the fix."""


def installed_version() -> str | None:
    """None: there is none."""
    if importlib.util.find_spec(PACKAGE) is None:
        return None
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return str(getattr(importlib.import_module(PACKAGE), "__version__", "of no version"))


def check_version(pins: Pins, version: str | None) -> None:
    """Raises UnusableError."""
    known = ", ".join(pins.versions)
    if version is None:
        raise UnusableError(f"{PACKAGE} is not installed: use NVIDIA's container of {known}")
    if version in pins.unfit:
        raise UnusableError(f"{PACKAGE} {version} must not be used: {pins.unfit[version]}. Install {known}")
    if version not in pins.versions:
        raise UnusableError(f"{PACKAGE} {version} is not known, {known} is. Install that")


def main() -> int:
    pins = load_pins()
    version = installed_version()
    try:
        check_version(pins, version)
    except UnusableError as error:
        if version is not None:
            _print_differences(pins)
        print(error, file=sys.stderr)
        return 2
    if _print_differences(pins):
        print(f"{PACKAGE} {version} is not what Headrace was written for: install it anew", file=sys.stderr)
        return 1
    print(f"{PACKAGE} {version}: all that is used is as expected")
    return 0


def _print_differences(pins: Pins) -> int:
    found = list(differences(pins))
    for line in found:
        print(line)
    return len(found)


if __name__ == "__main__":
    sys.exit(main())
