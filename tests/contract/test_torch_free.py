"""Prediction without torch: with torch blocked from import, everything a predicting user needs works."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

# Runs the command line with every module of the training side made unimportable.
BLOCKED = """
import sys
for name in ("torch", "torchvision", "timm", "onnx", "onnxscript"):
    sys.modules[name] = None
from efficientformer.cli.app import main
sys.argv = ["efficientformer", *sys.argv[1:]]
main()
"""


def run_without_torch(*arguments):
    """Run the command line in a process that cannot import torch, with this process's environment."""
    command = [sys.executable, "-c", BLOCKED, *map(str, arguments)]
    env = {**os.environ, "COLUMNS": "160"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=False)


def test_help_of_every_verb():
    for verb in ("predict", "test", "list", "info", "convert", "download", "profile", "latency-table"):
        result = run_without_torch(verb, "--help")
        assert result.returncode == 0, result.stderr
        assert "Usage" in result.stdout


def test_a_real_prediction():
    photo = sorted(EXAMPLES.glob("*.jpg"))[0]
    result = run_without_torch("predict", str(photo), "--format", "json")
    assert result.returncode == 0, result.stderr
    line = json.loads(result.stdout)
    assert line["path"] == str(photo)
    assert 0 < line["pred_score"] <= 1
    assert line["top_k"][0]["class"] == line["pred_class"]


def test_an_exported_file_is_measured(tmp_path):
    for photo in EXAMPLES.glob("*.jpg"):
        (tmp_path / photo.stem).mkdir()
        (tmp_path / photo.stem / photo.name).write_bytes(photo.read_bytes())
    exported = ROOT / "src" / "efficientformer" / "assets" / "efficientformer_cifar10.onnx"
    for model in (exported, "efficientformer_cifar10"):
        result = run_without_torch("test", model, "--data", tmp_path, "--json", "--report", tmp_path / "report.html")
        assert result.returncode == 0, result.stderr
        found = json.loads(result.stdout)
        assert found["images"] == 8
        assert found["engine"].endswith("(fp32)")
    assert "Worst" in (tmp_path / "report.html").read_text() or found["top1"] == 100


def test_list_and_info():
    assert "efficientformerv2_s0" in run_without_torch("list").stdout
    assert json.loads(run_without_torch("info", "L1", "--json").stdout)["params"] == 12_289_928


@pytest.mark.parametrize(
    "arguments",
    [
        ("predict", "x.jpg", "--model", "l1"),
        ("convert", "l1", "out.onnx"),
        ("latency-table", "--like", "l1", "--output", "absent.json"),
    ],
)
def test_what_needs_torch_names_the_extra(arguments):
    result = run_without_torch(*arguments)
    assert result.returncode == 1
    assert "pip install 'efficientformer[torch]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_importing_the_package_imports_no_library():
    code = "import sys, efficientformer; print([m for m in ('numpy', 'PIL', 'rich', 'torch') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
