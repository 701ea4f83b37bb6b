"""The arrows between packages, from every import statement in every module."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "headrace": ROOT / "headrace",
    "cluster": ROOT / "cluster",
    "router": ROOT / "router",
    "prefill_workers": ROOT / "prefill_workers",
    "decode_workers": ROOT / "decode_workers",
    "megakernel": ROOT / "kernels" / "megakernel",
}
MAY_IMPORT = {
    "headrace": {"cluster", "router", "prefill_workers", "decode_workers", "megakernel"},
    "router": {"cluster"},
    "prefill_workers": {"cluster", "megakernel"},
    "decode_workers": {"cluster", "megakernel"},
    "cluster": set[str](),
    "megakernel": set[str](),
}
WITHOUT_TORCH = ("cluster", "router")
MAY_BE_MISSING = {
    # prefill_workers/trtllm_pins.py looks it up by name, for check_trtllm.
    "tensorrt_llm": {"prefill_workers/trtllm_engine.py", "prefill_workers/trtllm_connector.py"},
    "cuda": {"kernels/megakernel/cuda_driver.py"},
    "nixl": set[str](),  # it imports PyTorch to choose between the next two
    "nixl_cu12": {"cluster/transfer/nixl.py"},
    "nixl_cu13": {"cluster/transfer/nixl.py"},
}


def imports_of(source: str, package: str) -> Iterator[str]:
    """Top-level names imported anywhere in a module, in functions too; relative ones are `package`'s own."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield package if node.level else (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call) and _is_import_by_name(node):
            yield str(ast.literal_eval(node.args[0])).partition(".")[0]


def _is_import_by_name(node: ast.Call) -> bool:
    called = ast.unparse(node.func)
    is_import = called in ("__import__", "import_module", "importlib.import_module")
    return is_import and bool(node.args) and isinstance(node.args[0], ast.Constant)


def modules(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


def violations(package: str, forbidden: set[str]) -> list[str]:
    return [
        f"{module.relative_to(ROOT)} imports {name}"
        for module in modules(package)
        for name in imports_of(module.read_text(encoding="utf-8"), package)
        if name in forbidden
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_point_down(package):
    forbidden = PACKAGES.keys() - MAY_IMPORT[package] - {package}
    assert violations(package, forbidden) == []


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_the_control_plane_runs_without_torch(package):
    assert violations(package, {"torch", "torchvision", "transformers"}) == []


@pytest.mark.parametrize("name", MAY_BE_MISSING)
def test_what_may_be_missing_is_imported_where_that_is_said_only(name):
    found = [
        line
        for package in PACKAGES
        for line in violations(package, {name})
        if line.split()[0] not in MAY_BE_MISSING[name]
    ]
    assert found == []


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_imports_the_tests_or_benchmarks(package):
    assert violations(package, {"tests", "benchmarks"}) == []


def test_kernels_is_no_package():
    """A root package of that name would shadow the one that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_package_has_modules():
    assert all(modules(package) for package in PACKAGES)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn as nn, os", ["torch", "os"]),
        ("def f():\n    from cluster.ids import RequestId", ["cluster"]),
        ("from . import sibling", ["own"]),
        ("importlib.import_module('router.app')", ["router"]),
        ("text = 'import torch'", []),
    ],
)
def test_imports_are_found_wherever_they_stand(source, expected):
    assert list(imports_of(source, "own")) == expected
