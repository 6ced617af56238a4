"""Imports point down, and the torch-free side stays so: the rules of the house, held by the import statements."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "efficientformer"

# What each room may import of the others, at module level or inside functions.
ALLOWED = {
    "spec": set(),
    "runtime": {"spec"},
    "cluster": {"spec", "runtime"},
    "models": {"spec"},
    "weights": {"spec", "models"},
    "export": {"spec", "models", "weights", "runtime", "data", "reporting"},
    "reporting": {"spec"},
    "data": {"spec", "runtime", "reporting"},
    "evaluation": {"spec", "runtime", "data", "reporting"},
    "training": {"spec", "models", "weights", "runtime", "data", "evaluation", "reporting", "export"},
    "latency": {"spec", "runtime", "export", "reporting"},
    "benchmarking": {"spec", "models", "weights", "runtime", "export", "evaluation", "reporting"},
    "slimming": {
        "spec", "models", "weights", "runtime", "data", "evaluation", "reporting", "export", "training", "latency",
    },
    "cli": {
        "spec", "models", "weights", "runtime", "export", "reporting", "data", "evaluation", "training", "latency",
        "cluster", "benchmarking", "slimming",
    },
}  # fmt: skip
TORCH = {"torch", "torchvision", "timm", "onnx", "onnxscript"}
TORCH_FREE = [*PACKAGE.glob("spec/**/*.py"), *PACKAGE.glob("runtime/**/*.py"), *PACKAGE.glob("cluster/**/*.py")]


def imported(path):
    """Yield (top-level module, room of ours or None, whether at module level)."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            yield parts[0], parts[1] if parts[0] == "efficientformer" and len(parts) > 1 else None, id(node) in top


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_down(room):
    files = list((PACKAGE / room).rglob("*.py"))
    assert files
    for path in files:
        rooms = {r for _, r, _ in imported(path) if r is not None and (PACKAGE / r).is_dir()}
        assert rooms <= ALLOWED[room] | {room}, path


def test_every_room_has_a_rule():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name not in ("assets", "__pycache__")}
    assert rooms == set(ALLOWED)


def test_spec_needs_the_standard_library_only():
    import sys

    for path in (PACKAGE / "spec").rglob("*.py"):
        others = {top for top, _, _ in imported(path)} - set(sys.stdlib_module_names) - {"efficientformer"}
        assert not others, path


@pytest.mark.parametrize("path", TORCH_FREE, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_torch_free_rooms_never_import_torch(path):
    assert not {top for top, _, _ in imported(path)} & TORCH


@pytest.mark.parametrize("path", [*PACKAGE.glob("*.py"), *PACKAGE.glob("cli/*.py"), PACKAGE / "export/deployable.py"])
def test_verbs_import_torch_lazily(path):
    at_top = {top for top, _, is_top in imported(path) if is_top}
    assert not at_top & TORCH
